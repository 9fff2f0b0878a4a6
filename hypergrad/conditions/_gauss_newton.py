"""A minimum whose curvature is that of Gauss and Newton."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._autograd.double_backward import advice
from .._autograd.products import ForwardReplay, Parts, Replay
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, record, surroundings
from .._autograd.torch_pytrees import pytree
from .._errors import UnsupportedOperation
from ._base import Point, Record, plus, recorded_gradient, require_all
from ._difference import Differences, Step, minus, moved, per_length
from ._first_derivatives import FirstDerivatives, RecordedSlopes, added, times
from ._inner_problem import Problem
from ._objective import Objective, Products, with_batch
from ._passes import Passes


@dataclasses.dataclass(frozen=True)
class GaussNewton(Objective):
    """A minimum whose curvature is taken from the Gauss-Newton matrix.

    The objective is ``loss(outputs(params, hparams), hparams) + regulariser(params, hparams)``.
    Its gradient and the cross derivative are exact; A = J^T (d2 loss) J + Hessian of the
    regulariser, with J the Jacobian of the outputs. With a loss that is convex in the outputs
    and a convex regulariser A cannot have negative curvature. One product with the true Hessian
    measures what A leaves out: where that changes the answer by more than 20 times `inner_tol`, or
    the Hessian is seen to have negative curvature, the answer is no success (with
    ``inner_tol=None`` it is not judged). Second derivatives through the solution raise.

    Parameters
    ----------
    outputs : callable
        ``outputs(params, hparams)``, a pytree of tensors such as a network's predictions.
    loss : callable
        ``loss(outputs, hparams)``, a scalar tensor, convex in the outputs.
    regulariser : callable, optional
        ``regulariser(params, hparams)``, a scalar tensor.
    batches, products, on_batch
        As in `Minimum`. With batches the functions are ``outputs(params, hparams, batch)`` and
        ``loss(outputs, hparams, batch)``; the regulariser gets no batch. By differences the
        outputs are differenced, in one pass a product, and the second derivatives of `loss` and
        of the regulariser alone are needed. Modules of several processes take a `Minimum`.

    References
    ----------
    Schraudolph, Fast curvature matrix-vector products for second-order gradient descent, 2002;
    Martens, Deep learning via Hessian-free optimization, 2010.

    Examples
    --------
    >>> import torch, hypergrad
    >>> x, y = torch.tensor([1.0, 2.0]), torch.tensor([1.0, 1.0])
    >>> inner = hypergrad.GaussNewton(
    ...     outputs=lambda w, lam: w * x,
    ...     loss=lambda z, lam: ((z - y) ** 2).sum() / 2,
    ...     regulariser=lambda w, lam: lam * w**2 / 2,
    ... )
    >>> w, lam = torch.tensor(0.5), torch.tensor(1.0)  # w = x.y / (x.x + lam)
    >>> hypergrad.implicit_grad(lambda w, lam: w, inner, w, lam)  # -w / (x.x + lam)
    tensor(-0.0833)
    """

    outputs: Callable[..., Any]
    loss: Callable[..., Any]
    regulariser: Callable[..., Any] | None = None
    batches: Iterable[Any] | None = None
    products: Products = "exact"
    on_batch: Callable[[int], Any] | None = None
    twice: ClassVar[bool] = False

    def functions(self) -> list[Callable[..., Any]]:
        """List the three functions."""
        of_penalty = [] if self.regulariser is None else [self.regulariser]
        return [self.outputs, self.loss, *of_penalty]

    def chain(self) -> tuple[int | None, ...] | None:
        """Say that the loss takes the outputs."""
        return (None, 0, None)[: len(self.functions())] if self.replays else None

    def of_batch(self, batch: Any) -> GaussNewton:
        """Make the condition of one batch, which the regulariser does not get."""
        if self.batches is None:
            return self
        outputs, loss = with_batch(self.outputs, batch), with_batch(self.loss, batch)
        return GaussNewton(outputs, loss, self.regulariser)

    def values(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the loss and the regulariser."""
        outputs = problem.outputs(self.outputs, tensors)
        values = [problem.objective("loss", self.loss, tensors, first=outputs)]
        if self.regulariser is not None:
            values.append(problem.objective("regulariser", self.regulariser, tensors))
        return values

    def _differences(
        self, slopes: FirstDerivatives, point: Point, passes: Passes, draw: Draw
    ) -> Differences:
        if not isinstance(slopes, RecordedSlopes) or point.problem.layout().space is not None:
            raise UnsupportedOperation(
                "A GaussNewton by differences does not know parameters in pieces, nor modules of "
                'several processes. Use Minimum(f, products="difference").'
            )
        return _OutputDifferences(self, slopes, point, passes, draw)

    def _graph(self, point: Point) -> Record:
        problem, tensors, params, seed = point.problem, point.tensors, point.params, point.seed
        outputs = problem.outputs(self.outputs, tensors)
        # Fresh aliases: one output may have been computed from another.
        outputs = pytree.tree_map(lambda o: o.view_as(o) if _differentiable(o) else o, outputs)
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if _differentiable(leaf)]
        value = problem.objective("loss", self.loss, tensors, first=outputs)
        of_outputs = recorded_gradient(value, leaves)
        gradient = recorded_gradient(value, params)
        values = [value]
        regular: Replay | None = None
        if self.regulariser is not None:
            penalty = problem.objective("regulariser", self.regulariser, tensors)
            values.append(penalty)
            of_penalty = recorded_gradient(penalty, params)
            regular = Replay(of_penalty, params)
            gradient = [plus(a, b) for a, b in zip(gradient, of_penalty, strict=True)]
        require_all(problem, gradient)
        assert seed is not None
        jacobian = ForwardReplay(leaves, params, seed)
        curvature = Replay(of_outputs, leaves)
        pullback = Replay(leaves, params)

        def product(v: Parts, create_graph: bool = False) -> Parts:
            image = pullback(curvature(jacobian(v)))
            if regular is not None:
                image = [plus(a, b) for a, b in zip(image, regular(v), strict=True)]
            return image

        return Record(values, gradient, product, product, hessian=Replay(gradient, params))


class _OutputDifferences(Differences):
    """Products of the Gauss-Newton matrix, from first derivatives of the outputs alone.

    ``J v`` is a central difference of the outputs, the curvature of the loss by them is exact, and
    the product with ``J^T`` is one pass backward.
    """

    def __init__(
        self, inner: GaussNewton, slopes: RecordedSlopes, point: Point, passes: Passes, draw: Draw
    ) -> None:
        super().__init__(slopes, point.problem, point.tensors)
        self._inner, self._given, self._passes, self._draw = inner, point.tensors, passes, draw
        self._around = surroundings([t.device.type for t in point.tensors])
        self._of_gradient = self._step(point.problem.inner)

    @property
    def of_gradient(self) -> Step:
        """The step of the cross derivative, and of the Hessian."""
        return self._of_gradient

    def again(self, u: Parts, *, looks: bool) -> tuple[Parts, Parts]:
        """Form both with other steps."""
        (image,) = self._doubted(self._measured, u, self.step.reach, looks=looks)
        return image, super().again(u, looks=looks)[1]

    def _measured(self, v: Parts, reach: Tensor) -> Sequence[Parts]:
        return [self._product(v, reach)]

    def _product(self, v: Parts, reach: Tensor) -> Parts:
        total: Parts | None = None
        count = 0
        with self._around(), self._draw.evaluation():
            for batch in self._passes:
                image = self._of_one(self._inner.of_batch(batch), v, reach)
                total = image if total is None else added(total, image, own=count > 1)
                count += 1
        assert total is not None
        return times(total, 1 / count)

    def _of_one(self, inner: GaussNewton, v: Parts, reach: Tensor) -> Parts:
        problem, tensors, draw = self._problem, self._given, Draw()
        h, over = per_length(v, reach)

        def outputs(sign: int) -> list[Tensor]:
            there = moved(tensors, problem.inner, v, sign * h)
            with advice(problem.trees), torch.no_grad(), draw.evaluation():
                values = problem.outputs(inner.outputs, there)
            return [leaf for leaf in pytree.tree_leaves(values) if _floating(leaf)]

        pushed = minus(outputs(1), outputs(-1), over)

        def pulled(recording: Recording) -> list[Tensor | None]:
            aliases, given = recording.aliases, recording.placed(tensors, problem.inner)
            values = problem.outputs(inner.outputs, given)
            leaves, spec = pytree.tree_flatten(values)
            places = [i for i, leaf in enumerate(leaves) if _floating(leaf)]
            curved = self._curved(inner, leaves, spec, places, pushed)
            image = Replay([leaves[i] for i in places], aliases)(curved)
            if inner.regulariser is not None:
                penalty = problem.objective("regulariser", inner.regulariser, given)
                bent = Replay(recorded_gradient(penalty, aliases), aliases)(v)
                image = [plus(a, b) for a, b in zip(image, bent, strict=True)]
            return [None if part is None else part.detach() for part in image]

        return record(pulled, [tensors[i] for i in problem.inner], problem.trees, draw=draw)

    def _curved(
        self, inner: GaussNewton, leaves: list[Any], spec: Any, places: list[int], v: Parts
    ) -> Parts:
        """Form the product with the second derivative of the loss by the outputs."""
        problem = self._problem

        def curvature(recording: Recording) -> Parts:
            alone = list(leaves)
            for place, alias in zip(places, recording.aliases, strict=True):
                alone[place] = alias
            first = pytree.tree_unflatten(alone, spec)
            value = problem.objective("loss", inner.loss, self._given, first=first)
            slopes = recorded_gradient(value, recording.aliases)
            like = [part if part is None else part.to(leaves[i].dtype)
                    for i, part in zip(places, v, strict=True)]  # fmt: skip
            return Replay(slopes, recording.aliases)(like)

        return record(curvature, [leaves[i].detach() for i in places], (), draw=Draw())


def _floating(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point()


def _differentiable(leaf: Any) -> bool:
    return _floating(leaf) and leaf.requires_grad
