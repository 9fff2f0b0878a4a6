"""What `Minimum` and `GaussNewton` share: a mean over batches, and how products are formed."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, Literal, Self

import torch
from torch import Tensor

from .._autograd.in_place import InPlace
from .._autograd.products import Parts, filled
from .._autograd.random_numbers import Draw, generators, restore
from .._autograd.recording import Recording, record, surroundings
from .._autograd.refused_modules import RunsOnProcesses
from .._autograd.rows import by_rows
from .._autograd.shards import group_of
from ._base import Condition, Point, Record, recorded, require_all
from ._difference import Differences, own_arguments
from ._first_derivatives import FirstDerivatives, RecordedSlopes, added, times
from ._in_place import InPlaceSlopes, PlacedDifferences
from ._inner_problem import Problem
from ._passes import Passes, refuse_iterators

Products = Literal["exact", "difference"]


class Objective(Condition):
    """A condition that is the gradient of an objective: that of one batch, or a mean over several.

    Attributes
    ----------
    batches : iterable, optional
        Over which the objective is averaged.
    products : {"exact", "difference"}
        How products with its Hessian are formed.
    on_batch : callable, optional
        Called after each batch of a pass.
    """

    batches: Iterable[Any] | None
    products: Products
    on_batch: Callable[[int], Any] | None
    symmetric: ClassVar[bool] = True
    of_objective: ClassVar[bool] = True

    def __post_init__(self) -> None:
        """Refuse batches that cannot be passed over again, and unknown kinds of products."""
        refuse_iterators(self.batches)
        if self.products not in ("exact", "difference"):
            raise ValueError(f"products must be 'exact' or 'difference'; got {self.products!r}.")

    @property
    def replays(self) -> bool:
        """Whether all products come from one recorded graph."""
        return self.batches is None and self.products == "exact"

    @abstractmethod
    def of_batch(self, batch: Any) -> Self:
        """Make the condition of one batch: without batches the condition itself."""

    @abstractmethod
    def values(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the terms of the objective of a condition that has no batches."""

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the terms of the objective, of a mean on its first batch."""
        first = next(iter(Passes(self.batches)))
        return self.of_batch(first).values(problem, tensors)

    def record(self, point: Point) -> Record:
        """Record the gradient, and how products are formed."""
        if self.replays:
            return self._graph(point)
        passes = Passes(self.batches, self.on_batch, self._processes(point.problem))
        draw = point.draw
        assert draw is not None
        if self.products == "exact":
            return self._passed(point, passes, draw)
        problem, before = own_arguments(point.problem), generators()
        slopes: FirstDerivatives = RecordedSlopes(
            problem, draw, passes, self.of_batch, own_backward=True
        )
        module = None
        try:
            differences = self._differences(slopes, point, passes, draw)
        except RunsOnProcesses as seen:  # before it has computed anything
            module = seen.module
        if module is not None:
            restore(before)
            draw.forget()
            own = InPlace(module, problem.params)
            passes.group = own.group
            slopes = InPlaceSlopes(problem, draw, passes, self.of_batch, own)
            differences = self._differences(slopes, point, passes, draw)
        at = differences.taken()
        require_all(point.problem, at.inner)
        return Record(
            [at.value], at.inner, differences.product, differences.product,
            hessian=None if self.twice else differences.hessian, cross=differences.cross,
            cross_forward=differences.cross_forward, differences=differences,
            captured=slopes.captured,
        )  # fmt: skip

    @abstractmethod
    def _graph(self, point: Point) -> Record:
        """Record one graph, from which all products come."""

    def _processes(self, problem: Problem) -> Any:
        """Find the processes that evaluate it together; None: there are none."""
        of_functions = [getattr(f, "processes", None) for f in self.functions()]
        return group_of(problem.params.variables) or next(filter(None, of_functions), None)

    def _differences(
        self, slopes: FirstDerivatives, point: Point, passes: Passes, draw: Draw
    ) -> Differences:
        """Say how products are made of first derivatives."""
        placed = isinstance(slopes, InPlaceSlopes) or point.problem.layout().space is not None
        return (PlacedDifferences if placed else Differences)(slopes, point.problem, point.tensors)

    def _passed(self, point: Point, passes: Passes, draw: Draw) -> Record:
        """Make a record whose exact products are passes over the batches."""
        slopes = RecordedSlopes(point.problem, draw, passes, self.of_batch)
        at = slopes(point.tensors)
        require_all(point.problem, at.inner)
        product, cross, cross_forward, hessian = (
            OfBatches(self, point, passes, draw, name)
            for name in ("transposed", "cross", "cross_forward", "hessian")
        )
        return Record(
            [at.value], at.inner, product, product,
            hessian=None if self.twice else hessian, cross=cross, cross_forward=cross_forward,
            captured=slopes.captured,
        )  # fmt: skip


class OfBatches:
    """An exact product with the mean over batches: a pass that records each batch and frees it.

    Parameters
    ----------
    condition : Objective
        The mean.
    point : Point
        Where, with plain tensors.
    passes : Passes
        Over its batches.
    draw : Draw
        The random numbers of a pass.
    name : str
        Which product of a `Record`.
    """

    def __init__(
        self, condition: Objective, point: Point, passes: Passes, draw: Draw, name: str
    ) -> None:
        self._condition, self._point, self._name = condition, point, name
        self._passes, self._draw = passes, draw
        self._around = surroundings([t.device.type for t in point.tensors])

    def __call__(self, v: Parts, create_graph: bool = False) -> Parts:
        """Form one product."""
        return self._mean(lambda product, like: product(v, False))

    def rows(self, vectors: Sequence[Tensor]) -> Parts:
        """Form a product for each row of leaves, all in one pass."""

        def each(product: Any, like: Sequence[Tensor]) -> Parts:
            image: Parts = by_rows(lambda *v: filled(product(v, False), like), *vectors)
            return image

        return self._mean(each)

    def _mean(self, form: Callable[[Any, Sequence[Tensor]], Parts]) -> Parts:
        total: Parts | None = None
        count = 0
        with self._around(), self._draw.evaluation():
            for parts in self._each(form):
                total = parts if total is None else added(total, parts, own=count > 1)
                count += 1
        assert total is not None
        return times(total, 1 / count)

    def _each(self, form: Callable[[Any, Sequence[Tensor]], Parts]) -> Iterator[Parts]:
        point, problem, tensors = self._point, self._point.problem, self._point.tensors
        inner = problem.inner
        places = [*inner, *problem.outer]
        forward = self._name == "cross_forward"
        zero = torch.zeros((), dtype=problem.layout().dtype, device=problem.layout().device)

        def evaluate(recording: Recording, condition: Condition) -> Parts:
            seed = recording.aliases.pop()
            given = recording.placed(tensors, places)
            params, args = [given[i] for i in inner], [given[i] for i in problem.outer]
            at = Point(problem, given, params, seed, point.forward, args)
            made = recorded(condition, at, cross_forward=forward)
            product = getattr(made, self._name) or made.transposed
            like = args if self._name == "cross" else params
            return [None if p is None else p.detach() for p in form(product, like)]

        for batch in self._passes:
            one = functools.partial(evaluate, condition=self._condition.of_batch(batch))
            variables = [*(tensors[i] for i in places), zero]
            yield record(one, variables, problem.trees, draw=Draw())


def with_batch(function: Callable[..., Any], batch: Any) -> Callable[..., Any]:
    """Give a function a batch as its last argument."""
    return lambda *args: function(*args, batch)
