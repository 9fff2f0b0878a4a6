"""A minimum whose curvature is that of Gauss and Newton."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .._autograd.products import ForwardReplay, Parts, Replay
from .._autograd.torch_pytrees import pytree
from ._base import Condition, Point, Record, plus, recorded_gradient, require_all
from ._inner_problem import Problem


@dataclasses.dataclass(frozen=True)
class GaussNewton(Condition):
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
    symmetric: ClassVar[bool] = True
    of_objective: ClassVar[bool] = True
    twice: ClassVar[bool] = False

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the loss and the regulariser."""
        outputs = problem.outputs(self.outputs, tensors)
        values = [problem.objective("loss", self.loss, tensors, first=outputs)]
        if self.regulariser is not None:
            values.append(problem.objective("regulariser", self.regulariser, tensors))
        return values

    def record(self, point: Point) -> Record:
        """Record the exact gradient, and the products of the Gauss-Newton matrix."""
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


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad
