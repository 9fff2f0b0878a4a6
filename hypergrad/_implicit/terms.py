"""The two terms of a hypergradient, and how they change where something else does."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from .._autograd.products import Parts
from .._autograd.random_numbers import Draw
from .._autograd.rows import by_rows
from ..conditions._inner_problem import Problem
from ..solvers._factorisation import signs
from ..solvers._long import is_vast
from ..solvers._system import NewtonStep, Solution
from ..solvers._vectors import norm
from .causes import Place, data, derivative, inner_places, of_leaves, of_value, solve
from .linearisation import Linearisation
from .outer_slopes import OuterSlopes, outer_gradient
from .second_look import SecondLook, shifted
from .task_norms import size_of
from .uses import Use

_BENDS = 0.1  # the relative change of a slope that is a bend
_CANCELLED = 1e-2  # the rest of two terms that cancel counts as so much of them at least


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
        assert isinstance(self._loss, OuterLoss)
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
class OuterLoss:
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
