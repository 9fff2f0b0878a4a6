"""The history of a run: its numbers, how it is thinned out, drawn, written and saved."""

from __future__ import annotations

import builtins
import io
import math

import pytest
import torch

import hypergrad
from hypergrad import HOAG, Alternating, StructureMismatch
from hypergrad.bilevel import History
from tests.bilevel_quadratic import Quadratic, loop

CUT = Alternating(inner_steps=3, inner_tol=None)


def record(step, value=1.0, info=None):
    return hypergrad.StepInfo(step, torch.tensor(value), None, torch.tensor(0.5), 1, info=info)


def run(bilevel, steps):
    return list(bilevel.run(steps))


def test_it_has_the_numbers_of_the_records():
    bilevel = loop(Quadratic(), CUT)
    infos = run(bilevel, 3) + run(bilevel, 2)
    history = bilevel.history
    assert history.step == [1, 2, 3, 4, 5]
    assert history.outer_value == [float(i.outer_value) for i in infos]
    assert history.inner_norm == [float(i.inner_norm) for i in infos]
    assert history.residual_norm == [float(i.info.residual_norm) for i in infos]
    assert history.status == [int(i.info.status) for i in infos]
    assert history.seconds == sorted(history.seconds)
    assert history.seconds[0] > 0


def test_a_method_without_a_linear_system_has_no_status():
    bilevel = loop(Quadratic(), hypergrad.F2SA())
    run(bilevel, 2)
    assert bilevel.history.status == [-1, -1]
    assert all(map(math.isnan, bilevel.history.residual_norm))


@pytest.mark.parametrize("length", [2048, 2049, 10000])
def test_it_is_never_long_and_stays_even(length):
    history = History()
    for step in range(1, length + 1):
        history.add(record(step, float(step)), 1.0)
    steps = history.step
    every = steps[1] - steps[0]
    assert len(history) <= 2048
    assert steps == list(range(every, length + 1, every))
    assert history.outer_value == [float(step) for step in steps]
    assert history.seconds == [float(step) for step in steps]  # the others took time too
    assert (every == 1) == (length == 2048)
    assert (f"every {every} steps" in repr(history)) == (every > 1)


def test_it_holds_few_tensors():
    history = History()
    for step in range(1, 200):
        history.add(record(step), 1.0)
        held = [v for row in history._records for v in row if isinstance(v, torch.Tensor)]
        assert len(held) <= 2 * 64


def test_it_is_in_the_state_and_a_resumed_run_goes_on_with_it():
    first = loop(Quadratic(), CUT)
    run(first, 3)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = loop(Quadratic(), CUT)
    second.load_state_dict(torch.load(file, weights_only=True))
    for bilevel in (first, second):
        run(bilevel, 2)
    assert second.history.step == [1, 2, 3, 4, 5]
    assert second.history.outer_value == first.history.outer_value
    assert second.history.seconds[:3] == first.history.seconds[:3]


def test_a_state_without_one_or_with_a_broken_one():
    bilevel = loop(Quadratic(), CUT)
    run(bilevel, 2)
    state = bilevel.state_dict()
    older = {name: value for name, value in state.items() if name != "history"}
    other = loop(Quadratic(), CUT)
    other.load_state_dict(older)
    assert len(other.history) == 0
    for broken in ({"step": [1]}, {**state["history"], "status": []}):
        other = loop(Quadratic(), CUT)
        with pytest.raises(StructureMismatch, match="history in this state"):
            other.load_state_dict({**state, "history": broken})
        assert other.steps == 0


def test_it_draws_itself():
    pytest.importorskip("matplotlib").use("agg")
    import matplotlib.pyplot as plt

    bilevel = loop(Quadratic(), CUT)
    run(bilevel, 4)
    figure = bilevel.history.plot()
    upper, lower = figure.axes
    assert list(upper.lines[0].get_ydata()) == bilevel.history.outer_value
    assert list(lower.lines[0].get_ydata()) == bilevel.history.inner_norm
    assert list(lower.lines[0].get_xdata()) == [1, 2, 3, 4]
    assert upper.get_ylabel() == "outer loss"
    assert lower.get_xlabel() == "outer step"
    own, axes = plt.subplots(2)
    assert bilevel.history.plot(axes) is own
    plt.close("all")


def test_without_steps_or_matplotlib_it_says_so(monkeypatch):
    pytest.importorskip("matplotlib")
    with pytest.raises(ValueError, match="nothing to plot"):
        History().plot()
    there = builtins.__import__

    def absent(name, *args, **keywords):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return there(name, *args, **keywords)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        History().plot()


def test_it_is_written_to_anything_with_add_scalar():
    class Writer:
        def __init__(self):
            self.rows = []

        def add_scalar(self, tag, value, step):
            self.rows.append((tag, value, step))

    bilevel = loop(Quadratic(), HOAG())
    run(bilevel, 2)
    writer = Writer()
    bilevel.history.write(writer, prefix="a/")
    values = bilevel.history.outer_value
    assert [row for row in writer.rows if row[0] == "a/outer_value"] == [
        ("a/outer_value", values[0], 1),
        ("a/outer_value", values[1], 2),
    ]
    bilevel = loop(Quadratic(), hypergrad.F2SA())
    run(bilevel, 1)
    writer = Writer()
    bilevel.history.write(writer)
    tags = {tag for tag, _, _ in writer.rows}
    assert tags == {"bilevel/seconds", "bilevel/outer_value", "bilevel/inner_norm"}
    with pytest.raises(TypeError, match="add_scalar"):
        bilevel.history.write(print)
