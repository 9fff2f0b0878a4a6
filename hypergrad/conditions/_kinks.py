"""Kinks: solutions at which the derivative jumps, or is not determined."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..solvers._vectors import norm

# A kink counts as met within so many roundings (in half precision two), or within twice the
# residual of the condition where that is small enough for params to be next to a solution.
_ROUNDINGS = 64
_FAR = 1e-3
_SOLVED = 1e-4


def reach(scale: Tensor, residual: Tensor, precision: torch.dtype) -> Tensor:
    """Bound how far a kink may be away and still be met, for each task.

    Parameters
    ----------
    scale : Tensor
        The size of the numbers that decide on the side, ``(*tasks,)``.
    residual : Tensor
        The condition, ``(*tasks, n)``.
    precision : torch.dtype
        In which it was computed.

    Returns
    -------
    distance : Tensor
        ``(*tasks,)``.
    """
    missed = norm(residual) / max(residual.shape[-1], 1) ** 0.5
    missed = torch.where(missed <= _SOLVED * scale, 2 * missed, torch.zeros_like(missed))
    eps = torch.finfo(precision).eps
    return max(min(_ROUNDINGS * eps, _FAR), 2 * eps) * scale + missed


def linearly_dependent(rows: Tensor, active: Tensor) -> Tensor:
    """Say whether the active vectors are linearly dependent, to the dtype's precision.

    Parameters
    ----------
    rows : Tensor
        The vectors, ``(*tasks, m, n)``.
    active : Tensor
        bool, ``(*tasks, m)``.

    Returns
    -------
    dependent : Tensor
        bool, ``(*tasks,)``.
    """
    length = norm(rows)
    unit = rows / torch.where(length > 0, length, torch.ones_like(length))[..., None]
    unit = torch.where(active[..., None], unit, torch.zeros_like(unit))
    gram = unit @ unit.mT + torch.diag_embed((~active).to(unit.dtype))
    sound = torch.isfinite(gram).flatten(-2).all(dim=-1)
    lowest = torch.linalg.eigvalsh(torch.where(sound[..., None, None], gram, 1.0))[..., 0]
    return sound & (lowest <= 64 * rows.shape[-2] * torch.finfo(rows.dtype).eps)


def largest(parts: Sequence[Tensor], lead: int) -> Tensor:
    """Find the largest modulus among the entries of some tensors, for each task."""
    sizes = [
        part.detach().abs().reshape(*part.shape[:lead], -1).amax(dim=-1)
        for part in parts
        if part.numel()
    ]
    widest = max((size.dtype for size in sizes), key=lambda dtype: torch.finfo(dtype).bits)
    return torch.stack([size.to(widest) for size in sizes]).amax(dim=0)
