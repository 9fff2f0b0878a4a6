"""Searches that look at values, beneath the transforms that surround a projection.

A search finds the piece of a projection that a point lies on: which bounds are active, which
entries are positive, which multipliers hold. The projection is then a smooth formula on that
piece, through which any derivative passes; the search itself has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .refusals import WithoutDerivative

Find = Callable[..., tuple[Tensor, ...]]


def search(find: Find, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Call `find` on plain tensors of all tasks at once.

    Parameters
    ----------
    find : callable
        Takes tensors with one task dimension in front, and returns tensors that have it too.
    *tensors : Tensor
        Its arguments, for one task.

    Returns
    -------
    results : tuple of Tensor
        What it returned, for one task, without derivatives.
    """
    results: tuple[Tensor, ...] = _Search.apply(
        find, tuple(t.ndim for t in tensors), *(t.detach() for t in tensors)
    )
    return results


class _Search(WithoutDerivative):
    @staticmethod
    def forward(find: Find, dims: tuple[int, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        lead = tensors[0].shape[: tensors[0].ndim - dims[0]]
        flat = [
            t.detach().reshape((lead.numel(), *t.shape[t.ndim - d :]))
            for t, d in zip(tensors, dims, strict=True)
        ]
        with torch.no_grad():
            return tuple(t.reshape((*lead, *t.shape[1:])) for t in find(*flat))

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, find: Find, dims: tuple[int, ...], *tensors: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        moved = in_front(tensors, in_dims[2:], info.batch_size)
        results = _Search.apply(find, dims, *moved)
        return results, (0,) * len(results)


def in_front(tensors: Sequence[Tensor], in_dims: Sequence[int | None], size: int) -> list[Tensor]:
    """Put the batch in front of every tensor, also of those that do not have it."""
    return [
        t.expand(size, *t.shape) if d is None else t.movedim(d, 0)
        for t, d in zip(tensors, in_dims, strict=True)
    ]
