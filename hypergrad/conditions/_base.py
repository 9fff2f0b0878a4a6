"""Condition objects: what an inner solution satisfies, and how products with A are formed."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from torch import Tensor
from torch.utils import _pytree as pytree

from .._autograd.attention import has_fused
from .._autograd.double_backward import refuse_once_differentiable
from .._autograd.products import ForwardReplay, Parts, Replay, gradient_of
from .._autograd.trace import graph
from .._autograd.transforms import transforms_active
from .._errors import NotConnected
from .._mistakes import Fields
from ._inner_problem import Problem

Product = Callable[[Parts, bool], Parts]

_LEAST_SQUARES = (
    " A root has as many equations as unknowns. Residuals of a least-squares problem are none: use "
    "Minimum(lambda p, h: residuals(p, h).square().sum() / 2), or GaussNewton(residuals, lambda "
    "r, h: r.square().sum() / 2)."
)


@dataclasses.dataclass
class Record:
    """A condition's value at a point, recorded so that products can be replayed.

    Attributes
    ----------
    values : list of Tensor
        What the user's functions returned.
    residual : list of Tensor or None
        F, a tensor for each inner variable; None where it is constant zero.
    transposed : callable
        ``u -> A^T u``.
    product : callable, optional
        ``v -> A v``; None where it was not asked for.
    hessian : callable, optional
        The product with the true Hessian, where `transposed` takes another matrix.
    sides : list of callable
        Of a condition with kinks: ``u -> (D' - D)^T u``, where D is the derivative that was taken
        of the map with the kinks and D' the one a little to a side.
    dependent : callable, optional
        Whether the gradients of the active constraints are linearly dependent, for each task.
    fused : bool
        Whether a product goes through a fused kernel of attention, which cannot be mapped.
    """

    values: list[Tensor]
    residual: list[Tensor | None]
    transposed: Product
    product: Product | None
    hessian: Product | None = None
    sides: Sequence[Product] = ()
    dependent: Callable[[], Tensor] | None = None
    fused: bool = False


class Condition(Fields, ABC):
    """What an inner solution satisfies: F(params, *args) = 0, shaped like ``params``.

    Every condition has a bool `symmetric`: whether A = dF/dparams is known to be symmetric.
    """

    #: Whether second derivatives through the solution are right.
    twice: ClassVar[bool] = True
    #: Whether F is the gradient of an objective, whose variables are those of an optimiser.
    of_objective: ClassVar[bool] = False
    #: Whether A = I - J for a map that is meant to contract.
    contraction: ClassVar[bool] = False
    #: Whether the solution is meant to be a minimum, where no curvature is negative.
    minimum: ClassVar[bool] = False
    #: What makes a point a kink, for messages.
    kink: ClassVar[str] = ""

    if TYPE_CHECKING:  # a class variable of some conditions and a field of others

        @property
        def symmetric(self) -> bool: ...

    @abstractmethod
    def functions(self) -> list[Callable[..., Any]]:
        """The user's functions, to look for what they capture."""

    @abstractmethod
    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """What the condition depends on, evaluated once without any derivative."""

    @abstractmethod
    def record(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        seed: Tensor | None,
        *,
        forward: bool,
    ) -> Record:
        """Evaluate F once at aliases; `forward`: with products by A, from a `seed` (a zero)."""


@dataclasses.dataclass(frozen=True)
class Minimum(Condition):
    """The inner solution minimises ``f(params, *args)``: its gradient is zero there.

    Negative curvature at ``params`` is said, whatever solver meets it. A stationary point that is
    meant to be no minimum is a ``Root(gradient, symmetric=True)``.

    Parameters
    ----------
    f : callable
        ``f(params, hparams)``, a scalar tensor. In the decorators ``f(params, *args)``.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = hypergrad.Minimum(lambda w, lam: (w - 1) ** 2 + lam * w**2)
    >>> w, lam = torch.tensor(0.5), torch.tensor(1.0)  # the minimiser is 1 / (1 + lam)
    >>> hypergrad.implicit_grad(lambda w, lam: w, inner, w, lam)  # -1 / (1 + lam)^2
    tensor(-0.2500)
    """

    f: Callable[..., Any]
    symmetric: ClassVar[bool] = True
    minimum: ClassVar[bool] = True
    of_objective: ClassVar[bool] = True

    def functions(self) -> list[Callable[..., Any]]:
        """The objective."""
        return [self.f]

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The objective's value."""
        return [problem.objective("inner", self.f, tensors)]

    def record(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        seed: Tensor | None,
        *,
        forward: bool,
    ) -> Record:
        """The gradient, recorded."""
        value = problem.objective("inner", self.f, tensors)
        gradient = _gradient(value, params)
        _require_all(problem, gradient)
        hessian = Replay(gradient, params)
        return Record([value], gradient, hessian, hessian)


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

    def functions(self) -> list[Callable[..., Any]]:
        """The outputs, the loss and the regulariser."""
        return [f for f in (self.outputs, self.loss, self.regulariser) if f is not None]

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The loss and the regulariser."""
        outputs = problem.outputs(self.outputs, tensors)
        found = [problem.objective("loss", self.loss, tensors, first=outputs)]
        if self.regulariser is not None:
            found.append(problem.objective("regulariser", self.regulariser, tensors))
        return found

    def record(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        seed: Tensor | None,
        *,
        forward: bool,
    ) -> Record:
        """The exact gradient, and the products of the Gauss-Newton matrix."""
        outputs = problem.outputs(self.outputs, tensors)
        # Fresh aliases: one output may have been computed from another.
        outputs = pytree.tree_map(lambda o: o.view_as(o) if _differentiable(o) else o, outputs)
        leaves = [leaf for leaf in pytree.tree_leaves(outputs) if _differentiable(leaf)]
        value = problem.objective("loss", self.loss, tensors, first=outputs)
        of_outputs = _gradient(value, leaves)
        gradient = _gradient(value, params)
        values = [value]
        regular: Replay | None = None
        if self.regulariser is not None:
            penalty = problem.objective("regulariser", self.regulariser, tensors)
            values.append(penalty)
            of_penalty = _gradient(penalty, params)
            regular = Replay(of_penalty, params)
            gradient = [plus(a, b) for a, b in zip(gradient, of_penalty, strict=True)]
        _require_all(problem, gradient)
        assert seed is not None
        jacobian = ForwardReplay(leaves, params, seed)
        curvature = Replay(of_outputs, leaves)
        pullback = Replay(leaves, params)

        def product(v: Parts, create_graph: bool = False) -> Parts:
            found = pullback(curvature(jacobian(v)))
            if regular is not None:
                found = [plus(a, b) for a, b in zip(found, regular(v), strict=True)]
            return found

        return Record(values, gradient, product, product, hessian=Replay(gradient, params))


@dataclasses.dataclass(frozen=True)
class Root(Condition):
    """The inner solution is a root: ``F(params, *args) = 0``.

    Parameters
    ----------
    F : callable
        ``F(params, hparams)``, a pytree shaped like ``params``.
    symmetric : bool
        Whether dF/dparams is symmetric; allows CG.

    Examples
    --------
    >>> import torch, hypergrad
    >>> kepler = hypergrad.Root(lambda E, e: E - e * torch.sin(E) - 1.0)
    >>> E, e = torch.tensor(0.5).acos(), torch.tensor(0.0)
    >>> hypergrad.implicit_grad(lambda E, e: E, kepler, torch.tensor(1.0), e)  # sin(1)
    tensor(0.8415)
    """

    F: Callable[..., Any]
    symmetric: bool = False

    def functions(self) -> list[Callable[..., Any]]:
        """The equation."""
        return [self.F]

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The equation's value."""
        return problem.equation("F(params, ...)", self.F, tensors, _LEAST_SQUARES)

    def record(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        seed: Tensor | None,
        *,
        forward: bool,
    ) -> Record:
        """The equation, recorded."""
        values = problem.equation("F(params, ...)", self.F, tensors, _LEAST_SQUARES)
        return _record_equation(problem, values, params, seed, self.symmetric, forward=forward)


@dataclasses.dataclass(frozen=True)
class FixedPoint(Condition):
    """The inner solution is a fixed point: ``T(params, *args) = params``.

    The condition is ``params - T(params, *args)``, so A = I - dT/dparams.

    Parameters
    ----------
    T : callable
        ``T(params, hparams)``, a pytree shaped like ``params``.
    symmetric : bool
        Whether dT/dparams is symmetric; allows CG.

    Examples
    --------
    >>> import torch, hypergrad
    >>> heron = hypergrad.FixedPoint(lambda x, a: (x + a / x) / 2)  # x = sqrt(a)
    >>> hypergrad.implicit_grad(lambda x, a: x, heron, torch.tensor(2.0), torch.tensor(4.0))
    tensor(0.2500)
    """

    T: Callable[..., Any]
    symmetric: bool = False
    contraction: ClassVar[bool] = True

    def functions(self) -> list[Callable[..., Any]]:
        """The map."""
        return [self.T]

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The map's value."""
        return problem.equation("T(params, ...)", self.T, tensors)

    def record(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        seed: Tensor | None,
        *,
        forward: bool,
    ) -> Record:
        """``params - T``, recorded."""
        values = problem.equation("T(params, ...)", self.T, tensors)
        residual = [p - value for p, value in zip(params, values, strict=True)]
        return _record_equation(problem, residual, params, seed, self.symmetric, forward=forward)


def as_condition(inner: Any, default: type[Minimum] | type[Root] | type[FixedPoint]) -> Condition:
    """`inner` itself if it is a condition object, else the default kind made from a callable."""
    if isinstance(inner, Condition):
        return inner
    if not callable(inner):
        raise TypeError(
            "inner must be a callable or a condition object such as Root(F); got "
            f"{type(inner).__name__}."
        )
    return default(inner)


def _record_equation(
    problem: Problem,
    values: list[Tensor],
    params: Sequence[Tensor],
    seed: Tensor | None,
    symmetric: bool,
    *,
    forward: bool,
) -> Record:
    leaves: set[int] = set()
    edges: set[tuple[Any, int]] = set()
    for value in values:
        reached = graph(value)
        leaves |= {id(leaf) for leaf in reached.leaves}
        edges |= reached.edges
    reached_params = [
        p if id(p) in leaves or (p.grad_fn, p.output_nr) in edges else None for p in params
    ]
    _require_all(problem, reached_params)
    # Of a map one derivative is enough, unless that is differentiated: there is a seed then.
    fused = has_fused({node for node, _ in edges}, again=seed is not None)
    transposed = Replay(values, params)
    residual: list[Tensor | None] = list(values)
    product: Product | None = transposed if symmetric else None
    if forward and seed is not None and not symmetric:
        product = ForwardReplay(residual, params, seed)
    return Record(values, residual, transposed, product, fused=fused)


def _gradient(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    has_fused(graph(value).nodes, again=True)
    if value.requires_grad and inputs and not transforms_active():
        refuse_once_differentiable(value, inputs)
    return gradient_of(value, inputs, create_graph=True)


def _require_all(problem: Problem, reached: Sequence[Tensor | None]) -> None:
    for position, part in enumerate(reached):
        if part is None:
            raise NotConnected(
                f"The inner problem does not depend on {problem.params.variable_path(position)}, "
                "so its solution is not determined by it. Leave that leaf out of params, or use it "
                "in inner: a module must be called as torch.func.functional_call(module, params, "
                "args), and a .detach() or torch.no_grad() inside cuts the connection."
            )


def _differentiable(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.is_floating_point() and leaf.requires_grad


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The sum, where None stands for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
