"""A condition linearised at a point: the operator A, its transpose and the cross derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._autograd.products import Parts, Replay, filled
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, record
from .._autograd.rows import by_rows, refuse_mapping
from .._autograd.shards import (
    loses_derivatives,
    lost_derivatives,
    placed_like,
    refused,
    unknown_like,
)
from .._autograd.shared_factor import multiplies_matrices
from .._autograd.tested_nodes import WRONG_WHEN_MAPPED
from .._autograd.trace import Notes, detached, graph
from .._errors import UnsupportedOperation
from ..conditions._base import Condition, Point, Product, Record, recorded
from ..conditions._inner_problem import Problem
from ..conditions._objective import OfBatches
from ..solvers._factorisation import signs
from ..solvers._vectors import dense_by_products

_FUSED_NORMS = ("NativeLayerNorm", "NativeBatchNorm", "CudnnBatchNorm", "MiopenBatchNorm")


class Linearisation:
    """F and its derivatives at a point, from one evaluation of the user's functions.

    Vectors are flat, ``(*tasks, n)``, with the task axes along which the matrices differ. A
    further axis in front, of right-hand sides that share a matrix, is mapped over.

    Parameters
    ----------
    problem : Problem
        What is linearised.
    tensors : sequence of Tensor
        Where. Products are differentiable in those that carry derivatives.
    draw : Draw
        The random numbers of the evaluation.
    forward : bool
        Whether products with A itself are wanted, and not those with its transpose alone.
    cross_forward : bool
        The same for the cross derivative.
    again : bool
        Whether a product will be differentiated.
    tasks : sequence of int, optional
        Sizes of all task axes: every task gets a matrix of its own, also where they are shared.
    inside : callable, optional
        ``inside(linearisation, seed)``, called while the evaluation is being recorded, with a
        zero that is recorded too; its results are kept as `extra`.
    """

    def __init__(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        draw: Draw,
        *,
        forward: bool = False,
        cross_forward: bool = False,
        again: bool = False,
        tasks: Sequence[int] | None = None,
        inside: Callable[[Linearisation, Tensor], Any] | None = None,
    ) -> None:
        self.problem = problem if tasks is None else problem.with_own_axes()
        self.tensors, self.draw = tensors, draw
        self.layout = problem.layout()
        self.extra: Any = None
        inner = problem.inner
        places = [*inner, *problem.outer]
        seeded = forward or cross_forward or again or inside is not None
        seeded = seeded or not problem.condition.twice
        exact = getattr(problem.condition, "products", "exact") == "exact"
        if self.layout.space is not None and exact and loses_derivatives():
            self._evaluate(places)  # a module of several processes is refused by its own name
            raise lost_derivatives()
        if not problem.condition.replays:
            if again or inside is not None:
                raise no_second_derivative(problem.condition)
            self._record_by_itself(forward)
            return
        if tasks is None:
            self.lead = tensors[inner[0]].shape[: len(problem.own_axes)]
        else:
            self.lead = torch.Size(tasks)

        def evaluate(recording: Recording) -> None:
            self.aliases = aliases = recording.aliases
            seed = aliases.pop() if seeded else None
            given = recording.placed(tensors, places)
            if tasks is not None:
                for place in inner:
                    given[place] = problem.one_for_each(given[place], tasks)
            params, args = [given[i] for i in inner], aliases[len(inner) :]
            point = Point(self.problem, given, params, seed, forward, args)
            self.record = recorded(self.problem.condition, point, cross_forward=cross_forward)
            recording.returned(self.record.values)
            self.captured, self.notes = recording.captured(), recording.notes
            # Whether products are formed one at a time.
            self.one_by_one = self.record.fused or any(map(maps_wrongly, self.record.residual))
            if tasks is not None:
                refuse_third_derivatives(self.record.residual)
            if inside is not None:
                assert seed is not None
                self.extra = inside(self, seed)

        variables = [tensors[i] for i in places]
        if seeded:
            variables.append(torch.zeros((), dtype=self.layout.dtype, device=self.layout.device))
        record(evaluate, variables, problem.trees, draw=draw, in_pieces=True)
        self.residual = self.layout.flatten(self.record.residual, self.lead).detach()

    def let_go(self, *, residual: bool = False) -> None:
        """Free the recorded condition, which no product reads; `residual`: that vector too."""
        known = self.record
        for replay in (known.transposed, known.product, known.hessian, known.cross):
            if isinstance(replay, Replay):
                replay.let_go()
        if residual:  # nobody will ask
            self.residual = unknown_like(self.residual)
        self.record.residual = list(self.layout.split(self.residual))

    def forget(self) -> None:
        """Free the recorded graph, which is recorded again where a product is asked for."""
        known = self.record
        if not self.problem.condition.replays:
            return
        again = functools.cache(partial(Linearisation, self.problem, self.tensors, self.draw))

        def recorded(name: str) -> Product:
            return lambda parts, create_graph: getattr(again().record, name)(parts, create_graph)

        self.record = Record(
            values=[value.detach() for value in known.values],
            residual=list(self.layout.split(self.residual)),
            transposed=recorded("transposed"),
            product=None if known.product is None else recorded("product"),
            cross=recorded("cross"),
        )

    def _evaluate(self, places: Sequence[int]) -> None:
        """Call the user's functions once, for what they refuse."""
        problem, tensors = self.problem, self.tensors

        def values(recording: Recording) -> list[Tensor]:
            return problem.condition.probe(problem, recording.placed(tensors, places))

        variables = [tensors[i] for i in places]
        record(values, variables, problem.trees, draw=self.draw, in_pieces=True)

    def _record_by_itself(self, forward: bool) -> None:
        """Let a condition make its own recordings, for one product after the other."""
        problem = self.problem
        tensors = [detached(t) for t in self.tensors]
        params = [tensors[i] for i in problem.inner]
        self.lead = params[0].shape[: len(problem.own_axes)]
        self.record = problem.condition.record(
            Point(problem, tensors, params, None, forward, draw=self.draw)
        )
        self.aliases, self.notes = [], Notes()
        self.captured = self.record.captured
        self.one_by_one = self.record.differences is not None
        self.residual = self.layout.flatten(self.record.residual, self.lead).detach()

    def measure(self, b: Tensor, *, looks: bool) -> Tensor | float:
        """Measure the relative error of products, along `b`; zero where they are exact.

        Parameters
        ----------
        b : Tensor
            A right-hand side: where it is zero, or there are several, any vector.
        looks : bool
            Whether the host may look at values.

        Returns
        -------
        noise : Tensor or float
            For each task.
        """
        if self.record.differences is None:
            return 0.0
        v = b[(0,) * (b.ndim - 1 - len(self.lead))]
        nothing = (v == 0).all(dim=-1, keepdim=True)
        if not looks or any_task(nothing):
            v = torch.where(nothing, signs(v), v)
        return self.record.differences.measure(self.layout.split(v), looks=looks)

    @property
    def tried(self) -> int:
        """How many products have been formed to choose the step of differences."""
        return 0 if self.record.differences is None else self.record.differences.step.tried

    def again(self, u: Tensor, *, looks: bool) -> tuple[Tensor, Parts]:
        """Form ``A^T u`` and ``(dF/dargs)^T u`` by differences with other steps."""
        differences, outer = self.record.differences, self.problem.outer
        assert differences is not None

        def one(u: Tensor) -> list[Tensor]:
            refuse_mapping()
            image, crossed = differences.again(self.layout.split(u), looks=looks)
            parts = filled(crossed, [self.tensors[i] for i in outer])
            return [self.layout.flatten(image, self.lead), *parts]

        image, *crossed = by_rows(one, u) if u.ndim > len(self.lead) + 1 else one(u)
        return image, crossed

    @functools.cached_property
    def multiplies(self) -> bool:
        """Whether a product multiplies matrices."""
        return multiplies_matrices(self.record.residual)

    @property
    def params(self) -> Tensor:
        """The inner variables as one vector."""
        return self.layout.flatten([self.tensors[i] for i in self.problem.inner], self.lead)

    def at(self, tensors: Sequence[Tensor]) -> Linearisation:
        """Linearise the same at other tensors, with the same random numbers and steps."""
        lin = Linearisation(self.problem, tensors, self.draw)
        if lin.record.differences is not None and self.record.differences is not None:
            lin.record.differences.step = self.record.differences.step
        return lin

    def transposed(self, u: Tensor, create_graph: bool = False) -> Tensor:
        """Form ``A^T u``."""
        return self._apply(self.record.transposed, u, create_graph)

    def product(self, v: Tensor, create_graph: bool = False) -> Tensor:
        """Form ``A v``."""
        assert self.record.product is not None
        return self._apply(self.record.product, v, create_graph)

    def operator(self, transpose: bool) -> Callable[[Tensor], Tensor]:
        """Make the same products with A, or with its transpose, with nothing around them."""
        layout, dims = self.layout, len(self.lead) + 1
        bare, product = None, self._product(transpose)
        if dims == 1 and layout.is_flat and isinstance(product, Replay) and not self.one_by_one:
            bare = product.bare()
        del product  # the graph may be forgotten

        def form(v: Tensor) -> Tensor:
            product = self._product(transpose)
            if v.ndim > dims:
                return self._apply(product, v, False)
            if bare is not None:
                return bare(v)
            return layout.flatten(self._formed(product, layout.split(v)), v.shape[:-1])

        return form

    def _product(self, transpose: bool) -> Product:
        product = self.record.transposed if transpose else self.record.product
        assert product is not None
        return product

    def _formed(self, product: Product, parts: Parts, create_graph: bool = False) -> Parts:
        """Form one product, or have `by_rows` ask for it once a row where that is needed."""
        if self.one_by_one:
            refuse_mapping()
        return product(parts, create_graph)

    def cross(self, u: Tensor, create_graph: bool = False) -> Parts:
        """Form ``(dF/dargs)^T u``, a tensor for each differentiated one; None: not connected."""
        assert self.record.cross is not None
        parts = self._formed(self.record.cross, self.layout.split(u), create_graph)
        if self.layout.space is None:
            return parts
        outer = [self.tensors[i] for i in self.problem.outer]
        return placed_like(parts, outer, [self.tensors[i] for i in self.problem.inner])

    def cross_forward(self, tangents: Sequence[Tensor], create_graph: bool = False) -> Tensor:
        """Form ``(dF/dargs) tangents``."""
        assert self.record.cross_forward is not None
        pushed = self._formed(self.record.cross_forward, tangents, create_graph)
        return self.layout.flatten(pushed, self.lead)

    def dense(self, transpose: bool) -> Tensor:
        """Form A, or its transpose, as a matrix ``(*tasks, n, n)``."""
        if self.layout.space is not None:
            raise refused("the matrix")
        return self.dense_of(self._product(transpose))

    def dense_of(self, recorded: Product) -> Tensor:
        """Form the matrix of a recorded product."""
        product = partial(self.replayed, recorded)
        n = self.layout.n
        if not self.lead:
            return dense_by_products(product, self.residual)
        eye = torch.eye(n, dtype=self.layout.dtype, device=self.layout.device)
        columns = eye.reshape(n, *[1] * len(self.lead), n).expand(n, *self.lead, n)
        return product(columns).movedim(0, -1)

    def replayed(self, product: Product, u: Tensor) -> Tensor:
        """Form another product that was recorded with the condition."""
        return self._apply(product, u, False)

    def _apply(self, product: Product, v: Tensor, create_graph: bool) -> Tensor:
        if v.ndim > len(self.lead) + 1:
            if isinstance(product, OfBatches):  # all rows in one pass
                rows = product.rows(self.layout.split(v))
                return self.layout.flatten(rows, v.shape[:-1])
            one = partial(self._apply, product, create_graph=create_graph)
            mapped: Tensor = by_rows(one, v, matrices=self.multiplies)
            return mapped
        if create_graph and not torch.is_grad_enabled():
            with torch.enable_grad():
                return self._apply(product, v, create_graph)
        pushed = self._formed(product, self.layout.split(v), create_graph)
        return self.layout.flatten(pushed, v.shape[:-1])


def no_second_derivative(condition: Condition) -> UnsupportedOperation:
    """Say that a solution cannot be differentiated twice, since no graph of it is recorded."""
    name, cure = type(condition).__name__, 'products="exact"'
    if getattr(condition, "products", None) == "exact":
        name, cure = f"{name} with batches", "one batch of all the data, without batches"
    else:
        name = f'{name} with products="difference"'
    return UnsupportedOperation(
        f"A second derivative through the solution of a {name} is not to be had: its products are "
        f"formed anew each time, and no graph of them is recorded. Use {cure}."
    )


def maps_wrongly(part: Tensor | None) -> bool:
    """Say whether a mapped derivative of a tensor would be wrong in PyTorch itself."""
    if part is None:
        return False
    return not WRONG_WHEN_MAPPED.isdisjoint({node.name() for node, _ in graph(part).edges})


def refuse_third_derivatives(residual: Sequence[Tensor | None]) -> None:
    """Raise where a second derivative through the solution would be wrong in PyTorch itself.

    It needs the third derivative of the objective. In PyTorch 2.13 that of the fused norm layers
    is wrong, since their double backward takes the mean and the deviation for constants.

    Raises
    ------
    UnsupportedOperation
        If the condition was computed through such a layer.
    """
    for part in residual:
        for node in graph(part).nodes if part is not None else ():
            fused = node.name().startswith(_FUSED_NORMS)
            if fused and getattr(node, "_saved_training", True):
                raise UnsupportedOperation(
                    "A second derivative through this solution needs the third derivative of a "
                    "norm layer, which is wrong in PyTorch for layer_norm, instance_norm and "
                    "batch_norm with batch statistics. Use GroupNorm (GroupNorm(1, n) in place of "
                    "LayerNorm) or RMSNorm, or write the norm out in elementary operations."
                )
