"""The default solver: a method that suits the matrix, and others to try when it fails."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task, every_task
from .._autograd.shards import is_shards
from .._info import Status
from ._base import Solver, check_symmetry
from ._bicgstab import BiCGSTAB
from ._cg import CG
from ._diagonal import solve_diagonal
from ._exact import Exact, free_gib, gib_needed
from ._fields import at_least, tolerance
from ._gmres import GMRES
from ._krylov import Iterative, Limited
from ._minres import MINRES
from ._normal import LSMR
from ._probe import probed
from ._recycle import Memory, refuse_recycling
from ._ritz import widest
from ._system import LinearSystem, NewtonStep, Solution
from ._vectors import norm

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
_SHARE = 0.5  # of it for a second method, whose steps take longer
# n / 16 iterations, or n / (15 + k) of k right-hand sides together, cost less than a factorisation,
_PATIENCE = 16  # by measurement.


@dataclasses.dataclass(frozen=True)
class Auto(Limited):
    """The default: a dense factorisation of small systems, and an iteration for the rest.

    Up to `dense_below` unknowns it is `Exact`, if the memory holds the matrix: or up to three times
    as many where A is not symmetric, and times the number of right-hand sides that share a matrix
    (of a symmetric one up to six times as many unknowns, or two for each right-hand side; above
    that they are solved in a block).
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
    20 iterations, `MINRES` taking over from `CG` for half of what is left: where they end
    above ten times the tolerance, the status says so, and the answer is no success.

    ``info.method`` names the method, or says what was tried: "Auto: CG, then MINRES". Products
    and iterations are those of all methods together.

    Parameters
    ----------
    maxiter, rtol, atol, damping, callback, progress
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

    dense_below: int = 100

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        at_least("dense_below", self.dense_below, 0)

    def run(self, system: LinearSystem) -> Solution:
        """Solve with the first method that suits, and again where it failed."""
        n = system.b.shape[-1]
        if self.factorises(system):
            return Exact(damping=self.damping).run(system)
        if n > _LARGE and self.maxiter is None:
            return self._within_budget(system)
        looks = system.looks or self.rtol != 0
        used = 0
        if looks and self.maxiter is None and not (system.symmetric or is_shards(system.b)):
            solution, used = solve_diagonal(
                system, rtol=self.rtol, atol=self.atol, damping=self.damping
            )
            if solution is not None:
                return solution
        solution = self._iterations(system, looks)
        solution.matvecs += used
        return solution

    def factorises(self, system: LinearSystem) -> bool:
        """Say whether a system is factorised at once.

        Parameters
        ----------
        system : LinearSystem
            What is solved.

        Returns
        -------
        factorises : bool
            Whether it has few unknowns, for its number of right-hand sides.
        """
        n, shared = system.b.shape[-1], _sharing(system)
        most = self.dense_below * shared * (1 if system.symmetric else _SMALL)
        if shared > 1 and system.symmetric:  # a block of them takes few iterations
            most = min(most, max(_CHECKED * self.dense_below, 2 * shared))
        return n <= most and self._fits(system)

    def _fits(self, system: LinearSystem) -> bool:
        """Say whether a factorisation is possible, and worth a thought."""
        n, tasks = system.b.shape[-1], math.prod(system.b.shape[:-1])
        fits = n <= _LAST_RESORT * self.dense_below and not is_shards(system.b)
        fits = fits and not system.noisy  # an iteration needs fewer products, and is as good
        needed = gib_needed(n, tasks // _sharing(system), system.b)
        return fits and needed <= free_gib(system.b.device)

    def _iterations(self, system: LinearSystem, looks: bool) -> Solution:
        """Iterate, once or several times, and a factorisation where that is cheaper."""
        n, shared, fits = system.b.shape[-1], _sharing(system), self._fits(system)
        if fits and looks and self.maxiter is None:
            return self._patiently(system, max(n // (_PATIENCE - 1 + shared), 2))
        slow = (*_STUCK, Status.MAX_ITERATIONS)
        # The methods after the first, each with the ends that call for it.
        then: Sequence[tuple[type[Iterative], Sequence[Status]]] = [(MINRES, _INDEFINITE)]
        if not system.symmetric:
            then = [(BiCGSTAB, slow), (LSMR, slow)][: 1 if system.rmatvec is None else 2]
        first = _first(system)
        solution, used = self._iterated(first).run(system), [first.__name__]
        for method, worth in then:
            failed = ~solution.success & _one_of(solution.status, worth)
            if looks and any_task(failed):
                further = self._iterated(method).run(_only(system, failed))
                solution = _merged(solution, further, failed)
                used.append(method.__name__)
        return _said(solution, used)

    def _within_budget(self, system: LinearSystem) -> Solution:
        """Iterate for as long as the budget lasts; an unfinished run is no success."""
        first = _first(system)
        solution = self._iterated(first, maxiter=_BUDGET).run(system)
        taken = int(solution.iterations.max()) if solution.iterations.numel() else _BUDGET
        left = int(_SHARE * (_BUDGET - taken))
        failed = ~solution.success & _one_of(solution.status, _INDEFINITE)
        if system.symmetric and system.looks and left > 0 and any_task(failed):
            further = self._iterated(MINRES, maxiter=left).run(_only(system, failed))
            # Of a minimum the curvature is what is at fault, and not the budget.
            unfinished = further.status == Status.MAX_ITERATIONS
            further.status = torch.where(unfinished, solution.status, further.status)
            solution = _said(_merged(solution, further, failed), [first.__name__, "MINRES"])
        near = solution.residual_norm <= 10 * tolerance(self.rtol, system.layout.precision)
        solution.success = solution.success & ((solution.status == Status.CONVERGED) | near)
        return solution

    def _iterated(self, method: type[Iterative], **fields: Any) -> Iterative:
        mine = {field.name: getattr(self, field.name) for field in dataclasses.fields(Limited)}
        return method(**{**mine, **fields})

    def _patiently(self, system: LinearSystem, patience: int) -> Solution:
        """Iterate for as long as that is cheaper than a factorisation, which comes last."""
        n, precision = system.b.shape[-1], system.layout.precision
        small = n <= _SMALL * self.dense_below
        checked = self.rtol is None and n <= _CHECKED * self.dense_below
        rtol, bound = tolerance(self.rtol, precision), math.inf
        if checked:
            bound = 10 * rtol
            rtol = rtol / (100 if precision == torch.float64 else 10)

        def attempt(method: type[Iterative], system: LinearSystem) -> Solution:
            steps = patience // 2 + 1 if method is BiCGSTAB else patience
            solution = self._iterated(method, maxiter=steps, rtol=rtol).run(system)
            slow = solution.status == Status.MAX_ITERATIONS
            goal = (self.atol / norm(system.b)).clamp(min=rtol)
            hopeless = slow & ~(2.5 * solution.residual_norm.log() <= goal.log())
            seen = _condition(solution) if checked else None
            if any_task(slow) and not any_task(hopeless):
                further = self._iterated(method, maxiter=2 * steps, rtol=rtol)
                again = further.run(_only(system, slow, x0=solution.x))
                solution = _merged(solution, again, slow)
                if seen is not None:
                    seen = torch.where(slow, seen.fmax(_condition(again)), seen)
            if seen is not None:
                solution.success = solution.success & ~(seen * solution.residual_norm > bound)
            if system.condition is not None and any_task(solution.success):
                solution.probe = probed(system, solution, self.damping)
                if solution.probe is not None:
                    solution.success = solution.success & ~solution.probe.hides
            return solution

        first = _first(system)
        solution, used = attempt(first, system), [first.__name__]
        second, worth = (MINRES, _INDEFINITE) if system.symmetric else (BiCGSTAB, _STUCK)
        failed = ~solution.success & _one_of(solution.status, worth)
        if any_task(failed) and not (small if system.symmetric else checked):
            solution = _merged(solution, attempt(second, _only(system, failed)), failed)
            used.append(second.__name__)
        failed = ~solution.success & (solution.status != Status.NOT_FINITE)
        if not checked:  # a singular value decomposition of a large matrix takes minutes
            failed = failed & (solution.status != Status.SINGULAR)
        if any_task(failed):
            exact = Exact(damping=self.damping).run(_only(system, failed))
            solution = _merged(solution, exact, failed)
            used.append("Exact")
        return _said(solution, used)


def _sharing(system: LinearSystem) -> int:
    """Count the right-hand sides that share a matrix."""
    return system.shared if system.b[..., :1].numel() else 1


def _first(system: LinearSystem) -> type[Iterative]:
    """Choose the method that comes first."""
    return CG if system.symmetric else GMRES


def _said(solution: Solution, used: Sequence[str]) -> Solution:
    """Say which methods were tried, where it was more than one."""
    if len(used) > 1:
        solution.method = f"Auto: {', then '.join(used)}"
    return solution


def _only(system: LinearSystem, wanted: Tensor, **changes: Any) -> LinearSystem:
    """Keep the system for some of the tasks: a right-hand side of zero takes no part."""
    b = torch.where(wanted[..., None], system.b, 0.0)
    return dataclasses.replace(system, b=b, **changes)


def _condition(solution: Solution) -> Tensor:
    """Take the condition number that a method has seen; infinite where it has seen nothing."""
    if solution.condition_number is not None:
        return solution.condition_number().nan_to_num(nan=math.inf)
    low, high = solution.eigenvalues.unbind(dim=-1)
    return (high / low).nan_to_num(nan=math.inf)


def _one_of(status: Tensor, wanted: Sequence[Status]) -> Tensor:
    return torch.stack([status == one for one in wanted]).any(dim=0)


def _merged(before: Solution, after: Solution, failed: Tensor) -> Solution:
    """Take the later answer where it was asked for and is no worse; add up their costs."""
    closer = ~(after.residual_norm > before.residual_norm) & (after.status != Status.NOT_FINITE)
    taken = failed & (after.success | closer)
    return Solution(
        x=torch.where(taken[..., None], after.x, before.x),
        status=torch.where(taken, after.status, before.status),
        success=torch.where(taken, after.success, before.success),
        iterations=before.iterations + after.iterations,
        matvecs=before.matvecs + after.matvecs,
        residual_norm=torch.where(taken, after.residual_norm, before.residual_norm),
        negative_curvature=before.negative_curvature | after.negative_curvature,
        method=before.method,
        spectrum=widest(lambda: before.eigenvalues, lambda: after.eigenvalues),
        residual=_later(taken, before.residual, after.residual, missing=0.0),
        null=_later(taken, _own(before, before.null), _own(before, after.null), 0.0),
        linear_error=_later(taken, before.linear_error, after.linear_error),
        newton=_later_step(taken, before.newton, after.newton),
        metric=_later(taken, _own(before, before.metric), _own(before, after.metric), 1.0),
        further=after.further if every_task(taken) else None,
    )


def _later(
    taken: Tensor, before: Tensor | None, after: Tensor | None, missing: float = math.nan
) -> Tensor | None:
    """Take a figure, or a vector, of whichever answer each task has."""
    known = before if after is None else after
    if known is None:
        return None
    taken = taken if known.ndim == taken.ndim else taken[..., None]
    absent = torch.full_like(known, missing)
    one, other = (absent if v is None else v for v in (after, before))
    return torch.where(taken, one, other)


def _own(solution: Solution, vector: Tensor | None) -> Tensor | None:
    """Give every right-hand side the vector that those of one matrix have in common."""
    return None if vector is None else vector.expand_as(solution.x)


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


def _named(word: Any) -> str:
    """Find the class that a word stands for, as far as one does."""
    from . import __all__ as names

    bare = str(word).lower().replace("-", "").replace("_", "")
    bases = ("Iteration", "LinearSystem", "Solution", "Solver", "choose")
    return next((name for name in names if name not in bases and name.lower() == bare), "CG")


def choose(solver: Solver | None, symmetric: bool, memory: Memory | None = None) -> Solver:
    """Take `solver`, or where it is None the default, if it suits the matrix and the loop."""
    chosen = Auto() if solver is None else solver
    if not isinstance(chosen, Solver):
        name = chosen.__name__ if isinstance(chosen, type) else _named(chosen)
        text = f"solver must be a linear solver such as {name}(), or None; got {chosen!r}. "
        if callable(chosen) and not isinstance(chosen, type):
            text += (
                "A method of your own is a frozen dataclass derived from hypergrad.solvers.Solver "
                "whose run(system) returns a Solution(x): see the page 'extending' of the "
                "documentation (docs/extending.md). "
            )
        raise TypeError(
            f"{text}An inner solver has no place here: its solution is passed as params."
        )
    check_symmetry(chosen, symmetric)
    if memory is None:
        refuse_recycling(chosen)
    return chosen
