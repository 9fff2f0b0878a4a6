"""The default solver: what suits the matrix, and what to try when that fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .._info import Status
from .._transforms import any_task
from ._base import (
    Iterative,
    LinearSystem,
    Solution,
    Solver,
    at_least,
    check_symmetry,
    finite,
)
from ._bicgstab import BiCGSTAB
from ._cg import CG
from ._exact import Exact, free_gib, gib_needed
from ._gmres import GMRES
from ._minres import MINRES
from ._normal import LSMR

_SLOW = (Status.MAX_ITERATIONS, Status.STAGNATED, Status.BREAKDOWN)
_LAST_RESORT = 8  # times `dense_below`, where the iterations have cost more than the matrix would


@dataclasses.dataclass(frozen=True)
class Auto(Solver):
    """The default: a dense factorisation of small systems, and an iteration for the rest.

    Up to `dense_below` unknowns, where the memory holds the matrix, it is `Exact`. Above that it
    is `CG` where A is symmetric, and `MINRES` for the tasks in which CG met negative curvature or
    a singular direction. Where A is not symmetric, or `Solver.solve` was not told, it is `GMRES`,
    and `BiCGSTAB` for the tasks in which GMRES got stuck; then `LSMR`, if products with the
    transpose are at hand. Where the iterations ran out or stagnated, without a `maxiter` of the
    caller's, the last resort is `Exact`, up to eight times `dense_below` unknowns.

    ``info.method`` names the method, or says what was tried: "Auto: CG, then MINRES". Products
    and iterations are those of all methods together.

    Parameters
    ----------
    maxiter, rtol, atol, damping
        As in every iterative solver; `maxiter` holds for each method that is tried.
    dense_below : int
        Most unknowns for which the matrix is formed at once.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[2.0, 1.0], [-1.0, 3.0]], dtype=torch.float64)
    >>> x, info = hypergrad.Auto().solve(lambda v: A @ v, A.sum(dim=1))
    >>> torch.allclose(x, torch.ones(2, dtype=torch.float64)), info.method
    (True, 'Exact')
    """

    maxiter: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    damping: float = 0.0
    dense_below: int = 512

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("maxiter", self.maxiter, 1)
        at_least("rtol", self.rtol, 0.0)
        at_least("atol", self.atol, 0.0)
        finite("damping", self.damping)
        at_least("dense_below", self.dense_below, 0)

    def run(self, system: LinearSystem) -> Solution:
        """Solve with the first method that suits, and again where it failed."""
        n, tasks = system.b.shape[-1], math.prod(system.b.shape[:-1])
        exact = Exact(damping=self.damping)
        fits = gib_needed(n, tasks, system.b) <= free_gib(system.b.device)
        if fits and n <= self.dense_below:
            return exact.run(system)

        def iterated(method: type[Iterative]) -> Iterative:
            return method(
                maxiter=self.maxiter, rtol=self.rtol, atol=self.atol, damping=self.damping
            )

        # What follows the first method, and after which ends of those before it.
        then: list[tuple[Solver, Sequence[Status]]] = []
        if system.symmetric:
            then.append((iterated(MINRES), (Status.NEGATIVE_CURVATURE, Status.SINGULAR)))
        else:
            then.append((iterated(BiCGSTAB), (*_SLOW, Status.SINGULAR)))
            if system.rmatvec is not None:
                then.append((iterated(LSMR), (*_SLOW, Status.SINGULAR)))
        if fits and n <= _LAST_RESORT * self.dense_below and self.maxiter is None:
            then.append((exact, _SLOW))
        return self._in_turn(system, iterated(CG if system.symmetric else GMRES), then)

    def _in_turn(
        self,
        system: LinearSystem,
        first: Solver,
        then: Sequence[tuple[Solver, Sequence[Status]]],
    ) -> Solution:
        """The methods one after another, each for the tasks that are still unsolved."""
        looks = system.looks or self.rtol != 0
        found, used = first.run(system), [type(first).__name__]
        for solver, worth in then:
            failed = ~found.success & _one_of(found.status, worth)
            if not looks or not any_task(failed):
                continue
            # A right-hand side of zero takes no part.
            b = torch.where(failed[..., None], system.b, torch.zeros_like(system.b))
            found = _merged(found, solver.run(dataclasses.replace(system, b=b)), failed)
            used.append(type(solver).__name__)
        if len(used) > 1:
            found.method = f"Auto: {', then '.join(used)}"
        return found


def _one_of(status: Tensor, wanted: Sequence[Status]) -> Tensor:
    found = torch.zeros_like(status, dtype=torch.bool)
    for one in wanted:
        found = found | (status == one)
    return found


def _merged(before: Solution, after: Solution, failed: Tensor) -> Solution:
    """The later answer where it was asked for and is no worse; what both of them have cost."""
    closer = ~(after.residual_norm > before.residual_norm) & (after.status != Status.NOT_FINITE)
    taken = failed & (after.success | closer)
    lowest = torch.fmin(before.eigenvalues, after.eigenvalues)[..., :1]
    highest = torch.fmax(before.eigenvalues, after.eigenvalues)[..., 1:]
    return Solution(
        x=torch.where(taken[..., None], after.x, before.x),
        status=torch.where(taken, after.status, before.status),
        success=torch.where(taken, after.success, before.success),
        iterations=before.iterations + after.iterations,
        matvecs=before.matvecs + after.matvecs,
        residual_norm=torch.where(taken, after.residual_norm, before.residual_norm),
        negative_curvature=before.negative_curvature | after.negative_curvature,
        eigenvalues=torch.cat([lowest, highest], dim=-1),
        method=before.method,
        inverse=_later(taken, before.inverse, after.inverse),
        newton=_later(taken, before.newton, after.newton),
        largest=_later(taken, before.largest, after.largest),
    )


def _later(taken: Tensor, before: Tensor | None, after: Tensor | None) -> Tensor | None:
    if before is None and after is None:
        return None
    nan = torch.full(taken.shape, math.nan, device=taken.device)
    return torch.where(taken, nan if after is None else after, nan if before is None else before)


def choose(solver: Solver | None, symmetric: bool) -> Solver:
    """`solver`, or where it is None the default, if it suits the matrix."""
    chosen = Auto() if solver is None else solver
    check_symmetry(chosen, symmetric)
    return chosen
