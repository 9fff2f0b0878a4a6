"""One random draw for all evaluations that belong to one answer."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from .transforms import outside_transforms, transforms_active

# PyTorch waits for a generator with the interpreter's lock held: two threads that ask for its state
# wait for each other for ever, where one of them lets Python go in between (2.13 and 2.15).
_ALONE = threading.RLock()

State = tuple[torch.Tensor, dict[int, torch.Tensor]]


class Draw:
    """The random numbers of a function that is evaluated several times.

    The first evaluation draws from the caller's generators, as any call would; every later one
    sees the same numbers again and leaves the generators as it found them.

    Parameters
    ----------
    after : Draw, optional
        One that was made before; where nothing has been drawn since, the two share the memory of
        the generators' state (5 kB).
    """

    def __init__(self, after: Draw | None = None) -> None:
        self._first: State | None = None
        self._after = after

    @contextmanager
    def evaluation(self) -> Iterator[None]:
        """Surround one evaluation."""
        if self._first is None:
            self._first = generators()
            if self._after is not None:
                if same(self._first, self._after._first):
                    self._first = self._after._first
                self._after = None
            yield
            return
        now = generators()
        restore(self._first)
        try:
            yield
        finally:
            restore(now)

    def forget(self) -> None:
        """Begin again: the draws have been put back."""
        self._first = None

    def again(self) -> None:
        """Begin an evaluation again, from within it."""
        assert self._first is not None
        restore(self._first)


@contextmanager
def unnoticed() -> Iterator[None]:
    """Surround an evaluation that must leave the caller's generators as they were."""
    now = generators()
    try:
        yield
    finally:
        restore(now)


# Inside a function transform the state would be a tensor of that transform, without values.


def generators() -> State:
    if transforms_active():
        with outside_transforms():
            return generators()
    cuda: dict[int, torch.Tensor] = {}
    with _ALONE:
        if torch.cuda.is_initialized():
            cuda = {i: torch.cuda.get_rng_state(i) for i in range(torch.cuda.device_count())}
        return torch.get_rng_state(), cuda


def same(one: State, other: State | None) -> bool:
    """Say whether nothing has been drawn between two states."""
    if other is None or one[1].keys() != other[1].keys():
        return False
    pairs = [(one[0], other[0]), *((one[1][i], other[1][i]) for i in one[1])]
    with outside_transforms():
        return all(torch.equal(a, b) for a, b in pairs)


def restore(state: State) -> None:
    """Set the generators back."""
    with outside_transforms(), _ALONE:
        torch.set_rng_state(state[0])
        for device, numbers in state[1].items():
            torch.cuda.set_rng_state(numbers, device)
