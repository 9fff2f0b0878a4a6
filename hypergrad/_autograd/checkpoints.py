"""Regions under `torch.utils.checkpoint`: computed again with what modules held at the first time.

`torch.func.functional_call` puts a module's own tensors back when it returns. A region inside of
the module is computed again later, in a product, and would see those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from .module_state import MISSING, Slot

Recompute = Callable[..., None]


class Region:
    """The tensors and attributes that modules held when a region began.

    Parameters
    ----------
    slots : iterable of Slot
        Those of the modules that have run by then, and of their parts.
    """

    def __init__(self, slots: Iterable[Slot]) -> None:
        self._slots = list(slots)
        self._began: int = torch._C._autograd._get_sequence_nr()

    def add(self, slots: Iterable[Slot]) -> None:
        """Take note of modules that run for the first time after the region has begun."""
        # The region must not keep its own results, or neither would ever be freed; and it will put
        # its own values into a module again.
        self._slots += [slot for slot in slots if self._was_before(slot.value)]

    @contextmanager
    def held(self) -> Iterator[None]:
        """Let the modules hold it again, for as long as this lasts."""
        replaced: list[Slot] = []
        try:
            for slot in self._slots:
                now = slot.where.get(slot.name, MISSING)
                if now is not slot.value:
                    replaced.append(Slot(slot.where, slot.name, now))
                    slot.where[slot.name] = slot.value
            yield
        finally:
            for where, name, value in reversed(replaced):
                if value is MISSING:
                    where.pop(name, None)
                else:
                    where[name] = value

    def _was_before(self, value: Any) -> bool:
        node = value.grad_fn if isinstance(value, Tensor) else None
        return node is None or bool(node._sequence_nr() < self._began)
