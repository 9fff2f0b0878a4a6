"""Norms of tensors for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._autograd.branches import traced
from .._autograd.products import Parts
from .._autograd.transforms import is_wrapped
from ..solvers._vectors import norm


def size_of(terms: Parts, lead: Sequence[int], like: Tensor) -> Tensor:
    """Measure the norm of all entries of some tensors, for each task."""
    sizes = [norm(rows_of(t, lead)).to(like) for t in terms if t is not None]
    return norm(torch.stack(sizes, dim=-1)) if sizes else torch.zeros_like(like)


def size_for_each(part: Tensor, lead: Sequence[int]) -> Tensor:
    """Measure a derivative for each task; measure all of it where the tasks share a tensor."""
    own = part.shape[: len(lead)] == torch.Size(lead)
    return norm(rows_of(part, lead)) if own else norm(part.reshape(-1)).expand(tuple(lead))


def finite(lead: Sequence[int], *tensors: Tensor | None) -> Tensor:
    """Say whether all entries of all tensors are finite, for each task: bool, like `lead`."""
    rows = [rows_of(t, lead) for t in tensors if t is not None and t.numel()]
    if not rows:
        return torch.ones(tuple(lead), dtype=torch.bool, device="cpu")
    device = rows[0].device
    # A finite norm has finite entries, and is many times as fast as a look at the largest of them.
    plain = device.type == "cpu" and not any(map(is_wrapped, rows)) and not traced()
    if plain and all(math.isfinite(torch.linalg.vector_norm(r).item()) for r in rows):
        return torch.ones(tuple(lead), dtype=torch.bool, device=device)
    largest = [
        torch.linalg.vector_norm(r, math.inf, dim=-1).to(device, torch.float64) for r in rows
    ]
    return torch.isfinite(torch.stack(largest)).all(dim=0)


def rows_of(tensor: Tensor, lead: Sequence[int]) -> Tensor:
    """Lay the entries of each task in one dimension, behind those of the tasks."""
    return tensor.reshape(*lead, -1) if tensor.numel() else tensor.new_zeros(*lead, 0)
