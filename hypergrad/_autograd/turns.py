"""One thread at a time evaluates users' functions: functional_call swaps a module's tensors."""

from __future__ import annotations

import sys
import threading
from types import FrameType

from torch.autograd import graph

_lock = threading.RLock()
_holders: list[int] = []  # the threads that have it, as often as they have
_POLL = 0.2
_PATIENCE = 5  # polls


def take_turn() -> bool:
    """Wait until no other thread evaluates a user's function.

    Returns
    -------
    taken : bool
        False where that thread waits for others: perhaps for this one, which a loss has started.
    """
    taken = _lock.acquire(blocking=False)
    if not taken and _for_us():
        return False
    seen: tuple[FrameType, int] | None = None
    waited = 0
    while not taken:
        taken = _lock.acquire(timeout=_POLL)
        now = None if taken else _waits()
        waited = waited + 1 if now is not None and now == seen else 0
        seen = now
        if waited >= _PATIENCE or (not taken and _for_us()):
            return False
    _holders.append(threading.get_ident())
    return True


def end_turn() -> None:
    """Let the next thread have its turn."""
    _holders.pop()
    _lock.release()


def _for_us() -> bool:
    """Say whether this thread is one of autograd's, for which the one that has the turn waits."""
    if not isinstance(threading.current_thread(), threading._DummyThread):
        return False
    frame = _frame()
    return frame is not None and frame.f_code is graph._engine_run_backward.__code__


def _waits() -> tuple[FrameType, int] | None:
    """Find where the thread that has the turn waits for another thread; None: it does not."""
    frame = _frame()
    if frame is None or frame.f_code.co_filename != threading.__file__:
        return None
    return frame, frame.f_lasti


def _frame() -> FrameType | None:
    """Find the frame that the thread that has the turn is in."""
    holder = _holders[-1:]
    return sys._current_frames().get(holder[0]) if holder else None
