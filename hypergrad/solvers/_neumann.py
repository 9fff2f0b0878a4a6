"""The Neumann series."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import Status
from ._base import Solver
from ._fields import at_least, finite
from ._krylov import curves_down
from ._system import Counted, LinearSystem, Solution, Units, graded
from ._vectors import norm
from ._watch import Callback, Watched

_TERMS = 20
_FAR = 0.1  # a residual above it is none that a caller who named no budget has in mind
_POWER_STEPS = 8
_SAFETY = 1.5  # a power iteration sees the largest eigenvalue from below
_GROWTH = 10.0  # a residual that has grown by this much is not a transient
_HALVINGS = 5  # so often no estimate of a largest eigenvalue is too low: no step is short enough


@dataclasses.dataclass(frozen=True)
class Neumann(Watched, Solver):
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
    callback, progress
        As in every iterative solver, after each term.

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
    callback: Callback | None = dataclasses.field(default=None, kw_only=True, repr=False)
    progress: bool = dataclasses.field(default=False, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        at_least("terms", self.terms, 1)
        at_least("rtol", self.rtol, 0.0)
        finite("damping", self.damping)
        if self.step_size is not None and not self.step_size > 0:
            raise ValueError(f"step_size must be positive; got {self.step_size!r}.")

    def run(self, system: LinearSystem) -> Solution:
        """Sum the series until it is short enough, has grown, or the terms run out."""
        series = _Series(self, system)
        for _ in range(self.terms):
            if series.looks and not any_task(series.active):
                break
            series.add()
            if system.watch is not None:
                system.watch.tell(series.size)
        return series.solution()


class _Series:
    """The partial sums of each task: Lorraine, Vicol and Duvenaud (2020), algorithm 3."""

    def __init__(self, solver: Neumann, system: LinearSystem) -> None:
        self.solver, self.units = solver, Units(system.b)
        self.matvec = Counted(system.matvec, solver.damping)
        self.looks = system.looks or bool(solver.rtol)
        self.tol = solver.rtol or 0.0
        b, present = self.units.b, self.units.present
        self.some = not self.looks or any_task(present)
        self.estimated = solver.step_size is None and not system.contraction
        if self.estimated and self.some:
            self.step = _estimated_step(self.matvec, b)
        else:
            self.step = torch.full_like(b[..., :1], solver.step_size or 1.0)
        self.x, self.residual = torch.zeros_like(b), b
        if system.x0 is not None and self.some:
            self.x = self.units.start(system.x0)
            self.residual = b - self.matvec(self.x)
        self.best, self.size = self.x, norm(self.residual)
        self.best_size = self.size
        self.active = present & (self.size > self.tol)
        self.diverged = self.negative = torch.zeros_like(present)
        self.iterations = self.halvings = torch.zeros_like(present, dtype=torch.int64)
        self.too_many = min(_HALVINGS, max(3, solver.terms // 2))
        self.noise = 16 * torch.finfo(system.layout.precision).eps

    def add(self) -> None:
        """Add a term, which is the residual so far times the step size."""
        active = self.active
        gain = torch.where(active[..., None], self.step * self.residual, 0.0)
        self.x = self.x + gain
        image = self.matvec(gain)
        self.residual = self.residual - image
        self.negative = self.negative | (active & curves_down(gain, image))
        size = norm(self.residual)
        if self.estimated:
            longer = active & (size / self.size > 1 + self.noise)
            self.step = torch.where(longer[..., None], self.step / 2, self.step)
            self.halvings = self.halvings + longer
        self.size = torch.where(active, size, self.size)
        better = active & (self.size < self.best_size)
        self.best = torch.where(better[..., None], self.x, self.best)
        self.best_size = torch.where(better, self.size, self.best_size)
        self.iterations = self.iterations + active
        grown = ~(self.size <= _GROWTH * self.best_size) | (self.halvings >= self.too_many)
        self.diverged = self.diverged | (active & grown)
        self.active = active & ~grown & (self.size > self.tol)

    def solution(self) -> Solution:
        """Measure the residual of the best sum, and say how the series ended."""
        units, best = self.units, self.best
        final = units.b - self.matvec(best) if self.some else units.b
        size = torch.where(units.present, norm(final), 0.0)
        growing = self.active & (size < norm(self.residual)) & (self.best_size >= 1)
        diverged = self.diverged | growing
        ends = {Status.MAX_ITERATIONS: self.active, Status.DIVERGED: diverged}
        status = graded({**ends, Status.NOT_FINITE: ~torch.isfinite(size)})
        x, status, size = units.settled(best * units.unit, status, size)
        success = status == Status.CONVERGED
        if self.solver.rtol is None:
            enough = size <= (_FAR if self.solver.terms == _TERMS else math.inf)
            success = success | ((status == Status.MAX_ITERATIONS) & enough)
        highest = low = torch.full_like(size, math.nan)
        too_long = diverged & (self.halvings < self.too_many)
        if self.looks and any_task(too_long):
            highest = torch.where(too_long, largest_eigenvalue(self.matvec, self.residual), low)
        return Solution(
            x=x,
            status=status,
            success=success,
            iterations=self.iterations,
            matvecs=self.matvec.count,
            residual_norm=size,
            negative_curvature=self.negative,
            method="Neumann",
            residual=final * units.unit,
            spectrum=lambda: torch.stack([low, highest], dim=-1),
        )


def _estimated_step(matvec: Counted, b: Tensor) -> Tensor:
    """Estimate a step size ``(*tasks, 1)`` below 2 / (largest eigenvalue that `b` can excite)."""
    largest = largest_eigenvalue(matvec, b)[..., None]
    usable = (largest > 0) & torch.isfinite(largest)
    return torch.where(usable, 1 / (_SAFETY * largest), torch.ones_like(largest))


def largest_eigenvalue(matvec: Counted, v: Tensor) -> Tensor:
    """Find the largest modulus of an eigenvalue, seen from below by a power iteration from `v`."""
    largest = torch.zeros_like(v[..., 0])
    for _ in range(_POWER_STEPS):
        v = matvec(v / norm(v).clamp(min=torch.finfo(v.dtype).tiny)[..., None])
        largest = torch.maximum(largest, norm(v))
    return largest
