"""The evidence for the solution of a linear system, in the order in which it is needed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import SolveInfo, Status
from ..conditions._base import Product
from ..solvers._base import info_of
from ..solvers._cg import CG
from ..solvers._factorisation import Factorisation, signs
from ..solvers._gmres import GMRES
from ..solvers._identity import Identity
from ..solvers._krylov import AROUND, FEW, NEGATIVE, noise_floor
from ..solvers._long import is_vast, pieces
from ..solvers._normal import LSMR, NormalCG
from ..solvers._nystrom import Nystrom
from ..solvers._probe import again, claimed, probed
from ..solvers._system import LinearSystem, NewtonStep, Solution
from ..solvers._vectors import dot, norm
from .causes import Place
from .choices import Choices
from .degeneracy import DEGENERATE, degeneracy
from .second_look import look_near
from .uses import Use
from .verdict import Case, Cause

# The factors of an estimate, without and with a second look, from benchmarks/calibration.py and
# benchmarks/networks.py. Above `_HARDLY` it says that little is known.
_MARGIN = 4.0
_HARDLY = 0.9
# ... and above this residual, of products with errors of their own that left no more to find.
_FAR_OFF = 1e-2
_AGAIN = 2.0
_FROM_STEP = 8.0
#: The estimate where nothing is known of the answer.
_UNKNOWN = 10.0
#: How a solve ends that leaves an answer of unknown quality.
_LOST = (Status.NEGATIVE_CURVATURE, Status.BREAKDOWN, Status.DIVERGED, Status.SINGULAR)
# Above this relative inner residual the answer is looked at once more, a Newton step further on.
_LOOK_AGAIN = {torch.float64: 1e-7, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 1e-2}
# An answer that moves by more than so many times inner_tol on that step is that of an unsolved
# problem, however small the inner residual; one that moves by less is good enough, up to an inner
# residual of as much.
_MOVES = 20.0
# Above this relative inner residual params may have run away, where inner_tol is None.
_AWAY = 0.5
# A second Newton step that is longer than this does not lead to a solution that is near.
_NEXT = 3e-3
_SHRINKS = 0.2
# A part of the inner condition that is larger than this is not left to the directions of the solve.
_LEFT = 1e-2
_PART = 1e-2  # entries that carry less of params than this do not count
_MUCH = 0.1  # the relative change of an entry that is no rounding
_SMALL = 128  # unknowns for which a dense Hessian is no more than the solve itself
_AROUND = 8  # products that look for negative curvature
_BLIND = 3.0  # the factor by which a right-hand side may be larger behind the inverse
_BLIND_AT_MOST = 100.0  # ... and so much at most is believed of what a solve has seen
_BACK = 0.3  # ... and the Newton step leads back to so much of their length


class Evidence:
    """The evidence about a solution, gathered in the order in which it is needed."""

    def __init__(
        self, use: Use, choices: Choices, system: LinearSystem, solution: Solution
    ) -> None:
        self.use, self.choices, self.system, self.solution = use, choices, system, solution
        self.lin = use.lin
        flat = use.lin.params
        self._params = None if is_vast(flat) else flat  # a vast one is made where it is asked for
        self.length, self.strength = norm(solution.x), norm(system.b)
        self.extent = self.length.new_full((), math.nan)
        self.success = solution.success & torch.isfinite(self.length)
        self.cause = torch.zeros_like(solution.status)
        self.degeneracy: Tensor | None = None
        self.product_error = torch.full_like(self.length, math.nan)

    @property
    def params(self) -> Tensor:
        """The inner variables as one vector."""
        return self.lin.params if self._params is None else self._params

    def gathered(self) -> SolveInfo:
        """Gather all of it, as far as it is wanted."""
        if not self.choices.judged:
            return info_of(self.solution, solution=None, success=self.success)
        outer_error = dot(self.solution.x, self.lin.residual)
        self._judge_curvature()
        self._judge_rank()
        self._judge_units()
        residual, newton = self._newton()
        tol = self.choices.inner_tol
        self._judge_degeneracy(True if tol is None else residual <= tol)
        inner = self._judge_inner(residual, newton, outer_error)
        approximation = self._judge_approximation()
        by_products = self._judge_products()
        self._judge_degeneracy(True)
        figures: dict[str, Any] = {}
        if self.choices.figures:
            figures = {
                "outer_error": outer_error,
                "error_estimate": self._estimate(inner, approximation + by_products),
                "eigenvalues": self.solution.eigenvalues,
            }
        if self.degeneracy is not None:
            figures["degeneracy"] = self.degeneracy
        if self.system.noisy:
            figures["product_error"] = self.product_error
        return info_of(
            self.solution, solution=None, success=self.success, inner_residual=residual, **figures
        )

    def case(self) -> Case:
        """Say what the answer is judged by."""
        return Case(
            choices=self.choices,
            kink=self.lin.problem.condition.kink,
            noisy=self.system.noisy,
            cause=self.cause,
            eigenvalues=lambda: self.solution.eigenvalues,
            condition=lambda: norm(self.lin.residual),
            params=lambda: norm(self.params),
            places=self._places,
        )

    def _places(self) -> Iterator[Place]:
        if self.system.x0 is not None:
            cure = "Leave x0 out, or pass the solution of a solve that ended well"
            yield Place("x0", self.system.x0, lambda: cure, argument="x0")
        yield from self.use.places(self.system.b, self.solution.x)

    def _fail(self, which: Tensor, cause: Cause) -> None:
        """Take an answer for wrong, for a first cause."""
        self.cause = torch.where(which & self.success, int(cause), self.cause)
        self.success = self.success & ~which

    def _note_curvature(self, negative: Tensor) -> None:
        """Add tasks in which negative curvature was met."""
        self.solution.negative_curvature = self.solution.negative_curvature | negative

    def forgive_rounding(self) -> None:
        """Take for zero a right-hand side that is rounding: it is in no range of a singular A."""
        lost = (self.solution.status == Status.SINGULAR) & torch.isfinite(self.length)
        if not self.choices.looks or not any_task(lost):
            return
        rounding = self.use.mere_rounding()
        if rounding is None or not any_task(lost & rounding):
            return
        none = lost & rounding
        self.solution.x = torch.where(
            none[..., None], torch.zeros_like(self.solution.x), self.solution.x
        )
        self.solution.status = torch.where(none, int(Status.CONVERGED), self.solution.status)
        self.success = self.success | none
        self.strength = torch.where(none, torch.zeros_like(self.strength), self.strength)
        self.length = torch.where(none, torch.zeros_like(self.length), self.length)

    def _judge_curvature(self) -> None:
        """Judge negative curvature: of a minimum, whatever method has met it."""
        solution, condition = self.solution, self.lin.problem.condition
        if not condition.minimum:
            return
        # b . A^-1 b is negative, by more than the residual can be to blame for.
        left = solution.residual_norm.nan_to_num(math.inf)
        left = left + noise_floor(
            100 * torch.finfo(self.system.layout.precision).eps, self.system.noise
        )
        doubt = self.length * self.strength * left
        self._note_curvature(dot(solution.x, self.system.b) < -doubt)
        if self.choices.looks and self.choices.spends:
            self._look_for_curvature()
        self._fail(self.solution.negative_curvature, Cause.CURVATURE)

    @property
    def _unaided(self) -> bool:
        """Whether the solution came without evidence, as that of a user's solver may."""
        return "negative_curvature" in self.solution.unsaid and "status" in self.solution.unsaid

    def _look_for_curvature(self) -> None:
        """Look for negative curvature where the method has not looked for it itself."""
        solver, solution = self.choices.solver, self.solution
        if isinstance(solver, GMRES) and solution.spectrum is not None:
            low, high = solution.eigenvalues.unbind(dim=-1)
            eps = torch.finfo(self.system.layout.precision).eps
            self._note_curvature(low < -NEGATIVE * eps * high.abs())
        elif isinstance(solver, NormalCG | LSMR | Nystrom) or self._unaided:
            around = CG(maxiter=AROUND, damping=getattr(solver, "damping", 0.0)).run(
                dataclasses.replace(self.system, condition=None, explores=False, x0=None)
            )
            self.solution.matvecs += around.matvecs
            self._note_curvature(around.negative_curvature)

    def _judge_rank(self) -> None:
        """Judge whether the derivative is determined, where the matrix lacks rank."""
        null = self.solution.null
        if null is None:
            return
        lacking = null.any(dim=-1).expand_as(self.solution.status)
        if self.system.transposed:
            moves = self.use.moves_off(null)
            lacking = lacking & moves
        self._fail(lacking, Cause.RANK)
        self.solution.status = torch.where(
            lacking & (self.solution.status == Status.CONVERGED),
            int(Status.SINGULAR),
            self.solution.status,
        )

    def _judge_units(self) -> None:
        """Judge a residual that is small in units that hide an error."""
        solver, solution = self.choices.solver, self.solution
        if not (self.choices.looks and self.choices.spends) or isinstance(solver, Identity):
            return
        iterates = solution.iterations > 0
        if isinstance(solver, Nystrom) or self._unaided:
            iterates = torch.ones_like(iterates)
        if not any_task(claimed(solver, solution) & iterates):
            return
        if self.solution.probe is None and self.solution.further is None:
            damping = getattr(solver, "damping", 0.0)
            self.solution.probe = probed(self.system, self.solution, damping)
            self.solution.matvecs += self.solution.probe is not None
        if self.solution.probe is not None:
            self._fail(self.solution.probe.hides, Cause.UNITS)

    def _newton(self) -> tuple[Tensor, NewtonStep]:
        """Form the inner Newton step, and measure its relative length."""
        F, solution = self.lin.residual, self.solution
        self.extent = norm(self._weighted(self.params))
        newton = solution.newton
        if newton is not None and self._unreached(newton, F):
            reached, probe = newton, solution.probe
            newton, far = self._with_rows(reached)
            if any_task(far) and probe is not None:
                damping = getattr(self.choices.solver, "damping", 0.0)
                solution.probe = again(probe, self.system, solution, damping)
                newton, far = self._with_rows(reached)
            newton = self._along_condition(F, newton) if any_task(far) else newton
        if newton is None:
            newton = self._along_condition(F, None)
        # In the caller's units and in those of the equilibrated matrix, whichever is worse.
        plain = norm(newton.step) / norm(self.params)
        length = norm(self._weighted(newton.step)) + newton.beyond
        residual = torch.maximum(length / self.extent, plain)
        nothing = (length == 0) | (norm(F) == 0)
        residual = torch.where(nothing, torch.zeros_like(residual), residual)
        return residual.expand_as(self.solution.status), newton

    def _with_rows(self, newton: NewtonStep) -> tuple[NewtonStep, Tensor]:
        """Bound by the rows of A what a step leaves; say whether that may count."""
        rows = self._rows()
        least = norm(newton.left) / rows.amax(dim=-1)  # the inverse is no smaller than this
        entries = torch.maximum(self._by_entry(newton.left, rows), least)
        newton = dataclasses.replace(newton, beyond=torch.maximum(newton.beyond, entries))
        length = norm(self._weighted(newton.step)) + newton.beyond
        return newton, ~(length <= _LOOK_AGAIN[self.system.layout.precision] * self.extent)

    def _weighted(self, v: Tensor) -> Tensor:
        return v if self.solution.metric is None else v * self.solution.metric

    def _unreached(self, newton: NewtonStep, F: Tensor) -> bool:
        """Say whether the search directions left out a part of the condition that counts."""
        alone = newton.again is None and newton.left.shape == F.shape
        if not alone or not (self.choices.looks and self.choices.spends):
            return False
        return any_task(norm(newton.left) > _LEFT * norm(F))

    def _along_condition(self, F: Tensor, newton: NewtonStep | None) -> NewtonStep:
        """Make a step along what is left of F, by its curvature, which costs a product."""
        along_b = self.strength / torch.where(self.length > 0, self.length, 1.0)
        left = F if newton is None else newton.left
        size, none = norm(left), left.new_zeros(()).expand_as(left)
        before = none if newton is None else newton.step
        free = isinstance(self.choices.solver, Identity) or not self.choices.spends
        # Of a matrix that is shared a step that is known belongs to all of its right-hand sides.
        if free or (newton is None and size.shape != self.length.shape):
            step = left / along_b[..., None]
            return NewtonStep(step, none.expand_as(step), norm(step) * 0)
        image = self.system.matvec(left)
        self.solution.matvecs += 1
        damping = getattr(self.choices.solver, "damping", 0.0)
        image = image + damping * left if damping else image
        curvature = dot(left, image)
        if self.lin.problem.condition.minimum:
            negative = curvature < -noise_floor(1e-3, self.system.noise) * size * norm(image)
            self._note_curvature(negative)
            self._fail(negative, Cause.CURVATURE)
        curvature = curvature.abs() / torch.where(size > 0, size.square(), 1.0)
        if newton is None:
            curvature = torch.minimum(
                *(torch.where(c > 0, c, math.inf) for c in (along_b, curvature))
            )
        usable = (size > 0) & (curvature > 0)
        if newton is not None and is_vast(left) and left.ndim == 1:
            return self._along_in_place(newton, image, torch.where(usable, 1 / curvature, 0.0))
        step = torch.where(usable[..., None], left / curvature[..., None], none)
        rest = torch.where(usable[..., None], left - image / curvature[..., None], left)
        beyond = torch.zeros_like(size)
        if newton is not None:
            share = norm(rest) / torch.where(size > 0, size, 1.0)
            beyond = torch.maximum(newton.beyond, norm(step)) * share.nan_to_num(0.0)
            entries = self._by_entry(left, image, over=True)
            beyond = torch.maximum(beyond, entries)
        return NewtonStep(before + step, rest, beyond)

    def _along_in_place(self, newton: NewtonStep, image: Tensor, inverse: Tensor) -> NewtonStep:
        """Make that step for one system, in the memory of the step so far and of the image."""
        left, size, self.solution.newton = newton.left, norm(newton.left), None
        entries = self._by_entry(left, image, over=True)
        step = newton.step.addcmul_(left, inverse)
        rest = image.mul_(-inverse).add_(left)
        share = norm(rest) / torch.where(size > 0, size, 1.0)
        beyond = torch.maximum(newton.beyond, size * inverse) * share.nan_to_num(0.0)
        return NewtonStep(step, rest, torch.maximum(beyond, entries))

    def _rows(self) -> Tensor:
        """Measure the rows of A, as far as they were probed."""
        probe = self.solution.probe
        if probe is not None:
            return probe.rows
        return self.strength[..., None] / torch.where(self.length > 0, self.length, 1.0)[..., None]

    def _by_entry(self, left: Tensor, curvature: Tensor, *, over: bool = False) -> Tensor:
        """Measure the step in those entries of params that it changes by much.

        The curvature of each entry by itself, where that of all together is that of a few.

        Parameters
        ----------
        left, curvature : Tensor
            What is left of the condition, and the curvature of each entry.
        over : bool
            Whether `curvature` is the image of `left`, to be divided by it.

        Returns
        -------
        length : Tensor
            For each task.
        """
        lengths, sizes = [], []
        probe = self.solution.probe
        known = () if probe is None or not over else (probe.rows.expand_as(left),)
        for p, some, rows, *known_rows in pieces(self.params, left, curvature, *known):
            p = p.abs()
            rows = (rows / torch.where(some != 0, some, 1.0)).abs() if over else rows
            for of_probe in known_rows:  # an entry of an image comes out small by chance, not twice
                rows = torch.maximum(rows, of_probe)
            reach = some.abs() / rows
            far = (reach >= _MUCH * p) & (some != 0)
            lengths.append(norm(torch.where(far, torch.minimum(reach, p), torch.zeros_like(p))))
            sizes.append(norm(p))
        length, size = (
            of[0] if len(of) == 1 else norm(torch.stack(of, dim=-1)) for of in (lengths, sizes)
        )
        return torch.where(length > _PART * size, length, torch.zeros_like(length))

    def _judge_inner(self, residual: Tensor, newton: NewtonStep, outer_error: Tensor) -> Tensor:
        """Judge the relative error that the unsolved inner problem leaves, where it is known."""
        step = newton.step
        tol, looks = self.choices.inner_tol, self.choices.looks
        some = self.strength > 0  # without a right-hand side nothing depends on the solution
        estimate = _FROM_STEP * residual
        if tol is None:
            self._judge_runaway(some & ~(residual <= _AWAY), step, outer_error)
            return estimate
        wanted = some & ~(residual <= min(_LOOK_AGAIN[self.system.layout.precision], tol))
        if not self.choices.figures:
            wanted = wanted & self.success
        look = None
        # Of the identity in the place of A there is no Newton step to speak of.
        known = not isinstance(self.choices.solver, Identity)
        if looks and known and any_task(wanted):
            look = self.use.second_look(newton, self.solution, self._left_over())
        # An apparently singular matrix, or a slow iteration, may be a point that is far out.
        blamed = some & ~(residual <= max(tol, _AWAY)) & ~self.success
        linear = torch.zeros_like(blamed)
        for cause in (Cause.SOLVE, Cause.UNITS, Cause.RANK):
            linear = linear | (self.cause == int(cause))
        self.cause = torch.where(blamed & linear, int(Cause.INNER), self.cause)
        if look is None:
            unsolved = some & ~(residual <= tol)
            rounding = self._fail_unsolved(unsolved, step)
            return torch.where(rounding, torch.zeros_like(estimate), estimate)
        # The part that the step did not reach is taken for as harmful as any way of its length.
        beyond = _FROM_STEP * newton.beyond / self.extent
        change = _AGAIN * look.change.nan_to_num(math.inf) + beyond.nan_to_num(math.inf)
        # Another step would be about as long as this one: they do not lead to a solution.
        further = self._length_of(look.bent, newton)
        lost = ~(further <= _NEXT * self.extent)
        # Steps that shrink lead somewhere, though not soon.
        shrinks = further <= _SHRINKS * norm(self._weighted(newton.step))
        change = torch.where(lost & ~shrinks, torch.full_like(change, _UNKNOWN), change)
        change = torch.where(lost & shrinks, 3 * change, change)
        unsolved = wanted & ~((change <= _MOVES * tol) & (residual <= _MOVES * tol) & ~lost)
        if any_task(unsolved & self.success & (residual > _AWAY)):  # params may be zero
            nothing = unsolved & (residual > _AWAY) & self.use.negligible(self.params)
            nothing = nothing & self.use.negligible(step)  # the solution then too
            change = torch.where(nothing, torch.zeros_like(change), change)
            unsolved = unsolved & ~nothing
        self._fail_unsolved(unsolved, step, forgives=False)
        self._fail(some & ~wanted & ~(residual <= tol), Cause.INNER)
        return torch.where(wanted, change, estimate)

    def _fail_unsolved(self, unsolved: Tensor, step: Tensor, *, forgives: bool = True) -> Tensor:
        """Take answers for those of unsolved problems, or of kinks; return which are rounding."""
        rounding = torch.zeros_like(unsolved)
        looks = self.choices.looks and step.ndim == self.params.ndim
        if looks and any_task(unsolved & self.success):
            near, kink = look_near(self.lin, step)
            self._fail(unsolved & kink, Cause.JUMP)
            rounding = rounding | near if forgives else rounding
        self._fail(unsolved & ~rounding, Cause.INNER)
        return rounding & unsolved

    def _left_over(self) -> Tensor:
        """Form ``b - A u`` as damping, a budget, or another matrix leave it by design."""
        u, solver, left = self.solution.x, self.choices.solver, self.solution.residual
        if left is not None and is_vast(left):  # who gets it may change it
            self.solution.residual = None
        if left is not None:
            damping = getattr(solver, "damping", 0.0)
            return left + damping * u if damping else left
        if self.solution.further is not None:  # a factorisation leaves nothing over
            return getattr(solver, "damping", 0.0) * u
        self.solution.matvecs += 1
        return self.system.b - self.system.matvec(u)

    def _length_of(self, bent: Tensor, newton: NewtonStep) -> Tensor:
        """Estimate the length of the Newton step that a rest of the condition calls for."""
        if newton.again is not None:
            return norm(self._weighted(newton.again(bent)))
        size = norm(self.lin.residual)
        # Between the inverse that the first step showed and that of the linear solve.
        inverses = norm(newton.step) / size * (self.length / self.strength)
        return norm(bent) * inverses.sqrt()

    def _judge_runaway(self, far: Tensor, step: Tensor, outer_error: Tensor) -> None:
        """Judge params far out: a Newton step leads back, and not where its slope says."""
        if not self.choices.looks or step.ndim != self.params.ndim:
            return
        far = far & ~(norm(self._weighted(self.params - step)) > _BACK * self.extent)
        if not any_task(far & self.success):
            return
        fall = self.use.falls_by(step)
        if fall is not None:
            believed = (fall - outer_error).abs() <= outer_error.abs()
            self._fail(far & ~believed, Cause.AWAY)

    def _judge_approximation(self) -> Tensor:
        """Judge the relative error of `u` that a curvature in place of the Hessian makes."""
        hessian, solution = self.lin.record.hessian, self.solution
        tol = self.choices.inner_tol
        if hessian is None:
            return torch.zeros_like(self.length)
        if not self.choices.spends or (tol is None and not self.choices.figures):
            return torch.full_like(self.length, math.nan)
        left = self.system.b - self.lin.replayed(hessian, solution.x)
        self.solution.matvecs += 1
        if solution.further is not None:
            missing = solution.further(left)
            lost = norm(missing) / self.length
        else:
            missing = _BLIND * left * (self.length / self.strength)[..., None]
            lost = _BLIND * norm(left) / self.strength
        lost = self.use.effect(missing, lost)
        lost = torch.where(self.strength > 0, lost, torch.zeros_like(lost))
        if tol is None:
            return lost
        if self.choices.looks and any_task(self.success):
            saddle = self._indefinite(hessian)
            lost = torch.where(saddle, torch.full_like(lost, _UNKNOWN), lost)
        self._fail(~(lost <= _MOVES * tol), Cause.APPROXIMATION)
        return lost

    def _judge_products(self) -> Tensor:
        """Judge the relative error that products by differences make, by another step size."""
        solution, none = self.solution, torch.zeros_like(self.length)
        if not self.system.noisy:
            return none
        if not self.choices.spends:
            return none + math.nan
        image, crossed = self.lin.again(solution.x, looks=self.choices.looks)
        solution.matvecs += 1
        here = self.system.b - self._left_over()
        spread = norm(image - here)
        relative = spread / torch.where(self.strength > 0, self.strength, 1.0)
        # What is wrong in A u is as a residual; the solve has seen how long the inverse makes one.
        blind = torch.full_like(relative, _BLIND)
        if solution.linear_error is not None:
            seen = solution.linear_error / solution.residual_norm
            blind = torch.maximum(blind, seen.nan_to_num(_BLIND).clamp(max=_BLIND_AT_MOST))
        lost = blind * relative * self.use.share() + self.use.crossed_again(crossed)
        lost = torch.where(self.strength > 0, lost, none)
        self.product_error = lost
        if self.choices.inner_tol is not None:
            self._fail(~(lost <= _MOVES * self.choices.inner_tol), Cause.PRODUCTS)
        return lost

    def _indefinite(self, hessian: Product) -> Tensor:
        """Say whether the Hessian has negative curvature that its approximation cannot show.

        It is looked for where the answer has taken few products, or as many as unknowns.

        Parameters
        ----------
        hessian : callable
            The product with the Hessian, on leaves.

        Returns
        -------
        indefinite : Tensor
            bool, for each task.
        """
        n, seen = self.params.shape[-1], self.solution.iterations
        if self.solution.further is not None and n <= _SMALL:
            H = self.lin.dense_of(hessian)
            self.solution.matvecs += n
            factors = Factorisation(H.nan_to_num(), symmetric=True, looks=True)
            return factors.negative.expand_as(self.success)
        if not any_task(self.success & (seen <= FEW)):
            return torch.zeros_like(self.success)
        start = signs(self.params).expand_as(self.params)
        around = dataclasses.replace(
            self.system,
            matvec=lambda v: self.lin.replayed(hessian, v),
            b=start,
            x0=None,
            condition=None,
            explores=False,
        )
        solution = CG(maxiter=_AROUND).run(around)
        self.solution.matvecs += solution.matvecs
        return solution.negative_curvature.expand_as(self.success)

    def _judge_degeneracy(self, among: Tensor | bool) -> None:
        """Judge a kink, or constraints that are dependent, for some of the tasks."""
        if self.degeneracy is None:
            self.degeneracy = degeneracy(
                self.lin, self.solution.x, self.system.b, transpose=self.system.transposed
            )
        if self.degeneracy is not None:
            self._fail((self.degeneracy > DEGENERATE) & among, Cause.KINK)

    def _estimate(self, inner: Tensor, approximation: Tensor) -> Tensor:
        """Estimate the relative error of the answer; NaN where the method does not know."""
        linear = self.solution.linear_error
        if linear is None:
            return torch.full_like(self.length, math.nan)
        linear = torch.where(self.strength > 0, linear, torch.zeros_like(linear))
        linear = _MARGIN * linear
        # Of a solution that is hardly known, neither is its share of the hypergradient.
        share = torch.where(linear > _HARDLY, 1.0, self.use.share())
        total = linear * share + _AGAIN * approximation + inner
        lost = torch.zeros_like(self.success)
        for status in _LOST:
            lost = lost | (self.solution.status == status)
        if self.system.noisy:  # it may have ended where the noise hides the rest
            far = self.solution.residual_norm > _FAR_OFF
            lost = lost | ((self.solution.status == Status.STAGNATED) & far)
            lost = lost | (self.cause == int(Cause.UNITS))  # which hide how large it is
        total = torch.where(lost, total.clamp(min=1), total)
        # At a saddle there is no solution that the answer could be near.
        total = torch.where(self.cause == int(Cause.CURVATURE), _UNKNOWN, total)
        # Where the answer is hardly known, neither is its true size.
        return torch.where(total > _HARDLY, total.clamp(min=1), total).clamp(max=_UNKNOWN)
