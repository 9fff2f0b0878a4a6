"""Ritz values from the coefficients that a Lanczos recurrence leaves behind."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_LONGEST = 512  # above it the tridiagonal matrix is taken apart into blocks
_ENTRIES = 2**22  # of all blocks together


def extreme_ritz_values(diagonal: Tensor, beside: Tensor, known: Tensor) -> Tensor:
    """Find the lowest and highest eigenvalue of each task's symmetric tridiagonal matrix.

    Every eigenvalue of the matrix lies within the spectrum of the operator, and so does every
    eigenvalue of a diagonal block of it: a long recurrence is taken apart into blocks, so that
    the cost stays below that of the iteration.

    Parameters
    ----------
    diagonal : Tensor
        ``(*tasks, k)``.
    beside : Tensor
        ``(*tasks, k)``, the entry that joins each row with the next; the last one is not used.
    known : Tensor
        bool, ``(*tasks, k)``: whether the task was still running at a step.

    Returns
    -------
    extremes : Tensor
        ``(*tasks, 2)``; NaN for a task that took no step.
    """
    count = diagonal.shape[-1]
    known = known & torch.isfinite(diagonal)
    some = known[..., :1]
    # A task that stopped early is filled up with a value that lies between its extremes.
    filler = torch.where(some, diagonal[..., :1], 0.0)
    diagonal = torch.where(known, diagonal, filler)
    joined = known[..., 1:] & torch.isfinite(beside[..., :-1])
    beside = torch.where(joined, beside[..., :-1], 0.0)
    room = _ENTRIES // max(diagonal.numel(), 1)
    length = max(min(_LONGEST, room), 64)
    low, high = filler[..., 0], filler[..., 0]
    for start in range(0, count, length):
        block = torch.diag_embed(diagonal[..., start : start + length])
        if block.shape[-1] > 1:
            stop = start + block.shape[-1] - 1
            block = block + torch.diag_embed(beside[..., start:stop], offset=-1)
        values = torch.linalg.eigvalsh(block)
        low, high = torch.minimum(low, values[..., 0]), torch.maximum(high, values[..., -1])
    return torch.where(some, torch.stack([low, high], dim=-1), math.nan)


def outermost(values: Tensor) -> Tensor:
    """Take the first and the last of sorted values."""
    # An index of a list would be a tensor of its own, which no graph holds.
    return torch.stack((values[..., 0], values[..., -1]), dim=-1)


def widest(
    one: Callable[[], Tensor] | None, other: Callable[[], Tensor] | None
) -> Callable[[], Tensor] | None:
    """Take the extremes of two recurrences with the same matrix."""
    if one is None or other is None:
        return one or other

    def extremes() -> Tensor:
        a, b = one(), other()
        lowest, highest = torch.fmin(a, b)[..., :1], torch.fmax(a, b)[..., 1:]
        return torch.cat([lowest, highest], dim=-1)

    return extremes


def condition_of_factors(factors: Sequence[Tensor]) -> Tensor:
    """Find the condition number of A as a Krylov space has seen it: never above the true one.

    Parameters
    ----------
    factors : sequence of Tensor
        ``(*tasks, l, k)``: A between orthonormal bases, as far as each space has grown.

    Returns
    -------
    condition : Tensor
        ``(*tasks,)``; NaN where a factor is not finite.
    """
    worst, largest = [], []
    for factor in factors:
        sound = torch.isfinite(factor).flatten(-2).all(dim=-1)
        values = torch.linalg.svdvals(torch.where(sound[..., None, None], factor, 0.0))
        largest.append(torch.where(sound, values[..., 0], math.nan))
        worst.append(values[..., -1])
    return torch.stack(largest).amax(dim=0) / torch.stack(worst).amin(dim=0)


def lanczos_factor(
    diagonal: Sequence[Tensor], beside: Sequence[Tensor], known: Sequence[Tensor]
) -> Tensor:
    """Form the ``(*tasks, k + 1, k)`` matrix of a Lanczos recurrence, indefinite or not."""
    a, b, some = (torch.stack(list(c), dim=-1) for c in (diagonal, beside, known))
    zero = torch.zeros_like(a)
    # A task that stopped early is filled up with columns as long as its others.
    size = torch.where(some, torch.hypot(a, b), zero).amax(dim=-1, keepdim=True)
    a, b = torch.where(some, a, size), torch.where(some, b, zero)
    square = torch.diag_embed(a) + torch.diag_embed(b[..., :-1], offset=-1)
    square = square + torch.diag_embed(b[..., :-1], offset=1)
    last = torch.cat([zero[..., :-1], b[..., -1:]], dim=-1)
    return torch.cat([square, last[..., None, :]], dim=-2)


def ritz_values_of_lanczos(
    diagonal: Sequence[Tensor], beside: Sequence[Tensor], known: Sequence[Tensor]
) -> Tensor:
    """Find the extreme Ritz values from the coefficients of each step."""
    return extreme_ritz_values(*(torch.stack(list(c), dim=-1) for c in (diagonal, beside, known)))


def ritz_values_of_cg(pAp: Tensor, size: Tensor, beta: Tensor, known: Tensor) -> Tensor:
    """Find the extreme Ritz values from p.Ap, r.z and beta of each step, ``(*tasks, k)``, of CG.

    The matrix of the Lanczos recurrence is L D L^T with D the values of 1 / alpha = p.Ap / r.z
    and L unit lower bidiagonal with the square roots of beta beside its diagonal. It is right
    for a last step of negative curvature too.

    Returns
    -------
    extremes : Tensor
        ``(*tasks, 2)``, as from `extreme_ritz_values`.

    References
    ----------
    Golub and Van Loan, Matrix computations, section 10.2.
    """
    pivots = pAp / size
    carried = torch.nn.functional.pad((beta * pivots)[..., :-1], (1, 0))
    return extreme_ritz_values(pivots + carried, beta.sqrt() * pivots, known)
