"""Warnings: at the line that called the library, or to a function that listens."""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Literal

from torch import Tensor

from ._errors import CompileWarning, ConvergenceWarning, with_place
from ._pytrees import Tree

OnFailure = Literal["warn", "raise", "ignore"]

_HERE = str(Path(__file__).parent) + os.sep

# Who is told of warnings in place of Python's filters.
_listener: ContextVar[Callable[[str], bool] | None] = ContextVar("hypergrad_listener", default=None)


def check_on_failure(on_failure: str) -> None:
    """Refuse an `on_failure` that is none of the three."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f"on_failure must be 'warn', 'raise' or 'ignore'; got {on_failure!r}.")


@contextmanager
def listening(listener: Callable[[str], bool]) -> Iterator[None]:
    """Tell a function of every warning; it decides by what it returns whether that is issued."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def warn(text: str, kind: type[Exception] = ConvergenceWarning) -> None:
    """Issue a `ConvergenceWarning` at the line that called the library.

    `kind` is the error in whose place it stands.
    """
    listener = _listener.get()
    if listener is not None and not listener(text):
        return
    _warn(with_place(text, kind), ConvergenceWarning)


def warn_of_compiling(text: str) -> None:
    """Issue a `CompileWarning` at the line that called the library."""
    _warn(with_place(text, CompileWarning), CompileWarning)


def _warn(text: str, category: type[Warning]) -> None:
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _internal(frame.f_back.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, category, stacklevel=level + 1)


def _internal(filename: str) -> bool:
    return filename.startswith(_HERE) or f"{Path('torch')}/" in filename.replace("\\", "/")


def warn_of_unused(hparams: Tree, neither: str, *terms: Sequence[Tensor | None]) -> None:
    """Warn, naming the leaves, where all terms of a hypergradient are missing."""
    unused = [
        hparams.variable_path(i)
        for i, of_leaf in enumerate(zip(*terms, strict=True))
        if all(term is None for term in of_leaf)
    ]
    if unused:
        warn(
            f"{neither} depends on {', '.join(unused)}: the gradient there is zero. If that is not "
            "meant, look for a .detach() or .item(), a copy, or a value that is captured in place "
            "of the argument. A solution does not depend on how it was reached: for the learning "
            "rate of an inner solver, call unrolled_grad."
        )


def counted(failed: int, tasks: int, *, exact: bool, unit: str = "tasks") -> str:
    """Say how many tasks failed; in a warning exactly up to three, since it moves at every step."""
    if tasks == 1:
        return ""
    few = exact or failed <= 3
    return f"{failed if few else 'more than 3'} of {tasks} {unit}: "
