"""The Neumann series."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import Status
from ._base import Counted, LinearSystem, Solution, Solver, at_least, finite, norm
from ._iterative import curves_down

_TERMS = 20
_FAR = 0.1  # a residual above it is none that a caller who named no budget has in mind
_POWER_STEPS = 8
_SAFETY = 1.5  # a power iteration sees the largest eigenvalue from below
_GROWTH = 10.0  # a residual that has grown by this much is not a transient
_HALVINGS = 5  # so often no estimate of a largest eigenvalue is too low: no step is short enough


@dataclasses.dataclass(frozen=True)
class Neumann(Solver):
    """``x = step_size * sum_k (I - step_size (A + damping I))^k b``, cut off after `terms`.

    The residual of the partial sum is the next term itself, so it costs nothing. A series whose
    terms grow stops with the status ``DIVERGED`` and the best partial sum.

    Parameters
    ----------
    terms : int
        How many terms are summed at most. Given without `rtol` it is a budget: running out of it
        is no failure. The default number of 20 is nobody's budget: it is a failure where it
        leaves a residual above 0.1 ``||b||``.
    step_size : float, optional
        Must be below 2 / (largest eigenvalue). None: 1 where A = I - dT/dparams comes from a
        fixed point; else estimated by eight power iterations, which cost as many products, and
        halved whenever the residual grows all the same. Where it grows again and again, as with an
        indefinite matrix, the series has diverged.
    rtol : float, optional
        Stop when ``||r|| <= rtol ||b||``.
    damping : float
        The system solved is ``(A + damping I) x = b``.

    References
    ----------
    Lorraine, Vicol and Duvenaud, Optimizing millions of hyperparameters by implicit
    differentiation, 2020, algorithm 3.

    Examples
    --------
    >>> import torch, hypergrad
    >>> x, info = hypergrad.Neumann(terms=60).solve(lambda v: 5.0 * v, torch.ones(2))
    >>> torch.allclose(x, torch.full((2,), 0.2))
    True
    """

    terms: int = _TERMS
    step_size: float | None = None
    rtol: float | None = None
    damping: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("terms", self.terms, 1)
        at_least("rtol", self.rtol, 0.0)
        finite("damping", self.damping)
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive; got {self.step_size!r}.")

    def run(self, system: LinearSystem) -> Solution:
        """Sum the series until it is short enough, has grown, or the terms run out."""
        matvec = Counted(system.matvec, self.damping)
        scale = norm(system.b)
        present = (scale > 0) & torch.isfinite(scale)
        unit = torch.where(present, scale, torch.ones_like(scale))[..., None]
        b = system.b / unit
        tol = 0.0 if self.rtol is None else self.rtol
        looks = system.looks or bool(self.rtol)
        some = not looks or any_task(present)
        estimated = self.step_size is None and not system.contraction
        if estimated and some:
            step = _estimated_step(matvec, b)
        else:
            step = torch.full_like(b[..., :1], self.step_size or 1.0)
        x, residual = torch.zeros_like(b), b
        size = norm(b)
        if system.x0 is not None and some:
            x = torch.where(present[..., None], system.x0.to(b.dtype) / unit, x)
            residual = b - matvec(x)
            size = norm(residual)
        best, best_size = x, size
        highest = torch.full_like(scale, math.nan)
        active = present & (size > tol)
        diverged = negative = torch.zeros_like(present)
        halvings = torch.zeros_like(present, dtype=torch.int64)
        too_many = min(_HALVINGS, max(3, self.terms // 2))
        noise = 16 * torch.finfo(system.layout.precision).eps
        iterations = torch.zeros_like(present, dtype=torch.int64)
        for _ in range(self.terms):
            if looks and not any_task(active):
                break
            gain = torch.where(active[..., None], step * residual, torch.zeros_like(residual))
            x = x + gain
            image = matvec(gain)
            residual = residual - image
            negative = negative | (active & curves_down(gain, image))
            size_new = norm(residual)
            ratio = size_new / size
            if estimated:
                longer = active & (ratio > 1 + noise)
                step = torch.where(longer[..., None], step / 2, step)
                halvings = halvings + longer
            size = torch.where(active, size_new, size)
            better = active & (size < best_size)
            best = torch.where(better[..., None], x, best)
            best_size = torch.where(better, size, best_size)
            iterations = iterations + active
            grown = active & (~(size <= _GROWTH * best_size) | (halvings >= too_many))
            diverged = diverged | grown
            active = active & ~grown & (size > tol)
        final = b - matvec(best) if some else b
        size = torch.where(present, norm(final), torch.zeros_like(scale))
        growing = active & (size < norm(residual)) & (best_size >= 1)
        diverged = diverged | growing
        status = torch.where(active, int(Status.MAX_ITERATIONS), int(Status.CONVERGED))
        status = torch.where(diverged, int(Status.DIVERGED), status)
        sound = torch.isfinite(scale) & torch.isfinite(size)
        status = torch.where(sound, status, int(Status.NOT_FINITE))
        success = status == Status.CONVERGED
        if self.rtol is None:
            enough = size <= (_FAR if self.terms == _TERMS else math.inf)
            success = success | ((status == Status.MAX_ITERATIONS) & enough)
        x = torch.where(sound[..., None], best * unit, torch.full_like(best, math.nan))
        too_long = diverged & (halvings < too_many)
        if looks and any_task(too_long):
            highest = torch.where(too_long, largest_eigenvalue(matvec, residual), math.nan)
        low = torch.full_like(highest, math.nan)
        return Solution(
            x=x,
            status=status,
            success=success,
            iterations=iterations,
            matvecs=matvec.count,
            residual_norm=torch.where(sound, size, torch.full_like(size, math.nan)),
            negative_curvature=negative,
            method="Neumann",
            residual=final * unit,
            spectrum=lambda: torch.stack([low, highest], dim=-1),
        )


def _estimated_step(matvec: Counted, b: Tensor) -> Tensor:
    """A step size ``(*tasks, 1)`` below 2 / (largest eigenvalue that `b` can excite)."""
    largest = largest_eigenvalue(matvec, b)[..., None]
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, 1 / (_SAFETY * largest), torch.ones_like(largest))


def largest_eigenvalue(matvec: Counted, v: Tensor) -> Tensor:
    """The largest modulus of an eigenvalue, seen from below by a power iteration from `v`."""
    largest = torch.zeros_like(v[..., 0])
    for _ in range(_POWER_STEPS):
        v = matvec(v / norm(v).clamp(min=torch.finfo(v.dtype).tiny)[..., None])
        largest = torch.maximum(largest, norm(v))
    return largest
