"""Where a `Bilevel` evaluates and differentiates the losses: here alone."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._autograd.known_graphs import KnownGraphs
from .._autograd.products import Replay, filled, gradient_of
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, record, refuse_past_arguments
from .._autograd.refused_modules import WHOLE
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached
from .._compiled.session import compiling
from .._implicit.linearisation import Linearisation
from .._implicit.outer_slopes import outer_gradient
from .._pytrees import Tree
from ..conditions._base import Condition, require_all
from ..conditions._inner_problem import Problem
from ..conditions._minimum import Minimum
from ._batches import Batch
from ._replay import Batches, replayed

Leaves = list[Tensor]


@dataclasses.dataclass
class Products:
    """The products of one batch of the inner problem with a vector u, all from one evaluation.

    Attributes
    ----------
    residual : Tensor
        F, flat.
    product : Tensor
        ``A^T u``, flat.
    cross : list of Tensor
        ``(dF/dhparams)^T u``, a tensor for each variable.
    """

    residual: Tensor
    product: Tensor
    cross: Leaves


class At(NamedTuple):
    """A point: tensors in the places of the variables of either level; None: as they are."""

    params: Sequence[Tensor] | None = None
    hparams: Sequence[Tensor] | None = None


HERE = At()


class Derivatives:
    """The losses of a problem, evaluated and differentiated on batches.

    A loss that runs no modules is evaluated under the guard until its graph is known; then
    without it (`KnownGraphs`).

    Parameters
    ----------
    problem : Problem
        The inner problem.
    outer : callable
        The outer loss.

    Attributes
    ----------
    bare : list of bool
        Whether the parameters, and the hyperparameters, are one tensor by itself.
    checked : bool
        Whether the inner loss is known to reach no variable past its arguments.
    """

    def __init__(self, problem: Problem, outer: Callable[..., Any]) -> None:
        self.problem, self._outer = problem, outer
        self.layout = problem.layout()
        self.checked = False
        self._fixed: list[Tensor] | None = None  # of a trace: where it is evaluated
        self._trees = problem.trees
        self.bare = [_is_one(tree) for tree in self._trees]
        # Of the outer loss, of the inner loss, and of that with the hyperparameters constant.
        self._of_outer, self._of_inner, self._of_params = (KnownGraphs() for _ in range(3))
        condition = problem.condition
        exact = getattr(condition, "products", "exact") == "exact"
        plain = exact and all(
            len(tree.tensors) == len(tree.variables) and {*map(type, tree.variables)} <= WHOLE
            for tree in self._trees
        )
        self._of_outer.open = plain
        self._of_inner.open = self._of_params.open = plain and type(condition) is Minimum

    @property
    def outer_loss(self) -> Callable[..., Any]:
        """The outer loss, of params, hparams and a batch."""
        return self._outer

    def at(
        self, problem: Problem, outer: Callable[..., Any], tensors: Sequence[Tensor]
    ) -> Derivatives:
        """Make the same of other losses, which are evaluated at these tensors alone."""
        own = copy.copy(self)
        own.problem, own._outer, own._fixed = problem, outer, list(tensors)
        own._of_outer, own._of_inner, own._of_params = (KnownGraphs() for _ in range(3))
        for known in (own._of_outer, own._of_inner, own._of_params):
            known.open = False
        return own

    def inner_on(self, batch: Batch) -> Condition:
        """Pose the inner problem on one batch, as a function of params and hparams."""
        condition = self.problem.condition
        if not batch.args:
            return condition
        assert dataclasses.is_dataclass(condition)
        bound = {
            field.name: functools.partial(_followed, getattr(condition, field.name), batch)
            for field in dataclasses.fields(condition)
            if callable(getattr(condition, field.name))
        }
        replaced: Any = dataclasses.replace(condition, **bound)
        return replaced

    def outer_on(self, batch: Batch) -> Callable[..., Any]:
        """Bind the outer loss to one batch, as a function of params and hparams."""
        return functools.partial(_followed, self._outer, batch) if batch.args else self._outer

    # --- three kinds of evaluation -------------------------------------------------------

    def outer(self, batch: Batch, at: At = HERE) -> tuple[Tensor, Tensor, Leaves]:
        """Evaluate the outer loss, with its gradients by params (flat) and hparams."""
        session = compiling()
        if session is not None:

            def evaluate(own: Derivatives, on: Batches, _: Sequence[Tensor]) -> Leaves:
                value, by_params, by_hparams = own._outer_slopes(on["outer"], at)
                return [value, by_params, *by_hparams]

            there = self._tensors(at)
            made = replayed(session, self, ("outer",), {"outer": batch}, there, (), evaluate)
            if made is not None:
                return made[0], made[1], made[2:]
        return self._outer_slopes(batch, at)

    def _outer_slopes(self, batch: Batch, at: At) -> tuple[Tensor, Tensor, Leaves]:
        known = self._of_outer
        seen = self._again(known, self._outer, batch, at)
        if seen is None:
            loss = known.noting(self.outer_on(batch), self._variables)
            tensors = self._tensors(at)
            value, _, by_params, by_hparams, _ = outer_gradient(loss, self.problem, tensors, False)
            known.learn()
        else:
            value, inner, outer = seen
            slopes = gradient_of(value, [*inner, *outer], create_graph=False)
            value, count = value.detach(), len(inner)
            by_params, by_hparams = slopes[:count], slopes[count:]
        hparams = self._trees[1].variables
        return value, self.layout.flatten(by_params), _filled(by_hparams, hparams)

    def inner(self, batch: Batch, at: At = HERE, *, by_hparams: bool) -> tuple[Tensor, Leaves]:
        """Evaluate the inner loss, with its gradient by params and, if asked for, hparams."""
        session = compiling()
        if session is not None:

            def evaluate(own: Derivatives, on: Batches, _: Sequence[Tensor]) -> Leaves:
                value, slopes = own._inner_slopes(on["inner"], at, by_hparams)
                return [value, *slopes]

            of = ("inner", "all" if by_hparams else "params")
            there = self._tensors(at)
            made = replayed(session, self, of, {"inner": batch}, there, (), evaluate)
            if made is not None:
                return made[0], made[1:]
        return self._inner_slopes(batch, at, by_hparams)

    def _inner_slopes(self, batch: Batch, at: At, by_hparams: bool) -> tuple[Tensor, Leaves]:
        known = self._of_inner if by_hparams else self._of_params
        seen = self._again(known, self._inner, batch, at, by_hparams)
        variables = [*self._trees[0].variables, *(self._trees[1].variables if by_hparams else ())]
        if seen is None:
            value, slopes = self._first_order(known, batch, at, by_hparams)
        else:
            value, inner, outer = seen
            slopes = gradient_of(
                value, [*inner, *outer] if by_hparams else inner, create_graph=False
            )
        require_all(self.problem, slopes[: len(self.problem.inner)])
        return value.detach(), _filled(slopes, variables)

    def products(
        self, batch: Batch, u: Tensor, at: At = HERE, *, product: bool = True, cross: bool = True
    ) -> Products:
        """Form F, and ``A^T u`` and ``(dF/dhparams)^T u`` as asked for, from one evaluation."""
        session = compiling()
        if session is not None:

            def evaluate(own: Derivatives, on: Batches, extra: Sequence[Tensor]) -> Leaves:
                seen = own._products(on["inner"], extra[0], at, product, cross)
                return [seen.residual, *([seen.product] if product else []), *seen.cross]

            of = ("inner", "products", *(["A"] if product else []), *(["cross"] if cross else []))
            there = self._tensors(at)
            made = replayed(session, self, of, {"inner": batch}, there, [u], evaluate)
            if made is not None:
                residual, *rest = made
                image = rest.pop(0) if product else u
                return Products(residual, image, rest)
        return self._products(batch, u, at, product, cross)

    def _products(self, batch: Batch, u: Tensor, at: At, product: bool, cross: bool) -> Products:
        hparams = self._trees[1].variables
        seen = self._again(self._of_inner, self._inner, batch, at)
        pulled: Sequence[Tensor | None]
        if seen is not None:
            value, inner, outer = seen
            gradient = gradient_of(value, inner, create_graph=True)
            require_all(self.problem, gradient)
            count = len(inner) if product else 0
            inputs = [*(inner if product else ()), *(outer if cross else ())]
            pulled = Replay(gradient, inputs)(self.layout.split(u))
            residual = self.layout.flatten(gradient).detach()
            return Products(
                residual,
                self.layout.flatten(pulled[:count]) if product else u,
                _filled(pulled[count:], hparams) if cross else [],
            )
        lin = self.linearised(batch, at)
        if product and cross and self.problem.condition.twice and _replayed(lin):
            # A is the derivative of F: one pass backward gives both.
            count = len(self.problem.inner)
            pulled = Replay(lin.record.residual, lin.aliases, lin.notes.around)(
                self.layout.split(u)
            )
            image, crossed = self.layout.flatten(pulled[:count]), pulled[count:]
        else:
            image = lin.transposed(u) if product else u
            crossed = lin.cross(u) if cross else []
        return Products(lin.residual, image, _filled(crossed, hparams) if cross else [])

    def both(
        self, inner: Batch, outer: Batch, u: Tensor, at: At = HERE
    ) -> tuple[Products, tuple[Tensor, Tensor, Leaves]]:
        """Form the products of the inner loss with u, and the slopes of the outer one."""
        session = compiling()
        if session is not None:

            def evaluate(own: Derivatives, on: Batches, extra: Sequence[Tensor]) -> Leaves:
                seen = own._products(on["inner"], extra[0], at, True, True)
                value, by_params, by_hparams = own._outer_slopes(on["outer"], at)
                return [value, by_params, *by_hparams, seen.residual, seen.product, *seen.cross]

            on, there = {"inner": inner, "outer": outer}, self._tensors(at)
            made = replayed(session, self, ("both",), on, there, [u], evaluate)
            if made is not None:
                end = 2 + len(self._trees[1].variables)
                slopes = made[0], made[1], made[2:end]
                return Products(made[end], made[end + 1], made[end + 2 :]), slopes
        return self._products(inner, u, at, True, True), self._outer_slopes(outer, at)

    # --- under the guard -----------------------------------------------------------------

    def linearised(self, batch: Batch, at: At = HERE) -> Linearisation:
        """Record the inner problem on one batch."""
        known = self._of_inner
        problem = self._noted(known, batch)
        lin = Linearisation(problem, self._tensors(at), Draw())
        self._check(known, lin.record.values, lin.aliases)
        known.learn()
        return lin

    def _first_order(
        self, known: KnownGraphs, batch: Batch, at: At, by_hparams: bool
    ) -> tuple[Tensor, list[Tensor | None]]:
        problem = self._noted(known, batch)
        places = [*problem.inner, *(problem.outer if by_hparams else ())]
        tensors = self._tensors(at)

        def evaluate(recording: Recording) -> tuple[Tensor, list[Tensor | None]]:
            values = problem.condition.probe(problem, recording.placed(tensors, places))
            recording.returned(values)
            value = torch.stack(values).sum() if len(values) > 1 else values[0]
            self._check(known, values, recording.aliases)
            return value.detach(), gradient_of(value, recording.aliases, create_graph=False)

        answer = record(evaluate, [tensors[i] for i in places], problem.trees)
        known.learn()
        return answer

    def _noted(self, known: KnownGraphs, batch: Batch) -> Problem:
        """Pose the inner problem on one batch, to be learnt from."""
        condition = self.inner_on(batch)
        if known.open:
            assert isinstance(condition, Minimum)
            condition = Minimum(known.noting(condition.f, self._variables))
        return dataclasses.replace(self.problem, condition=condition)

    def _tensors(self, at: At) -> list[Tensor]:
        if self._fixed is not None:
            return list(self._fixed)
        tensors = [detached(t) for t in self.problem.tensors]
        for places, given in ((self.problem.inner, at.params), (self.problem.outer, at.hparams)):
            for place, value in zip(places, given or (), strict=given is not None):
                tensors[place] = value
        return tensors

    def _check(
        self, known: KnownGraphs, values: Sequence[Tensor], aliases: Sequence[Tensor]
    ) -> None:
        """Refuse a loss that reaches a variable past its arguments: where its graph is new."""
        if known.open or not self.checked:
            refuse_past_arguments("inner", values, aliases, self._trees)

    # --- without it ----------------------------------------------------------------------

    def _inner(self, *args: Any) -> Any:
        condition: Any = self.problem.condition
        return condition.f(*args)

    def _again(
        self,
        known: KnownGraphs,
        loss: Callable[..., Any],
        batch: Batch,
        at: At,
        by_hparams: bool = True,
    ) -> tuple[Tensor, Leaves, Leaves] | None:
        """Evaluate a loss whose graph is known: its value and the variables; else None."""
        if not known.open:
            return None
        params, hparams = self._trees
        inner = [detached(v).requires_grad_() for v in at.params or params.variables]
        outer = [detached(v) for v in at.hparams or hparams.variables]
        if by_hparams:
            outer = [v.requires_grad_() for v in outer]
        args = self._built(0, inner), self._built(1, outer), *batch.args
        value = known.evaluate(lambda: loss(*args), [*inner, *outer], self._trees)
        return None if value is None else (value, inner, outer)

    def _built(self, level: int, variables: Leaves) -> Any:
        """Build an argument of its variables."""
        return variables[0] if self.bare[level] else self._trees[level].rebuild(variables)

    def _variables(self, params: Any, hparams: Any, *batch: Any) -> Leaves:
        """Pick the variables of both levels among the arguments of a loss."""
        return [
            leaves[i]
            for tree, value in zip(self._trees, (params, hparams), strict=True)
            for leaves in (pytree.tree_flatten(value)[0],)
            for i in tree.where
        ]


def _is_one(tree: Tree) -> bool:
    """Say whether the argument is one tensor, and no container of it."""
    mark = object()
    return len(tree.variables) == 1 and tree.rebuild([mark]) is mark


def _replayed(lin: Linearisation) -> bool:
    return isinstance(lin.record.transposed, Replay)


def _followed(function: Callable[..., Any], batch: Batch, *args: Any) -> Any:
    """Call a loss with the batch after its other arguments."""
    return function(*args, *batch.args)


def _filled(leaves: Sequence[Tensor | None], like: Sequence[Tensor]) -> Leaves:
    return [leaf.detach() for leaf in filled(leaves, like)]
