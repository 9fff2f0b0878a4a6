"""The measurement of a trained run against the number of inner steps."""

import json
import math

import pytest

from reproduction.runs import omniglot, sinusoid
from reproduction.runs.experiment import build_learner
from reproduction.runs.omniglot import OmniglotBenchmark
from reproduction.runs.resume import Refused
from reproduction.studies import adaptation
from reproduction.studies.adaptation import read_run

SMALL = (
    "--smoke", "--method", "imaml", "--ways", "2", "--channels", "4", "--queries", "1",
    "--test-tasks", "4", "--tasks-per-step", "2",
)  # fmt: skip


@pytest.fixture(autouse=True)
def no_data(monkeypatch):
    monkeypatch.delenv("OMNIGLOT_DIR", raising=False)


def test_a_run_is_measured_against_its_inner_steps(tmp_path, capsys):
    run = tmp_path / "run"
    omniglot.main([*SMALL, "--inner-steps", "4", "--out", str(run)])
    validated = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["validation"]
    capsys.readouterr()
    adaptation.main([str(run), "--most-steps", "16"])

    folder = run / "adaptation"
    assert (folder / "adaptation.png").read_bytes().startswith(b"\x89PNG")
    assert (folder / "adaptation.md").read_text().strip() in capsys.readouterr().out
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    by = {(r["differentiation"], r["steps"]): r for r in records}
    # The run adapts by four steps; its last parameters may not be its best.
    settings, params = read_run(run, None)
    benchmark = OmniglotBenchmark.build(settings)
    own = benchmark.validate(build_learner(settings, "imaml", benchmark), params)
    assert by["implicit", 4]["accuracy"] == own >= validated
    growth = {way: by[way, 16]["peak"] - by[way, 8]["peak"] for way in adaptation.WAYS}
    earlier = by["unrolled", 8]["peak"] - by["unrolled", 4]["peak"]
    assert growth["unrolled"] == pytest.approx(2 * earlier, rel=0.05)
    assert growth["implicit"] < 0.02 * growth["unrolled"]
    assert growth["truncated"] < 0.02 * growth["unrolled"]
    assert all(math.isfinite(r["seconds"]) for r in records)


def test_a_folder_without_such_a_run_is_refused(tmp_path):
    with pytest.raises(Refused, match=r"no finished run: .*config.json is missing"):
        adaptation.main([str(tmp_path)])
    sinusoid.main(["--smoke", "--compare", "--out", str(tmp_path)])
    with pytest.raises(Refused, match="another program"):
        adaptation.main([str(tmp_path)])


def test_a_run_of_the_last_layer_has_no_inner_steps_to_count(tmp_path):
    omniglot.main([*SMALL, "--method", "imaml-head", "--out", str(tmp_path)])

    with pytest.raises(Refused, match="adapts the last layer"):
        adaptation.main([str(tmp_path)])


def test_a_run_from_before_the_later_flags_is_read(tmp_path):
    omniglot.main([*SMALL, "--inner-steps", "1", "--out", str(tmp_path)])
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("start_from", "validation_only"):
        del config[name]
    del config["further"]["network"]
    for name in ("head_steps", "learn_lam"):
        del config["recipes"]["imaml"][name]
    path.write_text(json.dumps(config))

    settings, _ = read_run(tmp_path, None)
    assert settings.recipes["imaml"].head_steps == 0
    OmniglotBenchmark.build(settings)


def test_steps_that_follow_no_gradient_are_refused(tmp_path):
    omniglot.main([*SMALL, "--method", "imaml-hf", "--inner-steps", "1", "--out", str(tmp_path)])

    with pytest.raises(Refused, match="none that one could unroll"):
        adaptation.main([str(tmp_path)])
