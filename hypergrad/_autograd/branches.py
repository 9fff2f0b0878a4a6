"""What the host has looked at while a call is traced: the branches that hold for a replay."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor


class Branches:
    """The flags that the host has looked at, in their order, and what it has seen.

    Attributes
    ----------
    flags : list of Tensor
        0-d bool.
    seen : list of bool
        Their values.
    """

    def __init__(self, read: Callable[[Callable[[], bool]], bool]) -> None:
        self._read = read
        self.flags: list[Tensor] = []
        self.seen: list[bool] = []

    def look(self, flag: Tensor) -> bool:
        """Read a flag, and note it."""
        value = self._read(lambda: bool(flag))
        self.flags.append(flag)
        self.seen.append(value)
        return value


_branches: ContextVar[Branches | None] = ContextVar("hypergrad_branches", default=None)


@contextmanager
def following(read: Callable[[Callable[[], bool]], bool]) -> Iterator[Branches]:
    """Note what the host looks at in the body, which is being traced; `read` reads a value."""
    branches = Branches(read)
    token = _branches.set(branches)
    try:
        yield branches
    finally:
        _branches.reset(token)


@contextmanager
def not_following() -> Iterator[None]:
    """Note nothing in the body, which is no part of the trace."""
    token = _branches.set(None)
    try:
        yield
    finally:
        _branches.reset(token)


def traced() -> bool:
    """Say whether the call is being traced for a replay, where numbers may not be read."""
    return _branches.get() is not None


def look(flag: Tensor) -> bool:
    """Read a 0-d flag on the host."""
    branches = _branches.get()
    return bool(flag) if branches is None else branches.look(flag)
