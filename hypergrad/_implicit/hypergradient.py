"""One hypergradient: the direct term minus the cross derivative times the linear solve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor

from .._autograd.captured import refuse_one_level_reduced
from .._autograd.double_backward import changed_in_place
from .._autograd.in_place import group_of_replicas
from .._autograd.products import Parts
from .._autograd.random_numbers import Draw, generators, restore, same
from .._autograd.ranks import together
from .._autograd.recording import refuse_past_arguments
from .._autograd.refusals import refuse_derivatives
from .._autograd.rows import by_rows
from .._autograd.shards import group_of, refuse_transforms
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import being_traced, detached, versions
from .._autograd.transforms import is_batched
from .._autograd.vmaps import Vmaps, outside_of_vmaps
from .._errors import UnsupportedOperation
from .._info import SolveInfo
from .._pytrees import Tree
from .._warnings import OnFailure, check_on_failure, warn_of_unused
from ..conditions._base import as_condition
from ..conditions._inner_problem import Problem
from ..conditions._minimum import Minimum
from ..solvers import Solver
from ..solvers._auto import choose
from ..solvers._base import mapped_by_caller
from ..solvers._factorisation import signs
from ..solvers._long import is_vast
from ..solvers._recycle import Memory, claimed
from ..solvers._system import NewtonStep, Solution
from ..solvers._vectors import norm
from .causes import Place, data, derivative, inner_places, of_leaves, of_value, solve
from .choices import Choices, needs_product
from .linear_solve import solved
from .linearisation import Linearisation
from .outer_slopes import OuterSlopes, outer_gradient
from .second_look import SecondLook, shifted
from .task_norms import size_of
from .uses import Use

_BENDS = 0.1  # the relative change of a slope that is a bend
_CANCELLED = 1e-2  # the rest of two terms that cancel counts as so much of them at least


@dataclasses.dataclass
class Hypergradient:
    """The answer: as a pytree, its variables in their order, and the evidence.

    Attributes
    ----------
    grads : pytree of Tensor
        Shaped like `hparams`.
    leaves : list of Tensor
        Its variables.
    info : SolveInfo
        With all figures where they were asked for, else with those that the judgement needs.
    """

    grads: Any
    leaves: list[Tensor]
    info: SolveInfo


def hypergradient(
    outer: Callable[[Any, Any], Any],
    inner: Any,
    params: Any,
    hparams: Any,
    solver: Solver | None,
    x0: Any,
    has_aux: bool,
    inner_tol: float | None,
    on_failure: OnFailure,
    return_info: bool,
) -> Hypergradient:
    """Compute what `implicit_grad` returns; the arguments are its own."""
    with claimed() as memory:
        options = x0, has_aux, inner_tol, on_failure, return_info
        return _answered(outer, inner, params, hparams, solver, *options, memory)


def _answered(
    outer: Callable[[Any, Any], Any],
    inner: Any,
    params: Any,
    hparams: Any,
    solver: Solver | None,
    x0: Any,
    has_aux: bool,
    inner_tol: float | None,
    on_failure: OnFailure,
    return_info: bool,
    memory: Memory | None,
) -> Hypergradient:
    check_on_failure(on_failure)
    condition = as_condition(inner, Minimum)
    P = Tree("params", params, skip_frozen=True, of_autograd=condition.of_objective)
    H = Tree("hparams", hparams, of_autograd=True)
    call = _Call(
        outer=outer,
        problem=Problem.of(condition, P, [H]),
        choices=Choices(
            choose(solver, condition.symmetric, memory), inner_tol, on_failure, return_info, memory
        ),
        x0=None if x0 is None else P.match("x0", x0),
        has_aux=has_aux,
    )
    refuse_one_level_reduced(condition.functions(), outer)
    group = group_of(P.variables)
    if group is None and getattr(condition, "products", "exact") == "difference":
        group = group_of_replicas(P.variables)
    if group is not None:
        refuse_transforms()
        with together(group):
            return call.answer(None)
    if mapped_by_caller(call.choices.solver):
        return call.answer(None)
    return outside_of_vmaps(call.answer)


@dataclasses.dataclass(frozen=True)
class _Call:
    """One hypergradient: of one system, or outside the caller's vmaps of all their tasks at once.

    Inside, tensors have the task dimensions of `vmaps` in front, and `lead` are their sizes.
    """

    outer: Callable[[Any, Any], Any]
    problem: Problem
    choices: Choices
    x0: list[Tensor] | None
    has_aux: bool

    def answer(self, vmaps: Vmaps | None) -> Hypergradient:
        problem = self.problem if vmaps is None else self.problem.outside(vmaps)
        P, H = problem.params, problem.args[0]
        layout = problem.layout()
        lead = () if vmaps is None else vmaps.sizes
        choices = self.choices

        def plain(tensor: Tensor) -> Tensor:
            return detached(tensor if vmaps is None else vmaps.unwrapped(tensor))

        # Autograd stops a loss that changes a float argument in place; the others are copies.
        tensors = [plain(t) if t.is_floating_point() else plain(t).clone() for t in problem.tensors]
        start = None if self.x0 is None else layout.flatten([plain(t) for t in self.x0], lead)
        before = versions(tensors)
        of_outer = Draw()
        of_inner = Draw(after=of_outer)
        loss = _OuterLoss(self.outer, problem, self.has_aux, of_outer)
        at = loss.at(tensors)
        forward = needs_product(choices.solver, problem.condition, transpose=True)
        lin = None if vmaps is None else self._of_all_tasks(vmaps, of_inner, forward)
        if lin is None:
            lin = Linearisation(problem, tensors, of_inner, forward=forward)
        if not choices.judged:  # then neither loss is evaluated again, but for products
            of_outer.forget()
            if problem.condition.replays:
                of_inner.forget()
        refuse_past_arguments("inner", lin.record.values, lin.aliases, [P, H])

        refuse_changed(problem, tensors, before)
        use = Terms(lin, loss, tensors, at, judged=choices.judged)
        answer = solved(use, choices, use.slope, transpose=True, x0=start)
        info = dataclasses.replace(answer.info, outer_value=at.value)
        if choices.on_failure != "ignore":
            warn_of_unused(H, "Neither outer nor inner", at.direct, use.indirect)
        sources = [*self.problem.tensors, *at.captured, *lin.captured]
        leaves = answer.leaves
        with nullcontext() if vmaps is None else vmaps.entered():
            if choices.figures:
                solution = layout.split(answer.u)
                if vmaps is not None:
                    solution, info = vmaps.wrapped_tree((solution, info))
                info = dataclasses.replace(info, solution=P.fill(solution))
            if vmaps is not None:
                leaves = [vmaps.wrapped(leaf) for leaf in leaves]
            leaves = refuse_derivatives(leaves, sources, _not_differentiable, plain=being_traced())
            aux = pytree.tree_map_only(Tensor, torch.Tensor.detach, at.aux)
            info = dataclasses.replace(info, aux=aux)
            return Hypergradient(H.fill(leaves), leaves, info)

    def _of_all_tasks(self, vmaps: Vmaps, draw: Draw, forward: bool) -> Linearisation | None:
        """Evaluate the inner problem, and its matrix, once where all tasks of a vmap share it.

        So it is where test points are mapped over. None where a task has anything of its own: a
        variable, what the functions close over, or random numbers.

        Parameters
        ----------
        vmaps : Vmaps
            The caller's, which have been left.
        draw : Draw
            The random numbers of the inner problem.
        forward : bool
            Whether products with A itself are wanted.

        Returns
        -------
        lin : Linearisation or None
            Without task dimensions.
        """
        if len(vmaps.sizes) != 1 or any(is_batched(t) for t in self.problem.tensors):
            return None
        before = generators()
        tensors = [detached(t) for t in self.problem.tensors]
        try:
            lin = Linearisation(self.problem, tensors, draw, forward=forward)
        except Exception:  # a task's closure cannot be used here: see what fails there
            restore(before)
            draw.forget()
            return None
        if not same(before, generators()):
            restore(before)
            draw.forget()
            return None
        return lin


class Loss(Protocol):
    """An outer loss, or many outputs in its place, which can be differentiated anywhere."""

    def at(self, tensors: list[Tensor], /) -> OuterSlopes:
        """Evaluate and differentiate it at these tensors."""


class Terms(Use):
    """The direct term minus the cross derivative times the solution.

    Parameters
    ----------
    lin : Linearisation
        The inner problem; tasks whose inner problem is the same share one without task dimensions.
    loss : Loss
        The outer loss.
    tensors : list of Tensor
        Those of its problem.
    at : OuterSlopes
        The outer loss there.
    judged : bool
        Whether anybody asks for the inner condition.

    Attributes
    ----------
    slope : Tensor
        The gradient of the outer loss by the inner variables, ``(*tasks, n)``.
    """

    def __init__(
        self,
        lin: Linearisation,
        loss: Loss,
        tensors: list[Tensor],
        at: OuterSlopes,
        *,
        judged: bool = True,
    ) -> None:
        super().__init__(lin)
        self._loss, self._tensors, self._at, self._lead = loss, tensors, at, at.value.shape
        self.slope = lin.layout.flatten(at.cotangent, self._lead)
        if is_vast(self.slope):  # one memory for both
            parts = zip(at.cotangent, lin.layout.split(self.slope), strict=True)
            at.cotangent[:] = [part if part is None else same for part, same in parts]
            lin.let_go(residual=not judged)
        self.indirect: Parts = []
        self._leaves: list[Tensor] = []

    def values(self) -> list[Tensor]:
        """List the outer loss."""
        return [self._at.value]

    def leaves(self, u: Tensor) -> list[Tensor]:
        """Form the hypergradient."""
        self.indirect = self._cross(u)
        self._leaves = self._differences(self._at.direct, self.indirect)
        return self._leaves

    def share(self) -> Tensor:
        """Measure the implicit term against the whole."""
        share = self._size(self.indirect) / self._size(self._leaves)
        return torch.where(torch.isnan(share), torch.ones_like(share), share)

    def effect(self, missing: Tensor, lost: Tensor) -> Tensor:
        """Measure the hypergradient's relative change, no less than what is missing says."""
        change = self._size(self._cross(missing)) / self._scale()
        return torch.maximum(change, lost * self.share())

    def crossed_again(self, crossed: Parts) -> Tensor:
        """Measure the hypergradient's relative change with another cross derivative."""
        there = self._differences(self._at.direct, crossed)
        change = [a - b for a, b in zip(there, self._leaves, strict=True)]
        return self._size(change) / self._scale()

    def _scale(self) -> Tensor:
        """Measure the hypergradient, or a part of its terms where they cancel."""
        terms = self._size(self._at.direct) + self._size(self.indirect)
        return self._size(self._leaves) + _CANCELLED * terms

    def second_look(
        self, newton: NewtonStep, solution: Solution, planned: Tensor
    ) -> SecondLook | None:
        """Form the hypergradient at ``params - step`` with the same u, and what is missing in u."""
        # The rest of the system itself, `planned`, which the solver has left, is not the step's.
        if self.lin.lead != self._lead:
            return None
        lin, at, lead, u = self.lin, self._at, self.lin.lead, solution.x
        outer = self._outer_at(newton.step)
        if outer is None:
            return _lost(at, newton)
        condition = lin.problem.condition
        lean = is_vast(u) and condition.of_objective and lin.record.hessian is None
        lean = lean and solution.further is None
        slope, direct = lin.layout.flatten(outer.cotangent, lead), outer.direct
        if lean:  # one recorded graph at a time, and no vector twice
            left = planned.neg_().add_(slope)
            del outer, slope
            lin.forget()
        try:
            inner = lin.at(shifted(lin, self._tensors, newton.step))
        except Exception:  # the loss does not like what it gets there
            return _lost(at, newton)
        if lean:
            inner.let_go()
            left.sub_(inner.transposed(u))
        else:
            left = slope - inner.transposed(u) - planned
        there = self._differences(direct, inner.cross(u))
        change = self._changed(there, left, solution, inner.cross if lean else lin.cross)
        return SecondLook(change, inner.residual - newton.left)

    def _changed(
        self,
        there: list[Tensor],
        left: Tensor,
        solution: Solution,
        cross: Callable[[Tensor], Parts],
    ) -> Tensor:
        """Measure the hypergradient's relative change, with what is missing in the solution.

        Parameters
        ----------
        there : list of Tensor
            The hypergradient a step further on, with the same solution.
        left : Tensor
            The residual of the solution there.
        solution : Solution
            It.
        cross : callable
            ``u -> (dF/dhparams)^T u``.

        Returns
        -------
        change : Tensor
            For each task.
        """
        moved = [a - b for a, b in zip(there, self._leaves, strict=True)]
        if solution.further is not None:
            missing = cross(solution.further(left))
            moved = [a if b is None else a - b for a, b in zip(moved, missing, strict=True)]
            return self._size(moved) / self._scale()
        # The size of what is missing, and not its sign; without a right-hand side nothing is.
        inverse = (norm(solution.x) / norm(self.slope)).nan_to_num(0.0)
        missing = cross(inverse[..., None] * left)
        return (self._size(moved) + self._size(missing)) / self._scale()

    def mere_rounding(self) -> Tensor:
        """Say whether the slope of the outer loss changes by about itself from rounding alone."""
        layout, lead = self.lin.layout, self._lead
        params = layout.flatten([self._tensors[i] for i in self.lin.problem.inner], lead)
        here = self.slope
        there = self._outer_at(4 * torch.finfo(layout.precision).eps * signs(params) * params)
        if there is None:
            return torch.zeros_like(here[..., 0], dtype=torch.bool)
        return norm(layout.flatten(there.cotangent, lead) - here) > _BENDS * norm(here)

    def falls_by(self, step: Tensor) -> Tensor:
        """Measure by how much the outer loss falls on the way to ``params - step``."""
        there = self._outer_at(step)
        return self._at.value - (there.value if there else math.nan)

    def negligible(self, params: Tensor) -> Tensor:
        """Say whether params are nothing at the length on which the outer loss bends.

        So it is where the slope of the loss is nearly the same, but not quite, at params that are
        longer by one over the square root of a rounding.

        Parameters
        ----------
        params : Tensor
            ``(*tasks, n)``.

        Returns
        -------
        nothing : Tensor
            bool, for each task.
        """
        layout, lead = self.lin.layout, self._lead
        eps = torch.finfo(layout.precision).eps
        there = self._outer_at(params / eps**0.5)
        if there is None:
            return super().negligible(params)
        bend = norm(layout.flatten(there.cotangent, lead) - self.slope) / norm(self.slope)
        return (bend > 100 * eps) & (bend < _BENDS)

    def _outer_at(self, step: Tensor) -> OuterSlopes | None:
        """Evaluate the outer loss at ``params - step``; None where it fails."""
        step = step.expand((*self._lead, step.shape[-1]))
        there = shifted(self.lin, self._tensors, step)
        try:
            return self._loss.at(there)
        except Exception:  # the loss does not like what it gets there
            return None

    def places(self, b: Tensor, u: Tensor) -> Iterator[Place]:
        """List all that went into a hypergradient, by name, in the order of its making."""
        lin, at, problem, tensors = self.lin, self._at, self.lin.problem, self._tensors
        P, H = problem.params, problem.args[0]
        yield from of_leaves("", P, [tensors[i] for i in problem.inner], data)
        yield from of_leaves("", H, [tensors[i] for i in problem.outer], data)
        assert isinstance(self._loss, _OuterLoss)
        outer = self._loss.outer
        again = of_value(lambda: problem.outputs(outer, tensors))
        yield Place("the outer loss", at.value, again, argument="outer")
        for tree, slopes in ((P, at.cotangent), (H, at.direct)):
            yield from of_leaves("the gradient of the outer loss by ", tree, slopes, derivative)
        yield from inner_places(lin)
        solution = lin.layout.split(u)
        for position, leaf in enumerate(solution):
            path = P.variable_path(position)
            yield Place(f"the solution of the linear system at {path}", leaf, solve)
        yield from of_leaves("the cross derivative by ", H, self.indirect, derivative)

    def _differences(self, direct: Parts, indirect: Parts) -> list[Tensor]:
        like = [self._tensors[i] for i in self.lin.problem.outer]
        return [_difference(d, c, h) for d, c, h in zip(direct, indirect, like, strict=True)]

    def _cross(self, u: Tensor) -> Parts:
        """Form ``(dF/dhparams)^T u``, for each task's u where the tasks share the inner problem."""
        if self.lin.lead == self._lead:
            return self.lin.cross(u)
        connected = [part is not None for part in self.lin.cross(u[0])]

        def one(v: Tensor) -> list[Tensor]:
            return [part for part in self.lin.cross(v) if part is not None]

        parts = iter(by_rows(one, u) if any(connected) else [])
        return [next(parts) if known else None for known in connected]

    def _size(self, terms: Parts) -> Tensor:
        return size_of(terms, self._lead, self._at.value.detach())


@dataclasses.dataclass(frozen=True)
class _OuterLoss:
    """The outer loss of a problem, whose evaluations all see the same random numbers."""

    outer: Callable[[Any, Any], Any]
    problem: Problem
    has_aux: bool
    draw: Draw

    def at(self, tensors: list[Tensor]) -> OuterSlopes:
        """Evaluate and differentiate it."""
        with self.draw.evaluation():
            return outer_gradient(self.outer, self.problem, tensors, self.has_aux)


def _lost(at: OuterSlopes, newton: NewtonStep) -> SecondLook:
    """Say that nothing is known a step further on."""
    return SecondLook(torch.full_like(at.value, math.inf), newton.step * math.inf)


def _difference(direct: Tensor | None, indirect: Tensor | None, like: Tensor) -> Tensor:
    if direct is None and indirect is None:
        return torch.zeros_like(like.detach())
    if indirect is None:
        assert direct is not None
        return direct.detach().clone(memory_format=torch.contiguous_format)
    if direct is None:
        return -indirect.detach()
    return (direct - indirect).detach()


def refuse_changed(problem: Problem, tensors: list[Tensor], before: list[int]) -> None:
    """Raise if a loss has changed one of its arguments in place."""
    for place, (then, now) in enumerate(zip(before, versions(tensors), strict=True)):
        if then != now:
            raise changed_in_place("A loss", problem.path(place), leaf=problem.path(place))


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "implicit_grad returns a detached hypergradient that cannot be differentiated again. Make "
        "the inner solver differentiable with custom_argmin, and differentiate outer through it."
    )
