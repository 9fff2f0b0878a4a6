"""Condition objects: the equation of an inner solution, and how products with A are formed."""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Self

from torch import Tensor

from .._autograd.attention import has_fused
from .._autograd.double_backward import refuse_once_differentiable
from .._autograd.products import ForwardReplay, Parts, Replay, gradient_of
from .._autograd.trace import graph
from .._autograd.transforms import transforms_active
from .._errors import NotConnected
from .._mistakes import Fields
from ._inner_problem import Problem

if TYPE_CHECKING:
    from .._autograd.random_numbers import Draw
    from ._difference import Differences

Product = Callable[[Parts, bool], Parts]


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
    cross, cross_forward : callable, optional
        ``u -> (dF/dargs)^T u`` and ``tangents -> (dF/dargs) tangents``; None: from the graph of the
        residual.
    differences : Differences, optional
        Where products are differences: how they are made.
    captured : list of Tensor
        Of a condition that makes its own recordings: as in `Recording.captured`.
    """

    values: list[Tensor]
    residual: list[Tensor | None]
    transposed: Product
    product: Product | None
    hessian: Product | None = None
    sides: Sequence[Product] = ()
    dependent: Callable[[], Tensor] | None = None
    fused: bool = False
    cross: Product | None = None
    cross_forward: Product | None = None
    differences: Differences | None = None
    captured: list[Tensor] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Point:
    """Where a condition is recorded.

    Attributes
    ----------
    problem : Problem
        The inner problem.
    tensors : list of Tensor
        All tensors of its arguments, with aliases in the places of the variables.
    params : list of Tensor
        The aliases of the inner variables.
    seed : Tensor or None
        A zero, from which forward products are recorded.
    forward : bool
        Whether products with A itself are asked for.
    args : list of Tensor
        The aliases of the differentiated arguments.
    draw : Draw, optional
        The random numbers, for a condition that makes its own recordings: there the tensors are
        plain, and not aliases.
    """

    problem: Problem
    tensors: list[Tensor]
    params: list[Tensor]
    seed: Tensor | None
    forward: bool
    args: Sequence[Tensor] = ()
    draw: Draw | None = None

    def gradient(self, value: Tensor) -> list[Tensor | None]:
        """Take the gradient of an objective, on which every inner variable must depend."""
        gradient = recorded_gradient(value, self.params)
        require_all(self.problem, gradient)
        return gradient

    def product(self, residual: Sequence[Tensor | None]) -> ForwardReplay | None:
        """Record the product with A of a residual, where it is asked for."""
        if not self.forward or self.seed is None:
            return None
        return ForwardReplay(residual, self.params, self.seed)


class Condition(Fields, ABC):
    """The equation that an inner solution satisfies: F(params, *args) = 0, like ``params``.

    Every condition has a bool `symmetric`, which says that A = dF/dparams is known to be symmetric.
    """

    #: Whether second derivatives through the solution are right.
    twice: ClassVar[bool] = True
    #: Whether F is the gradient of an objective, whose variables are those of an optimiser.
    of_objective: ClassVar[bool] = False
    #: Whether A = I - J for a map that is meant to contract.
    contraction: ClassVar[bool] = False
    #: Whether the solution is meant to be a minimum, where no curvature is negative.
    minimum: ClassVar[bool] = False
    #: The reason why a point is a kink, for messages.
    kink: ClassVar[str] = ""

    @property
    def replays(self) -> bool:
        """Whether all products come from one recorded graph, which may be differentiated again."""
        return True

    if TYPE_CHECKING:  # a class variable of some conditions and a field of others

        @property
        def symmetric(self) -> bool: ...

    def functions(self) -> list[Callable[..., Any]]:
        """List the user's functions, to look for what they capture."""
        itself: Any = self
        values = [getattr(self, field.name) for field in dataclasses.fields(itself)]
        return [value for value in values if callable(value)]

    def chain(self) -> tuple[int | None, ...] | None:
        """Say which functions take the value of another as their first argument.

        Returns
        -------
        chain : tuple of (int or None), optional
            For each function the place of the other; None: it takes ``(params, *args)`` as it is.
        """
        return None

    def with_functions(self, functions: Sequence[Callable[..., Any]]) -> Self:
        """Put other functions in the places of the user's, as `functions` lists them.

        Parameters
        ----------
        functions : sequence of callable
            The others.

        Returns
        -------
        condition : Condition
            Of the same kind.
        """
        itself: Any = self
        own = self.functions()
        names = [f.name for f in dataclasses.fields(itself) if getattr(self, f.name) in own]
        changed: Self = dataclasses.replace(itself, **dict(zip(names, functions, strict=True)))
        return changed

    @abstractmethod
    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate once, without any derivative, what the condition depends on."""

    @abstractmethod
    def record(self, point: Point) -> Record:
        """Evaluate F once at a point's aliases."""


def as_condition(inner: Any, default: Callable[[Any], Condition]) -> Condition:
    """Take `inner` itself if it is a condition object, else make the default kind of a callable."""
    if isinstance(inner, Condition):
        return inner
    if not callable(inner):
        raise TypeError(
            "inner must be a callable or a condition object such as Root(F); got "
            f"{type(inner).__name__}."
        )
    return default(inner)


def recorded(condition: Condition, point: Point, *, cross_forward: bool = False) -> Record:
    """Record a condition, with the cross derivative from the graph of the residual."""
    record = condition.record(point)
    if record.cross is None:
        record.cross = Replay(record.residual, point.args)
    if cross_forward and record.cross_forward is None:
        assert point.seed is not None
        record.cross_forward = ForwardReplay(record.residual, point.args, point.seed)
    return record


def record_equation(point: Point, values: list[Tensor], symmetric: bool) -> Record:
    leaves: set[int] = set()
    edges: set[tuple[Any, int]] = set()
    for value in values:
        reached = graph(value)
        leaves |= {id(leaf) for leaf in reached.leaves}
        edges |= reached.edges
    reached_params = [
        p if id(p) in leaves or (p.grad_fn, p.output_nr) in edges else None for p in point.params
    ]
    require_all(point.problem, reached_params)
    # Of a map one derivative is enough, unless that is differentiated: there is a seed then.
    fused = has_fused({node for node, _ in edges}, again=point.seed is not None)
    transposed = Replay(values, point.params)
    residual: list[Tensor | None] = list(values)
    product: Product | None = transposed if symmetric else point.product(residual)
    return Record(values, residual, transposed, product, fused=fused)


def recorded_gradient(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor | None]:
    has_fused(graph(value).nodes, again=True)
    if value.requires_grad and inputs and not transforms_active():
        refuse_once_differentiable(value, inputs)
    return gradient_of(value, inputs, create_graph=True)


def require_all(problem: Problem, reached: Sequence[Tensor | None]) -> None:
    for position, part in enumerate(reached):
        if part is None:
            raise NotConnected(
                f"The inner problem does not depend on {problem.params.variable_path(position)}, "
                "so its solution is not determined by it. Leave that leaf out of params, or use it "
                "in inner: a module must be called as torch.func.functional_call(module, params, "
                "args), and a .detach() or torch.no_grad() inside cuts the connection.",
                leaf=problem.params.variable_path(position),
            )


def plus(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """Add two tensors, where None stands for zero."""
    if a is None or b is None:
        return b if a is None else a
    return a + b
