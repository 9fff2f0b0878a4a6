"""The default solver: what suits the matrix, and what to try when that fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task, every_task
from .._info import Status
from ._base import (
    LinearSystem,
    NewtonStep,
    Solution,
    Solver,
    at_least,
    check_symmetry,
    finite,
    norm,
    tolerance,
)
from ._bicgstab import BiCGSTAB
from ._cg import CG
from ._diagonal import solve_diagonal
from ._exact import Exact, free_gib, gib_needed
from ._gmres import GMRES
from ._iterative import Iterative
from ._minres import MINRES
from ._normal import LSMR
from ._units import probed

_STUCK = (Status.STAGNATED, Status.BREAKDOWN, Status.SINGULAR)
_INDEFINITE = (Status.NEGATIVE_CURVATURE, Status.SINGULAR)
# Up to so many times `dense_below` unknowns ...
_CHECKED = 6  # ... an iterative answer must be about as good as a dense one, and
_LAST_RESORT = 50  # ... a factorisation comes after an iteration that is too slow.
_SMALL = 3  # ... a factorisation costs less than a second iteration.
# Above so many unknowns a default solve has a budget: by measurement on a model of 25 million
# unknowns about as long as 60 gradients.
_LARGE = 1_000_000
_BUDGET = 20
_PATIENCE = 16  # n / 16 iterations cost less than a factorisation, by measurement


@dataclasses.dataclass(frozen=True)
class Auto(Solver):
    """The default: a dense factorisation of small systems, and an iteration for the rest.

    Up to `dense_below` unknowns it is `Exact`, if the memory holds the matrix: or up to three times
    as many where A is not symmetric, and times the number of right-hand sides that share a matrix.
    Above that it is `CG` where A is symmetric, and `MINRES` for the tasks in which CG met negative
    curvature or a singular direction. Where A is not symmetric, or `Solver.solve` was not told, it
    is `GMRES`, and `BiCGSTAB` for the tasks in which GMRES got stuck; then `LSMR`, if products with
    the transpose are at hand.

    Where A is not symmetric, two products notice that it is diagonal, of equations that do not know
    of each other; then nothing is iterated.

    Up to 50 times `dense_below` unknowns an iteration that would cost more than a factorisation is
    given up for one: after n / 16 iterations, or three times as many where they lead to the end.
    With `rtol` left out there is more care up to six times `dense_below`: an iteration goes on to
    a smaller residual, and `Exact` takes over where that residual, times the condition number
    that the iteration has seen, leaves less than five digits in float64 (three in float32).
    A `maxiter` of the caller's switches all this off. Above a million unknowns there is a budget of
    20 iterations of the first method: where they end above ten times the tolerance, the status says
    so, and the answer is no success.

    ``info.method`` names the method, or says what was tried: "Auto: CG, then MINRES". Products
    and iterations are those of all methods together.

    Parameters
    ----------
    maxiter, rtol, atol, damping
        As in every iterative solver; `maxiter` holds for each method that is tried.
    dense_below : int
        Most unknowns for which the matrix is formed at once; 0: never a dense matrix.

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
    dense_below: int = 100

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
        shared = system.shared if tasks else 1
        fits = gib_needed(n, tasks // shared, system.b) <= free_gib(system.b.device)
        fits = fits and n <= _LAST_RESORT * self.dense_below
        if fits and n <= self.dense_below * shared * (1 if system.symmetric else _SMALL):
            return Exact(damping=self.damping).run(system)
        if n > _LARGE and self.maxiter is None:
            return self._within_budget(system)
        looks = system.looks or self.rtol != 0
        if looks and self.maxiter is None and not system.symmetric:
            found, used = solve_diagonal(
                system, rtol=self.rtol, atol=self.atol, damping=self.damping
            )
            if found is None:
                found = self._iterations(system, fits, looks, shared)
                found.matvecs += used
            return found
        return self._iterations(system, fits, looks, shared)

    def _iterations(self, system: LinearSystem, fits: bool, looks: bool, shared: int) -> Solution:
        """An iteration, or several, and a factorisation where that is cheaper."""
        n = system.b.shape[-1]
        if fits and looks and self.maxiter is None:
            return self._patiently(system, max(n // (_PATIENCE * shared), 2))
        # What follows the first method, and after which ends of those before it.
        then: list[tuple[Solver, Sequence[Status]]] = []
        if system.symmetric:
            then.append((self._iterated(MINRES), _INDEFINITE))
        else:
            slow = (*_STUCK, Status.MAX_ITERATIONS)
            then.append((self._iterated(BiCGSTAB), slow))
            if system.rmatvec is not None:
                then.append((self._iterated(LSMR), slow))
        return self._in_turn(system, self._iterated(CG if system.symmetric else GMRES), then)

    def _within_budget(self, system: LinearSystem) -> Solution:
        """One method, for as long as the budget lasts; what it has left undone is no success."""
        found = self._iterated(CG if system.symmetric else GMRES, maxiter=_BUDGET).run(system)
        near = found.residual_norm <= 10 * tolerance(self.rtol, system.layout.precision)
        found.success = found.success & ((found.status == Status.CONVERGED) | near)
        return found

    def _iterated(self, method: type[Iterative], **fields: Any) -> Iterative:
        given = {name: getattr(self, name) for name in ("maxiter", "rtol", "atol", "damping")}
        return method(**{**given, **fields})

    def _patiently(self, system: LinearSystem, patience: int) -> Solution:
        """Iterations for as long as they are cheaper than a factorisation, which comes last."""
        n, precision = system.b.shape[-1], system.layout.precision
        small = n <= _SMALL * self.dense_below
        checked = self.rtol is None and n <= _CHECKED * self.dense_below
        rtol, bound = tolerance(self.rtol, precision), math.inf
        if checked:
            bound = 10 * rtol
            rtol = rtol / (100 if precision == torch.float64 else 10)

        def attempt(method: type[Iterative], system: LinearSystem) -> Solution:
            steps = patience // 2 + 1 if method is BiCGSTAB else patience
            found = self._iterated(method, maxiter=steps, rtol=rtol).run(system)
            slow = found.status == Status.MAX_ITERATIONS
            goal = (self.atol / norm(system.b)).clamp(min=rtol)
            hopeless = slow & ~(2.5 * found.residual_norm.log() <= goal.log())
            seen = _condition(found) if checked else None
            if any_task(slow) and not any_task(hopeless):
                further = self._iterated(method, maxiter=2 * steps, rtol=rtol)
                again = further.run(_only(system, slow, x0=found.x))
                found = _merged(found, again, slow)
                if seen is not None:
                    seen = torch.where(slow, seen.fmax(_condition(again)), seen)
            if seen is not None:
                found.success = found.success & ~(seen * found.residual_norm > bound)
            if system.condition is not None and any_task(found.success):
                found.probe = probed(system, found, self.damping)
                if found.probe is not None:
                    found.success = found.success & ~found.probe.hides
            return found

        found, used = attempt(CG if system.symmetric else GMRES, system), []
        used.append("CG" if system.symmetric else "GMRES")
        second, worth = (MINRES, _INDEFINITE) if system.symmetric else (BiCGSTAB, _STUCK)
        failed = ~found.success & _one_of(found.status, worth)
        if any_task(failed) and not (small if system.symmetric else checked):
            found = _merged(found, attempt(second, _only(system, failed)), failed)
            used.append(second.__name__)
        failed = ~found.success & (found.status != Status.NOT_FINITE)
        if not checked:  # a singular value decomposition of a large matrix takes minutes
            failed = failed & (found.status != Status.SINGULAR)
        if any_task(failed):
            exact = Exact(damping=self.damping).run(_only(system, failed))
            found = _merged(found, exact, failed)
            used.append("Exact")
        if len(used) > 1:
            found.method = f"Auto: {', then '.join(used)}"
        return found

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
            found = _merged(found, solver.run(_only(system, failed)), failed)
            used.append(type(solver).__name__)
        if len(used) > 1:
            found.method = f"Auto: {', then '.join(used)}"
        return found


def _only(system: LinearSystem, wanted: Tensor, **changes: Any) -> LinearSystem:
    """The system for some of the tasks: a right-hand side of zero takes no part."""
    b = torch.where(wanted[..., None], system.b, torch.zeros_like(system.b))
    return dataclasses.replace(system, b=b, **changes)


def _condition(found: Solution) -> Tensor:
    """The condition number that a method has seen; infinite where it has seen nothing."""
    if found.condition_number is not None:
        return found.condition_number().nan_to_num(nan=math.inf)
    low, high = found.eigenvalues.unbind(dim=-1)
    return (high / low).nan_to_num(nan=math.inf)


def _one_of(status: Tensor, wanted: Sequence[Status]) -> Tensor:
    found = torch.zeros_like(status, dtype=torch.bool)
    for one in wanted:
        found = found | (status == one)
    return found


def _merged(before: Solution, after: Solution, failed: Tensor) -> Solution:
    """The later answer where it was asked for and is no worse; what both of them have cost."""
    closer = ~(after.residual_norm > before.residual_norm) & (after.status != Status.NOT_FINITE)
    taken = failed & (after.success | closer)

    def spectrum() -> Tensor:
        lowest = torch.fmin(before.eigenvalues, after.eigenvalues)[..., :1]
        highest = torch.fmax(before.eigenvalues, after.eigenvalues)[..., 1:]
        return torch.cat([lowest, highest], dim=-1)

    return Solution(
        x=torch.where(taken[..., None], after.x, before.x),
        status=torch.where(taken, after.status, before.status),
        success=torch.where(taken, after.success, before.success),
        iterations=before.iterations + after.iterations,
        matvecs=before.matvecs + after.matvecs,
        residual_norm=torch.where(taken, after.residual_norm, before.residual_norm),
        negative_curvature=before.negative_curvature | after.negative_curvature,
        method=before.method,
        spectrum=spectrum,
        residual=_later(taken, before.residual, after.residual, missing=0.0),
        null=_later(taken, before.null, after.null, missing=0.0),
        linear_error=_later(taken, before.linear_error, after.linear_error),
        newton=_later_step(taken, before.newton, after.newton),
        metric=_later(taken, before.metric, after.metric, missing=1.0),
        further=_further(taken, before, after),
    )


def _later(
    taken: Tensor, before: Tensor | None, after: Tensor | None, missing: float = math.nan
) -> Tensor | None:
    """A figure, or a vector, of whichever answer each task has."""
    known = before if after is None else after
    if known is None:
        return None
    absent = torch.full_like(known, missing)
    taken = taken if known.ndim == taken.ndim else taken[..., None]
    return torch.where(
        taken, absent if after is None else after, absent if before is None else before
    )


def _later_step(
    taken: Tensor, before: NewtonStep | None, after: NewtonStep | None
) -> NewtonStep | None:
    if before is None or after is None:
        known = after if before is None else before
        return known if known is None or every_task(taken == (before is None)) else None
    wide = taken[..., None]
    return NewtonStep(
        step=torch.where(wide, after.step, before.step),
        left=torch.where(wide, after.left, before.left),
        beyond=torch.where(taken, after.beyond, before.beyond),
        again=after.again if every_task(taken) else None,
    )


def _further(taken: Tensor, before: Solution, after: Solution) -> Callable[[Tensor], Tensor] | None:
    """The inverse of the later answer, where every task has that."""
    return after.further if every_task(taken) else None


def _named(word: Any) -> str:
    """The class that a word stands for, as far as one does."""
    from . import __all__ as names

    bare = str(word).lower().replace("-", "").replace("_", "")
    return next((name for name in names[:-2] if name.lower() == bare), "CG")


def choose(solver: Solver | None, symmetric: bool) -> Solver:
    """`solver`, or where it is None the default, if it suits the matrix."""
    chosen = Auto() if solver is None else solver
    if not isinstance(chosen, Solver):
        name = chosen.__name__ if isinstance(chosen, type) else _named(chosen)
        raise TypeError(
            f"solver must be a linear solver such as {name}(), or None; got {chosen!r}. An inner "
            "solver has no place here: its solution is passed as params."
        )
    check_symmetry(chosen, symmetric)
    return chosen
