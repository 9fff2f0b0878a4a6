"""Flat vectors ``(*tasks, n)``: inner products, norms, and the matrix of a product."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd.branches import traced
from .._autograd.host import every_task
from .._autograd.rows import by_rows
from .._autograd.shards import Shards, is_shards
from .._autograd.transforms import is_wrapped

Product = Callable[[Tensor], Tensor]

# Norms between these are right to rounding, though their squares are summed in the dtype.
_FEW = 1 << 16
_SAFE = {torch.float64: (1e-140, 1e140), torch.float32: (1e-15, 1e15)}


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Form the inner product of each task's vectors."""
    return torch.linalg.vecdot(a, b)


def norm(v: Tensor) -> Tensor:
    """Form the Euclidean norm of each task's vector, safe for entries of 1e-30 and 1e30."""
    if v.shape[-1] == 0:
        return v.new_zeros(v.shape[:-1])
    if v.shape[-1] == 1 and not is_shards(v):  # of which torch 2.10 gives Inductor a wrong shape
        return v.abs().squeeze(-1)
    # Of a few numbers the careful way costs less in a trace than a look, which would also bind it
    # to whether a residual is zero or rounding.
    few = traced() and v.numel() < _FEW
    if v.dtype in _SAFE and v.device.type == "cpu" and not is_wrapped(v) and not few:
        # Several times as fast, and right where no square leaves the range of the dtype.
        length = torch.linalg.vector_norm(v, dim=-1)
        low, high = _SAFE[v.dtype]
        if length.ndim == 0 and not traced():
            safe = low < length.item() < high
        else:
            safe = every_task((length > low) & (length < high))
        if safe:
            return length
    if v.dtype != torch.float64:  # squares fit into the wider dtype, without a look at the largest
        return torch.linalg.vector_norm(v, dim=-1, dtype=torch.float64).to(v.dtype)
    largest = v.abs().amax(dim=-1)
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    return unit * torch.linalg.vector_norm(v / unit[..., None], dim=-1)


def along(basis: Tensor, v: Tensor) -> Tensor:
    """Form the inner products of a vector with vectors ``(*tasks, k, n)``."""
    if is_shards(basis):
        return dot(basis, v[..., None, :])
    return (basis @ v[..., None])[..., 0]


def combined(basis: Tensor, weights: Tensor) -> Tensor:
    """Add up vectors ``(*tasks, k, n)``, each times its weight."""
    if isinstance(basis, Shards):
        return Shards(combined(basis.local, weights), basis.space)
    return (basis.mT @ weights[..., None])[..., 0]


def dense_by_products(matvec: Product, b: Tensor) -> Tensor:
    """Form the matrix of a product, column by column, for one system."""
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    columns: Tensor = by_rows(matvec, eye)
    return columns.mT
