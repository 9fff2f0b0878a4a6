"""Inner problems with a non-smooth part or a constraint: fixed points of one gradient step."""

from __future__ import annotations

import dataclasses
import math
from abc import abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._autograd.products import ForwardReplay, Replay
from .._autograd.trace import graph
from .._errors import NotConnected, StructureMismatch
from ._base import Condition, Record, recorded_gradient, require_all
from ._inner_problem import Problem
from ._kinks import directions, reach

StepSize = float | Tensor | Callable[..., Any]


class GradientStep(Condition):
    """``params - P(params - step_size grad f(params, *args), ...)`` with P a prox or a projection.

    Attributes
    ----------
    f : callable
        The smooth part.
    step_size : float, Tensor or callable
        The length of the step.
    """

    f: Callable[..., Any]
    step_size: StepSize
    symmetric: ClassVar[bool] = False
    contraction: ClassVar[bool] = True
    kink: ClassVar[str] = "its prox or projection changes its form there"

    @property
    @abstractmethod
    def outer_map(self) -> tuple[str, Callable[..., Any]]:
        """What P is called in messages, and ``P(v, step_size, *args)``."""

    def step(self, args: Sequence[Any]) -> Any:
        """The step size, a constant for derivatives: the solution does not depend on it."""
        step = self.step_size(*args) if callable(self.step_size) else self.step_size
        if isinstance(step, Tensor):
            if step.numel() != 1:
                raise StructureMismatch(
                    f"step_size must be one number; it has the shape {tuple(step.shape)}.",
                    argument="step_size",
                )
            return step.detach().reshape(())
        return step

    def applied(
        self, problem: Problem, tensors: Sequence[Tensor], v: Sequence[Tensor]
    ) -> list[Tensor]:
        """P at `v`, which takes the place of the inner variables."""
        given = list(tensors)
        for place, part in zip(problem.inner, v, strict=True):
            given[place] = part
        name, outer_map = self.outer_map
        return problem.equation(
            f"{name}(v, ...)", lambda v, *args: outer_map(v, self.step(args), *args), given
        )

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The smooth part and P at the inner variables."""
        value = problem.objective("inner", self.f, tensors)
        return [value, *self.applied(problem, tensors, [tensors[i] for i in problem.inner])]

    def record(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        params: Sequence[Tensor],
        seed: Tensor | None,
        *,
        forward: bool,
    ) -> Record:
        """The step, recorded: `f` is evaluated once, P three times."""
        value = problem.objective("inner", self.f, tensors)
        gradient = recorded_gradient(value, params)
        require_all(problem, gradient)
        layout = problem.layout()

        def length(params: Any, *args: Any) -> Tensor:
            step = self.step(args)
            if isinstance(step, Tensor):
                return step
            # With all digits of a number: what prox is given must be the same.
            return torch.tensor(step, dtype=layout.dtype, device=layout.device)

        step = problem.outputs(length, tensors)
        v = [
            p - step.reshape(step.shape + (1,) * (p.ndim - step.ndim)).to(p.dtype) * g
            for p, g in zip(params, gradient, strict=True)
            if g is not None
        ]
        stepped = self.applied(problem, tensors, v)
        residual = [p - new for p, new in zip(params, stepped, strict=True)]
        outputs: list[Tensor | None] = list(residual)
        return Record(
            values=[value, *stepped],
            residual=outputs,
            transposed=Replay(residual, params),
            product=ForwardReplay(outputs, params, seed) if forward and seed is not None else None,
            sides=self._sides(problem, tensors, v, stepped, residual),
        )

    def _sides(
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        v: Sequence[Tensor],
        stepped: Sequence[Tensor],
        residual: Sequence[Tensor],
    ) -> list[Replay]:
        """``u -> (D' - D)^T u`` with D' the derivative of P a little to either side of `v`."""
        layout, lead = problem.layout(), v[0].shape[: len(problem.own_axes)]
        if not layout.n:
            return []
        flat = layout.flatten([part.detach() for part in v], lead)
        missed = layout.flatten([part.detach() for part in residual], lead)
        distance = reach(flat.abs().amax(dim=-1), missed, layout.precision)
        away = layout.split(distance[..., None] * directions(layout))
        found = []
        for sign in (1, -1):
            moved = [part + sign * a for part, a in zip(v, away, strict=True)]
            there = self.applied(problem, tensors, moved)
            self._refuse_lost(v, stepped, there)
            found.append(Replay([a - b for a, b in zip(there, stepped, strict=True)], v))
        return found

    def _refuse_lost(
        self, v: Sequence[Tensor], stepped: Sequence[Tensor], there: Sequence[Tensor]
    ) -> None:
        """Raise where P moves with `v` and autograd does not see it."""
        reached = set().union(*(graph(part).edges for part in stepped))
        if any((part.grad_fn, part.output_nr) in reached for part in v):
            return
        if not all(torch.equal(a, b) for a, b in zip(there, stepped, strict=True)):
            raise NotConnected(
                f"{self.outer_map[0]} moves with v, but autograd does not see how, so that its "
                "derivative would be lost: a .detach() or .numpy() inside cuts the connection. "
                "Write it in differentiable operations, or take one of hypergrad.prox or "
                "hypergrad.projections.",
                argument=self.outer_map[0],
            )


@dataclasses.dataclass(frozen=True)
class ProximalGradient(GradientStep):
    """The inner solution minimises ``f(params, *args) + g(params, *args)``, g known by its prox.

    The condition is the fixed point of one proximal gradient step,
    ``params = prox(params - step_size * grad f(params, *args), step_size, *args)``, so
    A = I - D (I - step_size H) with D the derivative of the proximal map and H the Hessian of f.
    It is not symmetric. The rows of coordinates that the map holds fixed, such as the zeros of
    the lasso, are those of the identity, so that A is regular where H is so on the others.

    At a kink of the proximal map the derivative is the one that `prox` itself has; with the maps
    of `hypergrad.prox` a coordinate at the kink counts as held fixed. ``info.degeneracy`` says how
    far the sides are apart, and above 1e-2 there is a warning.

    Parameters
    ----------
    f : callable
        ``f(params, hparams)``, a scalar tensor, the smooth part. In the decorators
        ``f(params, *args)``. It is evaluated once, `prox` three times.
    prox : callable
        ``prox(v, step_size, hparams)``, shaped like `params`: the minimiser over x of
        ``||x - v||^2 / 2 + step_size g(x, hparams)``. In the decorators ``prox(v, step_size,
        *args)``. `hypergrad.prox` has the usual ones.
    step_size : float, Tensor or callable
        A number or ``step_size(hparams)`` (in the decorators ``step_size(*args)``), greater than 0.
        The derivative of the solution does not depend on it, and it is taken for a constant. One
        over the largest eigenvalue of H makes the best conditioned A.

    Raises
    ------
    ValueError
        If `step_size` is a number that is not positive.

    References
    ----------
    Parikh and Boyd, Proximal algorithms, 2014, section 4.2; Bertrand et al., Implicit
    differentiation of Lasso-type models, 2020; Blondel et al., Efficient and modular implicit
    differentiation, 2022, table 1.

    Examples
    --------
    >>> import torch, hypergrad
    >>> y = torch.tensor([3.0, 0.5])
    >>> lasso = hypergrad.ProximalGradient(
    ...     lambda w, lam: ((w - y) ** 2).sum() / 2, hypergrad.prox.l1, step_size=0.5
    ... )
    >>> w, lam = torch.tensor([2.0, 0.0]), torch.tensor(1.0)  # y, soft-thresholded at lam
    >>> hypergrad.implicit_grad(lambda w, lam: w.sum(), lasso, w, lam)  # of the one active entry
    tensor(-1.0000)
    """

    f: Callable[..., Any]
    prox: Callable[..., Any]
    step_size: StepSize

    def __post_init__(self) -> None:
        """Refuse a step that is none."""
        check_step_size(self.step_size)

    @property
    def outer_map(self) -> tuple[str, Callable[..., Any]]:
        """The proximal map."""
        return "prox", self.prox

    def functions(self) -> list[Callable[..., Any]]:
        """The smooth part and the proximal map."""
        return [self.f, self.prox]


@dataclasses.dataclass(frozen=True)
class ProjectedGradient(GradientStep):
    """The inner solution minimises ``f(params, *args)`` over a convex set, known by its projection.

    The condition is the fixed point of one projected gradient step,
    ``params = project(params - step_size * grad f(params, *args), *args)``.

    All that is said of `ProximalGradient` holds here: a projection is the proximal map of a set.
    At a kink of the projections of `hypergrad.projections` a bound counts as active.

    Parameters
    ----------
    f : callable
        ``f(params, hparams)``, a scalar tensor. In the decorators ``f(params, *args)``. It is
        evaluated once, `project` three times.
    project : callable
        ``project(v, hparams)``, shaped like `params`: the closest point of the set. In the
        decorators ``project(v, *args)``. `hypergrad.projections` has the usual ones.
    step_size : float, Tensor or callable
        As in `ProximalGradient`.

    Raises
    ------
    ValueError
        If `step_size` is a number that is not positive.

    References
    ----------
    Blondel et al., Efficient and modular implicit differentiation, 2022, table 1.

    Examples
    --------
    >>> import torch, hypergrad
    >>> bounded = hypergrad.ProjectedGradient(
    ...     lambda x, y: ((x - y) ** 2).sum() / 2,
    ...     lambda v, y: hypergrad.projections.box(v, 0.0, 1.0),
    ...     step_size=0.5,
    ... )
    >>> x, y = torch.tensor([1.0, 0.25]), torch.tensor([3.0, 0.25])
    >>> hypergrad.implicit_grad(lambda x, y: x.sum(), bounded, x, y).abs().round(decimals=3)
    tensor([0., 1.])
    """

    f: Callable[..., Any]
    project: Callable[..., Any]
    step_size: StepSize

    def __post_init__(self) -> None:
        """Refuse a step that is none."""
        check_step_size(self.step_size)

    @property
    def outer_map(self) -> tuple[str, Callable[..., Any]]:
        """The projection, which does not depend on the step."""
        return "project", lambda v, step_size, *args: self.project(v, *args)

    def functions(self) -> list[Callable[..., Any]]:
        """The objective and the projection."""
        return [self.f, self.project]


def check_step_size(step_size: Any) -> None:
    """Raise ValueError where a number is no step size."""
    if isinstance(step_size, int | float) and not (0 < step_size < math.inf):
        raise ValueError(f"step_size must be positive and finite; got {step_size!r}.")
