"""Many steps in one loop: that they are the same steps, and what is shown of them."""

from __future__ import annotations

import io
import re
import sys

import pytest
import torch

import hypergrad
from hypergrad import Alternating
from hypergrad.bilevel import _run
from tests.bilevel_quadratic import Quadratic, loop

CUT = Alternating(inner_steps=3, inner_tol=None)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 100.0

        def __call__(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(_run.time, "perf_counter", clock)
    return clock


def test_it_makes_the_steps_that_step_makes():
    one, two = loop(Quadratic(), CUT), loop(Quadratic(), CUT)
    infos = list(one.run(5))
    by_hand = [two.step() for _ in range(5)]
    assert torch.equal(one.hparams, two.hparams)
    assert [i.step for i in infos] == [i.step for i in by_hand]
    assert all(torch.equal(a.grads, b.grads) for a, b in zip(infos, by_hand, strict=True))


def test_a_break_leaves_the_loop_where_it_is():
    one, two = loop(Quadratic(), CUT), loop(Quadratic(), CUT)
    for info in one.run(10):
        if info.step == 3:
            break
    assert one.steps == 3
    list(one.run(2))
    list(two.run(5))
    assert torch.equal(one.hparams, two.hparams)
    assert one.history.step == two.history.step


def test_no_step_is_made_before_it_is_asked_for():
    bilevel = loop(Quadratic(), CUT)
    steps = bilevel.run(3)
    assert bilevel.steps == 0
    assert len(steps) == 3
    assert "for step in loop.run(3)" in repr(steps)
    with pytest.warns(UserWarning, match="was not asked for any"):
        del steps
    list(bilevel.run(0))


def test_off_is_nothing_but_steps(capsys):
    bilevel = loop(Quadratic(), CUT)
    list(bilevel.run(2, history=False))
    assert len(bilevel.history) == 0
    assert bilevel.steps == 2
    list(bilevel.run(1))
    assert bilevel.history.step == [3]
    assert capsys.readouterr() == ("", "")


def test_a_terminal_has_one_line_that_is_written_over(monkeypatch, clock):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "200")
    for info in loop(Quadratic(), CUT).run(5, progress=True):
        if info.step == 2:
            clock.now += 0.01  # too early for another one
        else:
            clock.now += 2.0
    text = out.getvalue()
    assert text.count("\n") == 1
    assert text.endswith("\n")
    lines = [line.rstrip() for line in text[1:].split("\r")]
    # Steps are instantaneous here, and what the caller does is counted.
    assert [re.match(r"step (\d)", line)[1] for line in lines] == ["1", "2", "4", "5"]
    assert re.fullmatch(r"step 2 \(2 of 5\): outer \S+, inner norm \S+, CG \w+, 6 s left", lines[1])
    assert lines[-1].endswith("in 6 s")
    widths = [len(line) for line in text[1:].rstrip("\n").split("\r")]
    assert widths[-1] >= len(lines[-2])  # what was longer is wiped


def test_a_line_is_no_wider_than_the_terminal(monkeypatch):
    out = Terminal()
    monkeypatch.setattr(sys, "stderr", out)
    monkeypatch.setenv("COLUMNS", "40")
    list(loop(Quadratic(), CUT).run(3, progress=True))
    assert all(len(line) < 40 for line in re.split(r"[\r\n]", out.getvalue()))


def test_elsewhere_there_are_ten_lines_or_one_a_minute(monkeypatch, clock):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    list(loop(Quadratic(), CUT).run(40, progress=True))
    lines = out.getvalue().splitlines()
    assert len(lines) == 11  # the first step, and each tenth
    assert "\r" not in out.getvalue()
    out.truncate(0)
    for _ in loop(Quadratic(), CUT).run(20, progress=True):
        clock.now += 61.0
    assert len(out.getvalue().splitlines()) == 20


def test_a_break_shows_the_last_step(monkeypatch, clock):
    for out in (Terminal(), io.StringIO()):
        monkeypatch.setattr(sys, "stderr", out)
        for info in loop(Quadratic(), CUT).run(1000, progress=True):
            if info.step == 7:
                break
        assert "step 7 (7 of 1000)" in out.getvalue()
        assert out.getvalue().endswith("\n")


def test_warnings_are_counted_in_the_line(monkeypatch):
    out = io.StringIO()
    monkeypatch.setattr(sys, "stderr", out)
    bilevel = loop(Quadratic(), Alternating(inner_steps=1))
    with pytest.warns(hypergrad.ConvergenceWarning):
        list(bilevel.run(1, progress=True))
    assert re.search(r", [12] kinds? of warning", out.getvalue())


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.34, "0.3 s"), (61, "61 s"), (150, "2 min"), (5000, "83 min"), (9000, "2 h 30 min")],
)
def test_durations_are_short(seconds, text):
    assert _run._duration(seconds) == text


@pytest.mark.parametrize("steps", [-1, 2.0, True, None])
def test_steps_that_are_no_number_of_steps_are_refused(steps):
    with pytest.raises((TypeError, ValueError), match="steps must"):
        loop(Quadratic(), CUT).run(steps)
