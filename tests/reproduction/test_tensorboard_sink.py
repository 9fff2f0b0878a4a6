"""TensorBoard, which no extra asks for: the records again, or one line that says it is missing."""

import importlib.util

import pytest

from reproduction.runs import sinusoid
from reproduction.runs.tensorboard_sink import TensorBoardSink


def test_without_tensorboard_the_flag_is_refused_in_one_line(tmp_path, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find(name)
    )

    with pytest.raises(SystemExit) as stop:
        sinusoid.main(["--tensorboard", "--out", str(tmp_path / "run")])

    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install tensorboard" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.filterwarnings("ignore")  # those of TensorBoard itself
def test_records_are_written_and_a_resumed_run_hides_what_it_repeats(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for start, value in ((0, 1.0), (2, 5.0)):
        sink = TensorBoardSink(tmp_path, start)
        for step in range(start + 1, 4):
            sink({"step": step, "validation": value})
        sink.close()

    events = EventAccumulator(str(tmp_path)).Reload().Scalars("validation")
    assert [(event.step, event.value) for event in events] == [(1, 1.0), (2, 1.0), (3, 5.0)]
