"""The base of the Krylov methods: their fields, the passes of an iteration, the judgement."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._autograd.branches import traced
from .._autograd.double_backward import advice
from .._autograd.host import any_task, every_task
from .._autograd.rows import by_rows
from .._autograd.trace import versions
from .._autograd.transforms import transforms_active
from .._errors import UnsupportedOperation
from .._info import Status
from ._base import Solver
from ._factorisation import signs
from ._fields import at_least, finite, tolerance
from ._ritz import widest
from ._system import MOST_NOISE, Counted, LinearSystem, Solution, Units, graded
from ._vectors import Product, norm
from ._watch import Callback, Watch, Watched

if TYPE_CHECKING:
    from ._observer import Observer

# Where a singular system has no solution, residuals can be bought with answers of any length:
# the answer is then the iterate with the least ||r|| + PRICE ||A|| ||x||.
PRICE = 1e-4
#: An answer that came in so few steps may have left much of the spectrum unseen.
FEW = 4
AROUND = 12  # ... and in so many more it is seen
#: What is so many times as large as rounding may be is none.
SURE = 100
_OFF = 1e-3  # the part of a right-hand side that a start off zero explains
#: Curvature that is so many roundings of the largest below zero is negative.
NEGATIVE = 100


@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass of an iteration, from zero, for a correction ``A x = r``.

    Attributes
    ----------
    matvec, precondition : callable
        Products with A, and with an approximate inverse where there is one.
    r : Tensor
        The residual that is to be corrected.
    tol : Tensor
        The norm of it at which each task is solved.
    active : Tensor
        bool: the tasks that take part.
    limit : int
        Most steps.
    looks : bool
        Whether the host may look at values.
    condition : Tensor, optional
        The inner condition F, which an `Observer` follows where the method knows how.
    noise : Tensor or float
        That of the system.
    enough : float
        Least squares end where ``||A^T r|| <= enough ||A|| ||r||``.
    watch : Watch, optional
        What is told of each iteration.
    shared : int
        How many tasks, along the first axis, have one matrix in common.
    steady : bool
        That of the system.
    """

    matvec: Counted
    precondition: Product | None
    r: Tensor
    tol: Tensor
    active: Tensor
    limit: int
    looks: bool
    condition: Tensor | None = None
    enough: float = 0.0
    watch: Watch | None = None
    noise: Tensor | float = 0.0
    shared: int = 1
    steady: bool = False

    @property
    def least(self) -> float:
        """Ten roundings."""
        return 10 * torch.finfo(self.r.dtype).eps

    @property
    def flat(self) -> Any:
        """Ten roundings, or the noise: a number that is smaller beside its scale is zero."""
        return noise_floor(self.least, self.noise)

    @property
    def flat_slope(self) -> Any:
        """The same for the slope of least squares: no smaller than `enough`."""
        return noise_floor(max(10 * torch.finfo(self.r.dtype).eps, self.enough), self.noise)

    def preconditioned(self, v: Tensor) -> Tensor:
        """Apply the approximate inverse, or none."""
        return v if self.precondition is None else self.precondition(v)

    def tell(self, size: Tensor) -> None:
        """Tell of an iteration that left residuals of this size."""
        if self.watch is not None:
            self.watch.tell(size)

    def goes_on(self, steps: int, active: Tensor) -> bool:
        """Say whether another step is made, while any task is active."""
        return steps < self.limit and (not self.looks or any_task(active))


@dataclasses.dataclass
class Correction:
    """The outcome of a pass: the correction, and how it ended for each task."""

    x: Tensor
    status: Tensor
    iterations: Tensor
    steps: int
    negative: Tensor
    largest: Tensor  # of ||A v|| / ||v|| over the vectors met
    ritz: Callable[[], Tensor] | None = None  # lowest and highest Ritz value, when asked
    observer: Observer | None = None
    condition_number: Callable[[], Tensor] | None = None  # condition number seen, when asked
    spanned: bool = False  # whether the directions met span the whole space
    quotients: Callable[[], Tensor] | None = None  # the extremes of p.Ap / p.p, when asked
    residual: Tensor | None = None  # by recursion, that of `x`
    drift: Tensor | None = None  # in roundings: how far the true one may be from it

    def known(self, precision: torch.dtype, start: Tensor | None = None) -> Tensor | None:
        """Give the residual by recursion, if rounding cannot have changed it by a hundredth.

        It and the true one differ by what rounding did to each product, and to the sums.

        Parameters
        ----------
        precision : torch.dtype
            To which products are rounded.
        start : Tensor, optional
            What was corrected, for a right-hand side of norm one; None: zero.

        Returns
        -------
        residual : Tensor or None
            None where one task's may be off by more.

        References
        ----------
        Greenbaum, Estimating the attainable accuracy of recursively computed residual methods,
        1997, theorem 2.
        """
        if self.residual is None or self.drift is None:
            return None
        drift = self.drift if start is None else self.drift + 1 + self.largest * norm(start)
        least = SURE * torch.finfo(precision).eps * drift
        return self.residual if every_task(norm(self.residual) >= least) else None


class Recurrence:
    """The state that every recurrence keeps of its tasks in a pass."""

    size: Tensor  # of the residuals

    def __init__(self, start: Pass) -> None:
        self.start, self.steps, self.active, self.flat = start, 0, start.active, start.flat
        self.zero, self.one = torch.zeros_like(start.tol), torch.ones_like(start.tol)
        self.largest = self.zero
        self.unknown = self.broken = self.singular = torch.zeros_like(start.active)
        self.negative = self.unknown
        self.iterations = torch.zeros_like(start.active, dtype=torch.int64)

    def goes_on(self) -> bool:
        """Tell of the step before, and count a step, if another one is made."""
        if self.steps and self.start.watch is not None:
            self.start.watch.tell(self.reached())
        on = self.start.goes_on(self.steps, self.active)
        self.steps += on
        return on

    def reached(self) -> Tensor:
        """Give the norm of each task's residual."""
        return self.size

    def grown(self, size: Tensor) -> None:
        """Take note of how large the matrix was seen to be, for the tasks that are active."""
        self.largest = torch.where(self.active, torch.maximum(self.largest, size), self.largest)

    def moving(self, null: Tensor, lost: Tensor) -> Tensor:
        """Stop in directions that the matrix does not see, or that are not finite."""
        moving = self.active & ~null & ~lost
        self.unknown = self.unknown | (self.active & lost)
        self.singular = self.singular | (self.active & null)
        self.iterations = self.iterations + moving
        return moving

    def correction(self, x: Tensor, **evidence: Any) -> Correction:
        """Say how the tasks ended, beside the correction."""
        ends = {
            Status.MAX_ITERATIONS: self.active,
            Status.BREAKDOWN: self.broken,
            Status.SINGULAR: self.singular,
            Status.NOT_FINITE: self.unknown,
        }
        return Correction(
            x=torch.where(self.unknown[..., None], math.nan, x),
            status=graded(ends),
            iterations=self.iterations,
            steps=self.steps,
            negative=self.negative,
            largest=self.largest,
            **evidence,
        )


@dataclasses.dataclass(frozen=True)
class Limited(Watched, Solver):
    """The fields by which an iteration ends, and the damping."""

    maxiter: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    damping: float = 0.0
    callback: Callback | None = dataclasses.field(default=None, kw_only=True, repr=False)
    progress: bool = dataclasses.field(default=False, kw_only=True, repr=False)

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        at_least("maxiter", self.maxiter, 1)
        at_least("rtol", self.rtol, 0.0)
        at_least("atol", self.atol, 0.0)
        finite("damping", self.damping)


@dataclasses.dataclass(frozen=True)
class Iterative(Limited):
    """The fields that all Krylov methods share.

    Where an answer is judged, one product more with a fixed vector shows the size of every row: a
    residual that is small in units that hide an error is no success (a budget that is used up has
    no such claim). Of a `Minimum` an iteration
    that ends in a few steps goes on from a little off its answer, unless it has a budget or an
    `x0`, so that it also meets what the right-hand side does not reach.

    Parameters
    ----------
    maxiter : int, optional
        Most iterations. None: ten times the unknowns, at most 5000. Given without `rtol` it is
        a budget: running out of it is no failure.
    rtol, atol : float
        Stop when ``||r|| <= max(rtol ||b||, atol)``. ``rtol=None`` is a tolerance that the dtype
        can reach (1e-6 in float64, 1e-4 in float32, 5e-3 in float16, 3e-2 in bfloat16) and
        counts as met at the rounding floor.
    damping : float
        The system solved is ``(A + damping I) x = b``.
    preconditioner : callable or Nystrom, optional
        ``v -> approximately (A + damping I)^-1 v`` on pytrees shaped like `b`.
    callback : callable, optional
        ``callback(iteration)``, called after each iteration with an `Iteration`; what it raises
        ends the solve. With ``rtol=0`` and ``on_failure="ignore"`` it is refused.
    progress : bool
        Whether a solve of more than three seconds shows a line on stderr.
    """

    preconditioner: Callable[[Any], Any] | Solver | None = None

    #: Whether an answer that was cut short is kept only where its residual is the smaller one.
    judged_by_residual: ClassVar[bool] = False

    def run(self, system: LinearSystem, begun: Correction | None = None) -> Solution:
        """Iterate from `x0`, and again from the answer where its true residual is too large.

        The residual that is reported is ``b - A x`` of the x that is returned.

        Parameters
        ----------
        system : LinearSystem
            What is solved.
        begun : Correction, optional
            The first pass, where it has been made.

        Returns
        -------
        solution : Solution
            The answer and its evidence.
        """
        passes = _Passes(self, system)
        passes.make(begun)
        if self._explores(system):
            passes.look_around()
        return passes.solution()

    @abstractmethod
    def _iterate(self, start: Pass) -> Correction:
        """Correct an answer, until ``||r|| <= tol`` by the recursion."""

    def _start(self, system: LinearSystem, units: Units) -> tuple[Tensor, Pass]:
        """Begin at `x0` or at zero: the answer so far, and the pass that corrects it."""
        transpose = self._transpose(system) if self.needs_transpose else None
        matvec = Counted(system.matvec, self.damping, transpose)
        precondition = batched_preconditioner(self.preconditioner, system, matvec)
        tol = units.tolerance(self.rtol, self.atol, system.layout.precision, system.noise)
        tol = tol if system.goal is None else system.goal / units.unit[..., 0]
        looks = system.looks or self.rtol != 0
        b, n = units.b, system.layout.n
        x, r = torch.zeros_like(b) if n == b.shape[-1] else b.new_zeros((*b.shape[:-1], n)), b
        # Of least squares the first pass looks anyway.
        if system.x0 is not None and (not looks or r.shape != x.shape or any_task(units.present)):
            x = units.start(system.x0)
            r = b - matvec(x)
        limit = self.maxiter or min(10 * b.shape[-1], 5000)
        start = Pass(
            matvec, precondition, r, tol, units.present, limit, looks, system.condition,
            watch=system.watch, noise=system.noise, shared=system.shared,
            steady=system.steady,
        )  # fmt: skip
        return x, start

    def _linear_error(
        self, x: Tensor, size: Tensor, first: Correction | None, precision: torch.dtype
    ) -> Tensor | None:
        """Estimate the relative error of an answer to a right-hand side of norm one."""
        if first is None or first.observer is None:
            return None
        length, inverse = norm(x), first.observer.inverse(first.x)
        inverse = torch.where(torch.isfinite(inverse), inverse, length)
        eps = torch.finfo(precision).eps
        rounding = eps * first.largest * torch.maximum(inverse, length)
        return size * inverse / length + abs(self.damping) * inverse + rounding

    def _explores(self, system: LinearSystem) -> bool:
        """Say whether to start off zero: not within a budget, which that would take a part of."""
        budget = self.rtol is None and self.maxiter is not None
        return system.explores and system.looks and system.x0 is None and not budget

    def _succeeded(
        self,
        status: Tensor,
        size: Tensor,
        reached: Tensor,
        precision: torch.dtype,
        noise: Tensor | float,
    ) -> Tensor:
        """Say where a run came as close as was asked for, or to the floor or the budget."""
        good = status == Status.CONVERGED
        if self.rtol is None:
            floor = _rounding(reached, precision).clamp(max=tolerance(None, precision) ** 0.5)
            if isinstance(noise, Tensor):
                floor = torch.maximum(floor, (10 * noise * (1 + reached)).clamp(max=MOST_NOISE))
            good = good | ((status == Status.STAGNATED) & (size <= floor))
            if self.maxiter is not None:
                good = good | (status == Status.MAX_ITERATIONS)
        return good

    def _transpose(self, system: LinearSystem) -> Product:
        """Form products with the transpose, which are at hand where A is symmetric."""
        if system.rmatvec is not None:
            return system.rmatvec
        if system.symmetric:
            return system.matvec
        name = type(self).__name__
        raise UnsupportedOperation(
            f"{name} needs products with the transpose: pass rmatvec=... to {name}.solve (the "
            "same function as matvec where the matrix is symmetric), or use GMRES()."
        )


class _Passes:
    """The passes of one solve, each from the true residual of the answer so far."""

    def __init__(self, solver: Iterative, system: LinearSystem) -> None:
        self.solver, self.system, self.units = solver, system, Units(system.b)
        self.x, start = solver._start(system, self.units)
        scale, present = self.units.scale, self.units.present
        # b has norm one, or is zero or not finite.
        self.size = present.to(self.x.dtype) if start.r is self.units.b else norm(start.r)
        self.next = dataclasses.replace(start, active=present & (self.size > start.tol))
        self.status = graded(
            {Status.CONVERGED: torch.isfinite(scale + self.size)}, Status.NOT_FINITE
        )
        self.iterations = torch.zeros_like(self.status)
        self.negative = self.broken = torch.zeros_like(present)
        self.reached = torch.zeros_like(scale)  # ||A|| ||x||, the scale of rounding errors
        self.first: Correction | None = None
        self.ritz: Callable[[], Tensor] | None = None
        self.expected = False

    def make(self, begun: Correction | None) -> None:
        """Make passes until every task is solved, or has failed."""
        # In a trace a look would bind it to what rounding made of a system on its edge.
        looks, plain = self.next.looks, self.next.looks and not (transforms_active() or traced())
        if begun is not None:
            self.next.matvec.count = begun.steps + 1  # who made it has looked at the true residual
        while self.next.goes_on(0, self.next.active):
            part = begun or self.solver._iterate(self.next)
            begun = None
            candidate = self.x + part.x
            r = self._known(part) if looks and self.system.steady else None
            if r is None:
                r = self.units.b - self.next.matvec(candidate)
            size = norm(r)
            first, self.first = self.first is None, self.first or part
            self.next = dataclasses.replace(
                self.next, limit=self.next.limit - part.steps, condition=None
            )
            self.expected = plain and first and self._as_expected(part, size)
            if self.expected:
                # The operations below would say the same, some forty of them.
                self.x, self.size, self.next = candidate, size, dataclasses.replace(self.next, r=r)
                self.status = graded({Status.CONVERGED: size <= self.next.tol}, part.status)
                self.iterations, self.negative = part.iterations, part.negative
            else:
                self._take(part, candidate, r, size)
            if self.expected or not looks:
                break
        known = self.system.symmetric or self.solver.needs_symmetry
        if self.first is not None and looks and known:
            if self.next.precondition is None:
                self.ritz = self.first.ritz
            elif self.system.goal is not None:  # the library's own preconditioner
                self.ritz = self.first.quotients

    def _known(self, part: Correction) -> Tensor | None:
        """Give the residual of the corrected answer, if rounding did not change it by much."""
        begun_at_zero = self.first is None and self.system.x0 is None
        return part.known(self.system.layout.precision, None if begun_at_zero else self.x)

    def _as_expected(self, part: Correction, size: Tensor) -> bool:
        """Say whether every system was solved at once, or cut short where that was the plan."""
        good = (part.status == Status.CONVERGED) & (size <= self.next.tol)
        if self.next.limit <= 0 and not self.solver.judged_by_residual:
            good = good | ((part.status == Status.MAX_ITERATIONS) & torch.isfinite(size))
        return every_task(good & self.next.active)

    def _take(self, part: Correction, candidate: Tensor, r: Tensor, size: Tensor) -> None:
        """Take the corrected answers that are better, and find the tasks that need a pass more."""
        active, met, sound = self.next.active, size <= self.next.tol, torch.isfinite(size)
        better = (size < self.size) | ~sound
        # A truncated iteration is closer in the energy norm also where its residual is not.
        if part is self.first and not self.solver.judged_by_residual:
            better = better | (part.status == Status.MAX_ITERATIONS)
        keep = active & better
        claimed = (part.status == Status.CONVERGED) & ~met
        stalled = claimed & ~(size < 0.5 * self.size)
        # At the rounding floor a regular matrix looks singular.
        floor = _rounding(part.largest * norm(candidate), self.system.layout.precision)
        floored = part.status == Status.SINGULAR
        if not self.system.noisy:  # of curvature below the noise nothing is known
            floored = floored & (size <= floor.clamp(max=1e-3))
        # A method that broke down on its way gets one more try, from the true residual.
        retried = (part.status == Status.BREAKDOWN) & ~met & ~self.broken & (size < self.size)
        self.broken = self.broken | (active & retried)
        again = active & ((claimed & ~stalled) | retried) & sound
        ends = {
            Status.STAGNATED: stalled | floored,
            Status.CONVERGED: met,
            Status.NOT_FINITE: ~sound,
            Status.MAX_ITERATIONS: again,
        }
        self.status = torch.where(active, graded(ends, part.status), self.status)
        self.iterations = torch.where(active, self.iterations + part.iterations, self.iterations)
        self.negative = self.negative | (active & part.negative)
        self.x = torch.where(keep[..., None], candidate, self.x)
        r = torch.where(keep[..., None], r, self.next.r)
        self.size = torch.where(keep, size, self.size)
        self.reached = torch.where(active, part.largest * norm(self.x), self.reached)
        self.next = dataclasses.replace(self.next, r=r, active=again)

    def look_around(self) -> None:
        """Go on from a little off an answer that came soon, for what the search did not reach."""
        few = self.units.present & (self.status == Status.CONVERGED) & (self.iterations <= FEW)
        if not any_task(few) or (self.first is not None and self.first.spanned):
            return
        r = off_zero(self.next.matvec, torch.where(few[..., None], self.units.b, 0.0))
        limit = max(self.next.limit, AROUND)
        start = dataclasses.replace(
            self.next, r=r, active=few, limit=limit, condition=None, watch=None
        )
        part = self.solver._iterate(start)
        self.negative = self.negative | (few & part.negative)
        bent = few & (part.status == Status.NEGATIVE_CURVATURE)
        self.status = graded({Status.NEGATIVE_CURVATURE: bent}, self.status)
        self.ritz = widest(self.ritz, part.ritz)

    def solution(self) -> Solution:
        """Return to the caller's units, and say how good the answer is."""
        first, solver, precision = self.first, self.solver, self.system.layout.precision
        x, status, size, unit = self.x * self.units.unit, self.status, self.size, self.units.unit
        if not self.expected:
            x, status, size = self.units.settled(x, status, size)
        told = first is not None and self.next.precondition is None
        seen = None if first is None else first.observer
        return Solution(
            x=x,
            status=status,
            success=solver._succeeded(status, size, self.reached, precision, self.system.noise),
            iterations=self.iterations,
            matvecs=self.next.matvec.count,
            residual_norm=size,
            negative_curvature=self.negative,
            method=type(solver).__name__,
            spectrum=self.ritz,
            condition_number=first.condition_number if first and told else None,
            residual=self.next.r * unit,
            linear_error=solver._linear_error(x / unit, size, first, precision),
            newton=seen.newton(first.x) if first and seen else None,
            inverse=seen.inverse(first.x) if first and seen else None,
        )


def noise_floor(rounding: float, noise: Tensor | float) -> Any:
    """Take the noise of products, twice, where it is more than so much rounding."""
    return rounding if isinstance(noise, float) else (2 * noise).clamp(min=rounding)


def _rounding(reached: Tensor, precision: torch.dtype) -> Tensor:
    """Say how small a residual can become, for an answer of ``||A|| ||x||``."""
    return 100 * torch.finfo(precision).eps * (1 + reached)


def off_zero(matvec: Product, b: Tensor) -> Tensor:
    """Form the residual of zero a little off it, in general position, small beside `b`."""
    z = signs(b).expand_as(b)
    image = matvec(z)
    size = norm(image)
    usable = torch.isfinite(size) & (size > 0)
    part = torch.where(usable, _OFF * norm(b) / torch.where(usable, size, 1.0), 0.0)[..., None]
    return torch.where(part > 0, -part * image, 0.0)


def curves_down(v: Tensor, image: Tensor, noise: Tensor | float = 0.0) -> Tensor:
    """Say whether ``v . A v`` is negative by more than rounding and noise, for each task."""
    least = noise_floor(NEGATIVE * torch.finfo(v.dtype).eps, noise)
    size = torch.linalg.vector_norm(v, dim=-1) * torch.linalg.vector_norm(image, dim=-1)
    return torch.linalg.vecdot(v, image) < -least * size


def batched_preconditioner(
    preconditioner: Callable[[Any], Any] | Solver | None, system: LinearSystem, matvec: Counted
) -> Product | None:
    """Turn a preconditioner on pytrees into one on flat vectors, mapped over the tasks."""
    if preconditioner is None:
        return None
    if isinstance(preconditioner, Solver):
        b = system.b if system.shared == 1 else system.b[0]  # of the matrix that they share
        return preconditioner.as_preconditioner(matvec, b)
    tree, layout = system.tree, system.layout

    def one(v: Tensor) -> Tensor:
        before = versions([v])
        with advice():
            image = preconditioner(tree.rebuild(layout.split(v)))
        if versions([v]) != before:
            raise UnsupportedOperation(
                "preconditioner changes its argument in place, which is a vector of the solver's. "
                "Return a new tensor, as v * 2 is in place of v.mul_(2).",
                argument="preconditioner",
            )
        return layout.flatten(tree.match("preconditioner(v)", image))

    def mapped(v: Tensor) -> Tensor:
        rows: Tensor = by_rows(one, v.flatten(0, -2))
        return rows.unflatten(0, v.shape[:-1])

    return one if system.b.ndim == 1 else mapped
