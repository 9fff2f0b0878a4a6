"""Many outer steps: an iterator that shows how far it is."""

from __future__ import annotations

import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from .._info import Status, shown
from ._step_info import StepInfo

if TYPE_CHECKING:
    from ._bilevel import Bilevel

_BETWEEN = 0.1  # seconds between two lines on a terminal
_PARTS = 10  # lines of a run elsewhere, if it is short
_AT_LEAST = 60.0  # seconds between two of them, at most


class Run:
    """The steps of one call of `Bilevel.run`: each is made when it is asked for.

    Parameters
    ----------
    loop : Bilevel
        Whose.
    steps : int
        How many.
    progress, history : bool
        As in `Bilevel.run`.
    """

    def __init__(self, loop: Bilevel, steps: int, progress: bool, history: bool) -> None:
        self._loop, self._steps, self._begun = loop, steps, False
        self._progress, self._history = progress, history

    def __len__(self) -> int:
        """Count the steps, those that are made included."""
        return self._steps

    def __iter__(self) -> Iterator[StepInfo]:
        """Make the steps; a `break` leaves the loop where it is.

        Yields
        ------
        info : StepInfo
            Of each step.
        """
        self._begun = True
        if not (self._progress or self._history):
            for _ in range(self._steps):
                yield self._loop.step()
            return
        line = _Line(self._steps) if self._progress else None
        last = time.perf_counter()
        try:
            for done in range(1, self._steps + 1):
                info = self._loop.step()
                now = time.perf_counter()
                if self._history:
                    self._loop.history.add(info, now - last)
                last = now
                if line is not None:
                    line.show(info, done)
                yield info
        finally:
            if line is not None:
                line.end()

    def __repr__(self) -> str:
        """Say that it is to be iterated over."""
        return f"<{self._steps} steps of a Bilevel, made by: for step in loop.run({self._steps})>"

    def __del__(self) -> None:
        """Warn where no step was made."""
        if self._steps and not self._begun:
            warnings.warn(
                "Bilevel.run makes a step when it is asked for the next one, and was not asked for "
                "any. Write: for step in loop.run(...), or list(loop.run(...)).",
                stacklevel=2,
            )


class _Line:
    """A line on stderr: written over on a terminal, and elsewhere a new one now and then."""

    def __init__(self, steps: int) -> None:
        self._steps, self._out = steps, sys.stderr
        self._start, self._last = time.perf_counter(), -_AT_LEAST
        self._first = 0.0  # when the first step was made, which takes longer than others
        self._part, self._width = 0, 0
        self._unseen: tuple[StepInfo, int] | None = None
        self._rewritten = _is_terminal(self._out)

    def show(self, info: StepInfo, done: int) -> None:
        """Show a step, if it is time."""
        now = time.perf_counter()
        self._first = self._first or now
        since = now - self._last
        if self._rewritten:
            due = since >= _BETWEEN
        else:
            part = done * _PARTS // self._steps
            due = part > self._part or since >= _AT_LEAST
            self._part = part
        if due or done == self._steps:
            self._last = now
            self._unseen = None
            self._write(info, done, now)
        else:
            self._unseen = info, done

    def end(self) -> None:
        """Show the last step that was made, and end the line."""
        if self._unseen is not None:
            self._write(*self._unseen, time.perf_counter())
        if self._rewritten and self._width:
            self._put("\n")

    def _write(self, info: StepInfo, done: int, now: float) -> None:
        text = f"step {info.step} ({done} of {self._steps}): outer {shown(info.outer_value)}, "
        text += f"inner norm {shown(info.inner_norm)}"
        if info.info is not None:
            status = Status(int(info.info.status.max())).name
            text += f", {info.info.method} {status}"
        met = len(info.warned)
        text += f", {met} kind{'s' * (met > 1)} of warning" if met else ""
        if done < self._steps:
            spent = now - self._first if done > 1 else now - self._start
            left = spent / max(done - 1, 1) * (self._steps - done)
            text += f", {_duration(left)} left"
        else:
            text += f", in {_duration(now - self._start)}"
        if not self._rewritten:
            self._put(text + "\n")
            return
        text = text[: max(shutil.get_terminal_size().columns - 1, 20)]
        self._put("\r" + text.ljust(self._width))
        self._width = len(text)

    def _put(self, text: str) -> None:
        self._out.write(text)
        self._out.flush()


def _is_terminal(out: TextIO) -> bool:
    try:
        return out.isatty()
    except (AttributeError, ValueError):  # something else, or closed
        return False


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
