"""First derivatives of an objective that runs a module of several processes, and differences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._autograd.in_place import InPlace
from .._autograd.products import Parts
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, narrowest, record
from .._autograd.shards import whole_ones
from .._errors import UnsupportedOperation
from .._pytrees import Layout
from ..solvers._vectors import norm
from ._base import Condition
from ._difference import Differences, Step, spent
from ._first_derivatives import Displacement, Slopes, SlopesOfPasses, displaced
from ._inner_problem import Problem
from ._passes import Passes


class InPlaceSlopes(SlopesOfPasses):
    """First derivatives by ``.backward()`` of a module whose own parameters are moved in place.

    The objective is the mean over processes of what each of them returns, as the module's gradients
    are.

    Parameters
    ----------
    problem, draw, passes, of_batch
        As in `SlopesOfPasses`.
    own : InPlace
        The module's parameters.
    """

    _own: ClassVar[bool] = True

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
        super().__init__(problem, draw, passes, of_batch)
        self._module = own
        own.agree(whole_ones([t.detach() for t in problem.tensors if t.is_floating_point()]))

    def _of_one(
        self,
        condition: Condition,
        tensors: Sequence[Tensor],
        outer: bool,
        by: Displacement | None,
    ) -> Slopes:
        problem, own = self.problem, self._module
        places = problem.outer if outer else ()
        inner = [tensors[i] for i in problem.inner]
        dtype = problem.layout().dtype

        def evaluate(recording: Recording) -> Slopes:
            with own.at(inner if by is None else displaced(inner, *by, dtype)):
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
        ahead, behind = (
            self._slopes(self._tensors, outer=outer, by=(v, sign * h)) for sign in (1, -1)
        )
        return spent(ahead.inner, behind.inner, over), spent(ahead.outer, behind.outer, over)

    def _require_inner(self, places: Sequence[int]) -> None:
        """Raise for a forward product, which hypergradients have no need of."""
        if tuple(places) != tuple(self._problem.inner):
            raise UnsupportedOperation(
                "The variables lie in pieces on several processes, or their module runs there: a "
                "derivative by differences is not to be had in forward mode. Use backward()."
            )
