"""First derivatives of an objective that runs a module of several processes, and differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.in_place import InPlace
from .._autograd.products import Parts
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, narrowest, record, surroundings
from .._autograd.shards import whole_ones
from .._errors import UnsupportedOperation
from .._pytrees import Layout
from ..solvers._vectors import norm
from ._base import Condition
from ._difference import Differences, Step, minus
from ._first_derivatives import Slopes, added, times
from ._inner_problem import Problem
from ._passes import Passes


class InPlaceSlopes:
    """First derivatives by ``.backward()`` of a module whose own parameters are moved in place.

    The objective is the mean over processes of what each of them returns, as the module's gradients
    are.

    Parameters
    ----------
    problem : Problem
        The inner problem.
    draw : Draw
        Its random numbers.
    passes : Passes
        Over its batches.
    of_batch : callable
        ``batch -> condition`` whose values add up to the objective of one batch.
    own : InPlace
        The module's parameters.
    """

    def __init__(
        self,
        problem: Problem,
        draw: Draw,
        passes: Passes,
        of_batch: Callable[[Any], Condition],
        own: InPlace,
    ) -> None:
        if problem.axes:
            raise UnsupportedOperation(
                "A module of several processes runs one problem after the other: call outside of "
                "vmap and of batches of tasks."
            )
        self.problem, self.narrowest = problem, problem.layout().precision
        self.captured: list[Tensor] = []
        self._draw, self._passes, self._of_batch, self._own = draw, passes, of_batch, own
        self._around = surroundings([t.device.type for t in problem.tensors])
        own.agree(whole_ones([t.detach() for t in problem.tensors if t.is_floating_point()]))

    def __call__(self, tensors: Sequence[Tensor], *, outer: bool = False) -> Slopes:
        """Evaluate once, or once for each batch."""
        total: Slopes | None = None
        count = 0
        with self._around(), self._draw.evaluation():
            for batch in self._passes:
                slopes = self._of_one(self._of_batch(batch), tensors, outer)
                if total is not None:
                    slopes = Slopes(
                        total.value + slopes.value,
                        added(total.inner, slopes.inner, own=True),
                        added(total.outer, slopes.outer, own=True),
                    )
                total, count = slopes, count + 1
        assert total is not None
        by_inner, by_outer = (times(parts, 1 / count) for parts in (total.inner, total.outer))
        return Slopes(total.value / count, by_inner, by_outer)

    def _of_one(self, condition: Condition, tensors: Sequence[Tensor], outer: bool) -> Slopes:
        problem, own = self.problem, self._own
        places = problem.outer if outer else ()

        def evaluate(recording: Recording) -> Slopes:
            with own.at([tensors[i] for i in problem.inner]):
                given = recording.placed(tensors, places)
                for place, parameter in zip(problem.inner, own.parameters, strict=True):
                    given[place] = parameter
                values = condition.probe(problem, given)
                self.narrowest = narrowest(values, self.narrowest)
                value = torch.stack(values).sum() if len(values) > 1 else values[0]
                return Slopes(*map(_listed, own.backward(value, recording.aliases)))

        variables = [tensors[i] for i in places]
        return record(evaluate, variables, problem.trees, draw=Draw(), in_pieces=True)


def _listed(part: Any) -> Any:
    return part if isinstance(part, Tensor) else list(part)


class PlacedDifferences(Differences):
    """Differences of gradients whose steps are measured over all processes.

    Lengths are those of flat vectors, which know where their entries lie; the rest is done leaf by
    leaf, so that no further vector is held while the objective is evaluated.
    """

    @property
    def _layout(self) -> Layout:
        return self._problem.layout()

    def _step(self, places: Sequence[int]) -> Step:
        self._require_inner(places)
        inner = [self._tensors[i] for i in places]
        return Step(norm(self._layout.flatten(inner)), self._slopes.narrowest)

    def _measured(self, v: Parts, reach: Tensor) -> Sequence[Parts]:
        inner, crossed = super()._measured(v, reach)
        return [self._layout.flatten(inner)], crossed

    def _of_tasks(
        self, places: Sequence[int], v: Parts, reach: Tensor, *, outer: bool
    ) -> tuple[Parts, Parts]:
        self._require_inner(places)
        length = norm(self._layout.flatten(v))
        if not bool(length > 0):
            none = [None] * len(self._problem.outer)
            return [None if part is None else part * 0.0 for part in v], none
        h, over = float(reach / length), length / (2 * reach)
        ahead, behind = (self._moved(v, sign * h, outer) for sign in (1, -1))
        pairs = zip(ahead.inner, behind.inner, strict=True)
        return [self._minus(a, b, float(over)) for a, b in pairs], minus(
            ahead.outer, behind.outer, over
        )

    def _moved(self, v: Parts, h: float, outer: bool) -> Slopes:
        given, dtype = list(self._tensors), self._layout.dtype
        for place, part in zip(self._problem.inner, v, strict=True):
            if part is not None:
                at = self._tensors[place]
                given[place] = torch.add(at.to(dtype), part.to(dtype), alpha=h).to(at.dtype)
        return self._slopes(given, outer=outer)

    def _minus(self, a: Tensor | None, b: Tensor | None, over: float) -> Tensor | None:
        known, dtype = b if a is None else a, self._layout.dtype
        if known is None:
            return None
        left, right = (torch.zeros_like(known) if t is None else t for t in (a, b))
        return (left.to(dtype) - right.to(dtype)).mul_(over)

    def _require_inner(self, places: Sequence[int]) -> None:
        """Raise for a forward product, which hypergradients have no need of."""
        if tuple(places) != tuple(self._problem.inner):
            raise UnsupportedOperation(
                "The variables lie in pieces on several processes, or their module runs there: a "
                "derivative by differences is not to be had in forward mode. Use backward()."
            )
