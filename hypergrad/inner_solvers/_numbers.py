"""A task's numbers, as vectors of one entry that go with its vectors of n: ``(*tasks, 1)``."""

from __future__ import annotations

import torch
from torch import Tensor

from ..solvers import _vectors


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Take the inner product of each task's vectors."""
    return torch.linalg.vecdot(a, b).unsqueeze(-1)


def norm(v: Tensor) -> Tensor:
    """Take the Euclidean norm of each task's vector."""
    return _vectors.norm(v).unsqueeze(-1)


def largest(v: Tensor) -> Tensor:
    """Find the largest entry of each task's vector in size: NaN where one is."""
    return v.abs().amax(dim=-1, keepdim=True) if v.shape[-1] else v.new_zeros((*v.shape[:-1], 1))


def norm_unseen(v: Tensor) -> Tensor:
    """Take the Euclidean norm of each task's vector without a look at any, safe as `norm` is."""
    if v.dtype != torch.float64:  # squares fit into the wider dtype
        return torch.linalg.vector_norm(v, dim=-1, keepdim=True, dtype=torch.float64).to(v.dtype)
    size = largest(v)
    unit = torch.where((size > 0) & torch.isfinite(size), size, torch.ones_like(size))
    return unit * torch.linalg.vector_norm(v / unit, dim=-1, keepdim=True)
