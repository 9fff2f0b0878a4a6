"""Reading values on the host, under any nesting of transforms."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch._C import _functorch

from .branches import look
from .refusals import WithoutDerivative
from .transforms import is_wrapped, layers


class _AllTasks(WithoutDerivative):
    """All tasks' rows of a ``(k,)`` tensor as one plain ``(tasks, k)`` tensor.

    The batching rule returns an unbatched result, so that Python may look at it under any
    nesting of transforms.
    """

    @staticmethod
    def forward(rows: Tensor) -> tuple[Tensor, ...]:
        return (rows.detach().reshape(-1, rows.shape[-1]).clone(),)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int], rows: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[None]]:
        return _AllTasks.apply(rows.movedim(in_dims[0], 0)), (None,)


def all_tasks(rows: Tensor) -> Tensor:
    """Gather the rows of every task, ``(tasks, k)``, in a plain tensor that the host may read."""
    rows = rows.detach()
    if is_wrapped(rows):
        (rows,) = _AllTasks.apply(rows)
        while is_wrapped(rows):
            rows = _functorch.get_unwrapped(rows)
        return rows
    return rows.reshape(-1, rows.shape[-1])


def any_task(flag: Tensor) -> bool:
    """Say whether a flag is set for any task. Synchronises with the host once."""
    flag = layers(flag)[-1] if is_wrapped(flag) else flag  # of all tasks, in whatever order
    return look(flag.any() if flag.ndim else flag)


def every_task(flag: Tensor) -> bool:
    """Say whether a flag is set for every task. Synchronises with the host once."""
    flag = layers(flag)[-1] if is_wrapped(flag) else flag
    return look(flag.all() if flag.ndim else flag)
