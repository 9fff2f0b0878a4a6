"""What the coefficients of conjugate gradients say: eigenvalues, and how far rounding has led."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ._ritz import ritz_values_of_cg


def drift_of(log: Sequence[tuple[Tensor, ...]], first: Tensor) -> Tensor:
    """Bound how far the true residual may be from that by recursion, in roundings.

    Parameters
    ----------
    log : sequence of tuple of Tensor
        Of each step p.Ap, r.z, beta, whether a task was active, whether it moved, p.p and r.r.
    first : Tensor
        The norm of the residual at the start.

    Returns
    -------
    drift : Tensor
        For each task.
    """
    pAp, rz, _, _, moving, pp, rr = (torch.stack(kept, dim=-1) for kept in zip(*log, strict=True))
    step = torch.where(moving, (rz / pAp).abs() * pp.sqrt(), 0.0)
    sizes = torch.where(moving, rr.sqrt(), 0.0)
    before = torch.cat([first[..., None], rr.sqrt()[..., :-1]], dim=-1)
    stiff = torch.where(step > 0, (before + sizes) / step, 0.0).amax(dim=-1)
    return (1 + len(log)) * stiff * step.sum(dim=-1) + sizes.sum(dim=-1)


def quotients_of(*of_steps: tuple[Tensor, ...]) -> Tensor:
    """Give the extremes of p.Ap / p.p, from p.Ap, p.p and whether a task moved."""
    pAp, pp, moves = (torch.stack(kept, dim=-1) for kept in of_steps)
    low, high = (torch.where(moves, pAp / pp, end) for end in (math.inf, -math.inf))
    ends = torch.stack([low.amin(dim=-1), high.amax(dim=-1)], dim=-1)
    return torch.where(torch.isfinite(ends), ends, math.nan)


def ritz_of(*of_steps: tuple[Tensor, ...]) -> Tensor:
    """Give the extreme Ritz values, from p.Ap, r.z, beta and whether a task was active."""
    return ritz_values_of_cg(*(torch.stack(kept, dim=-1) for kept in of_steps))
