"""Inner problems with a non-smooth part or a constraint: fixed points of one gradient step."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._autograd.maps import Taken, selected, taken
from .._autograd.products import Parts, Replay
from .._autograd.trace import graph, reaches
from .._errors import NotConnected, StructureMismatch
from .._pytrees import Layout
from ..solvers._factorisation import signs
from ..solvers._fields import positive
from ..solvers._vectors import norm
from ._base import Condition, Point, Record
from ._inner_problem import Problem
from ._kinks import reach

StepSize = float | Tensor | Callable[..., Any] | None

_POWER_STEPS = 8  # for the largest curvature


class GradientStep(Condition):
    """``params - P(params - step_size grad f(params, *args), ...)`` with P a prox or a projection.

    Attributes
    ----------
    f : callable
        The smooth part.
    step_size : float, Tensor, callable or None
        The length of the step.
    """

    f: Callable[..., Any]
    step_size: StepSize
    symmetric: ClassVar[bool] = False
    contraction: ClassVar[bool] = True
    kink: ClassVar[str] = "its prox or projection changes its form there"
    #: The field that holds P, and how many of ``v, step_size`` it takes in front of the arguments.
    called: ClassVar[str]
    leading: ClassVar[int]

    def __post_init__(self) -> None:
        """Refuse a step that is none."""
        if isinstance(self.step_size, int | float):
            positive("step_size", self.step_size)

    def functions(self) -> list[Callable[..., Any]]:
        """List the smooth part and P."""
        return [self.f, getattr(self, self.called)]

    @property
    def outer_map(self) -> tuple[str, Callable[..., Any]]:
        """Give P, as ``P(v, step_size, *args)``, and its name in messages."""
        return self.called, self._mapped

    @functools.cached_property
    def _takes(self) -> Taken:
        return taken(getattr(self, self.called), self.leading)

    def _mapped(self, v: Any, step_size: Any, *args: Any) -> Any:
        first = (v, step_size)[: self.leading]
        return getattr(self, self.called)(*selected(self._takes.most, first, args))

    def step(self, args: Sequence[Any]) -> Any:
        """Take the caller's step size, a constant for derivatives; one where there is none."""
        if self.step_size is None:
            return 1.0
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
        self,
        problem: Problem,
        tensors: Sequence[Tensor],
        v: Sequence[Tensor],
        step: Tensor | None = None,
    ) -> list[Tensor]:
        """Apply P at `v` in place of the inner variables, with these steps or the caller's."""
        arguments = list(tensors)
        for place, leaf in zip(problem.inner, v, strict=True):
            arguments[place] = leaf
        name, outer_map = self.outer_map

        def of_callers(v: Any, *args: Any) -> Any:
            return outer_map(v, self.step(args), *args)

        def of_tasks(step: Tensor, v: Any, *args: Any) -> Any:
            return outer_map(v, step, *args)

        if step is None:
            return problem.equation(f"{name}(v, ...)", of_callers, arguments)
        return problem.equation(f"{name}(v, ...)", of_tasks, arguments, first=(step,))

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the smooth part and P at the inner variables."""
        value = problem.objective("inner", self.f, tensors)
        return [value, *self.applied(problem, tensors, [tensors[i] for i in problem.inner])]

    def record(self, point: Point) -> Record:
        """Record the step: `f` is evaluated once, P three times."""
        problem, tensors, params = point.problem, point.tensors, point.params
        value = problem.objective("inner", self.f, tensors)
        self._refuse_unclear(point, value)
        gradient = point.gradient(value)
        lead = params[0].shape[: len(problem.own_axes)]
        estimated = None
        if self.step_size is None:
            estimated = _inverse_curvature(Replay(gradient, params), problem.layout(), lead)
        step = self._lengths(problem, tensors) if estimated is None else estimated
        v = [
            p - step.reshape(step.shape + (1,) * (p.ndim - step.ndim)).to(p.dtype) * g
            for p, g in zip(params, gradient, strict=True)
            if g is not None
        ]
        stepped = self.applied(problem, tensors, v, estimated)
        residual = [p - new for p, new in zip(params, stepped, strict=True)]
        outputs: list[Tensor | None] = list(residual)
        # The points to either side of v are looked at by the same map.
        applied = functools.partial(self.applied, problem, tensors, step=estimated)
        return Record(
            values=[value, *stepped],
            residual=outputs,
            transposed=Replay(residual, params),
            product=point.product(outputs),
            sides=self._sides(problem, applied, v, stepped, residual),
        )

    def _refuse_unclear(self, point: Point, value: Tensor) -> None:
        """Raise where P would take an argument that may be meant for the smooth part alone."""
        problem = point.problem
        given = len(problem.args)
        owner = [i for i, tree in enumerate(problem.trees) for _ in tree.tensors]
        for place in self._takes.unclear(self.f, given):
            for at, alias in zip(problem.outer, point.args, strict=True):
                if owner[at] == place + 1 and reaches(value, alias):
                    raise self._takes.unclear_error(self.f, given, place)

    def _lengths(self, problem: Problem, tensors: Sequence[Tensor]) -> Tensor:
        """Take the caller's step, for each task."""
        layout = problem.layout()

        def length(params: Any, *args: Any) -> Tensor:
            step = self.step(args)
            if isinstance(step, Tensor):
                return step
            # With all digits of a number: prox must be passed the same.
            return torch.tensor(step, dtype=layout.dtype, device=layout.device)

        lengths: Tensor = problem.outputs(length, tensors)
        return lengths

    def _sides(
        self,
        problem: Problem,
        applied: Callable[[Sequence[Tensor]], list[Tensor]],
        v: Sequence[Tensor],
        stepped: Sequence[Tensor],
        residual: Sequence[Tensor],
    ) -> list[Replay]:
        """Record ``u -> (D' - D)^T u``, D' the derivative of P a little to either side of `v`."""
        layout, lead = problem.layout(), v[0].shape[: len(problem.own_axes)]
        if not layout.n:
            return []
        flat = layout.flatten([leaf.detach() for leaf in v], lead)
        missed = layout.flatten([leaf.detach() for leaf in residual], lead)
        distance = reach(flat.abs().amax(dim=-1), missed, layout.precision)
        # At zero there is no size to go by: any way off shows the sides of a cone.
        distance = torch.where(distance > 0, distance, torch.finfo(layout.precision).eps)
        # Ones would not do: a projection onto the simplex does not see them.
        away = layout.split(distance[..., None] * signs(flat))
        sides = []
        for sign in (1, -1):
            there = applied([leaf + sign * a for leaf, a in zip(v, away, strict=True)])
            self._refuse_lost(v, stepped, there)
            sides.append(Replay([a - b for a, b in zip(there, stepped, strict=True)], v))
        return sides

    def _refuse_lost(
        self, v: Sequence[Tensor], stepped: Sequence[Tensor], there: Sequence[Tensor]
    ) -> None:
        """Raise where P moves with `v` and autograd does not see it."""
        reached = set().union(*(graph(leaf).edges for leaf in stepped))
        if any((leaf.grad_fn, leaf.output_nr) in reached for leaf in v):
            return
        if not all(torch.equal(a, b) for a, b in zip(there, stepped, strict=True)):
            raise NotConnected(
                f"{self.called} moves with v, but autograd does not see how, so that its "
                "derivative would be lost: a .detach() or .numpy() inside cuts the connection. "
                "Write it in differentiable operations, or take one of hypergrad.prox or "
                "hypergrad.projections.",
                argument=self.called,
            )


def _inverse_curvature(
    hessian: Callable[[Parts], Parts], layout: Layout, lead: Sequence[int]
) -> Tensor:
    """Estimate one over the largest curvature of each task by power steps; one for none."""
    v = signs(torch.empty(layout.n, dtype=layout.dtype, device=layout.device))
    v = v.expand(*lead, layout.n)
    seen = torch.zeros_like(v[..., 0])
    for _ in range(_POWER_STEPS):
        unit = v / torch.where(seen > 0, seen, norm(v))[..., None]
        v = layout.flatten(hessian(layout.split(unit)), lead).detach()
        seen = norm(v)
    usable = torch.isfinite(seen) & (seen > 0)
    return torch.where(usable, 1 / torch.where(usable, seen, 1.0), 1.0).detach()


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
        *args)``. One that takes no more than ``prox(v, step_size)`` or ``prox(v)`` is called so.
        An optional argument takes the hyperparameter in its place; where `f` uses that too, under
        another name, a lambda has to say what is meant. `hypergrad.prox` has the usual ones.
    step_size : float, Tensor or callable, optional
        A number or ``step_size(hparams)`` (in the decorators ``step_size(*args)``), greater than 0.
        The derivative of the solution does not depend on it, and it is taken for a constant. One
        over the largest eigenvalue of H makes the best conditioned A. None: that, for each task, as
        eight products with H see it.

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
    step_size: StepSize = None
    called = "prox"
    leading = 2


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
        decorators ``project(v, *args)``. One that takes no more than ``project(v)`` is called so,
        and optional arguments are as in `ProximalGradient`. `hypergrad.projections` has the usual
        ones.
    step_size : float, Tensor or callable, optional
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
    ...     lambda v: hypergrad.projections.box(v, 0.0, 1.0),
    ... )
    >>> x, y = torch.tensor([1.0, 0.25]), torch.tensor([3.0, 0.25])
    >>> hypergrad.implicit_grad(lambda x, y: x.sum(), bounded, x, y).abs().round(decimals=3)
    tensor([0., 1.])
    """

    f: Callable[..., Any]
    project: Callable[..., Any]
    step_size: StepSize = None
    called = "project"
    leading = 1
