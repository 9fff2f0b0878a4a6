"""One thread at a time evaluates users' functions: functional_call swaps a module's tensors."""

from __future__ import annotations

import sys
import threading
from types import FrameType

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
    seen: tuple[FrameType, int] | None = None
    waited = 0
    while not taken:
        taken = _lock.acquire(timeout=_POLL)
        now = None if taken else _waits()
        waited = waited + 1 if now is not None and now == seen else 0
        seen = now
        if waited >= _PATIENCE:
            return False
    _holders.append(threading.get_ident())
    return True


def end_turn() -> None:
    """Let the next thread have its turn."""
    _holders.pop()
    _lock.release()


def _waits() -> tuple[FrameType, int] | None:
    """Where the thread that has the turn waits for another thread; None: it does not."""
    holder = _holders[-1:]
    frame = sys._current_frames().get(holder[0]) if holder else None
    if frame is None or frame.f_code.co_filename != threading.__file__:
        return None
    return frame, frame.f_lasti
