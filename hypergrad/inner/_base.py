"""What the inner solvers share: the border to pytrees, when to stop, and the evidence.

A solver works on one flat vector. Under `torch.func.vmap` all its tensors are batched: no branch
looks at one of them, only at whether any task is still at work, and a task that has stopped is
frozen.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._advice import advice
from .._captures import refuse_past_arguments
from .._errors import NotConnected, UnsupportedOperation
from .._info import Status
from .._problem import scalar
from .._replay import Replay
from .._trace import being_traced, detached, further_out, trace
from .._transforms import (
    alive,
    any_task,
    carries_derivative,
    never_compiled,
    refuse_derivatives,
)
from .._tree import Layout, Tree
from ..solvers._base import at_least, dot, norm
from ._info import InnerInfo

# What ``tol=None`` means, by the dtype in which the objective is computed.
_REACHABLE = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
_ENOUGH = 1e-3  # the relative residual that `implicit_grad` lets pass without a word
_WINDOW = 10  # iterations whose lowest curvature counts
_PATIENCE = 200  # iterations without any progress, before a task counts as stagnated
_GROWTH = 1e10  # of the residual, beyond which a task counts as diverged


class Evaluator:
    """The caller's function on flat vectors, detached from all that surrounds the call."""

    def __init__(self, fun: Callable[..., Any], tree: Tree, layout: Layout, args: Any) -> None:
        self.fun, self.tree, self.layout = fun, tree, layout
        self.args = pytree.tree_map(lambda t: detached(t) if isinstance(t, Tensor) else t, args)
        self.captured: list[Tensor] = []
        self._looked = False

    def params(self, x: Tensor) -> Any:
        """A flat vector as the caller's pytree."""
        return self.tree.rebuild(self.layout.split(x))

    def flat(self, what: str, params: Any) -> Tensor:
        """What the caller's function returned, flat."""
        return self.layout.flatten(self.tree.match(what, params))

    def objective(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The objective's value and its gradient."""
        value, gradient, _ = self._differentiated(x, twice=False)
        return value, gradient

    def with_hessian(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The objective's value, its gradient, and products with its Hessian."""
        value, gradient, hessian = self._differentiated(x, twice=True)
        assert hessian is not None
        replay = hessian
        return value, gradient, lambda v: self._flat_gradient(replay(self.layout.split(v)), v)

    def curvature(self, x: Tensor, g: Tensor) -> Tensor:
        """``||H v|| / ||v||`` for v along the gradient, by a difference of gradients."""
        reach = torch.finfo(self.layout.precision).eps ** 0.5 * norm(x).clamp(min=1.0)
        size = norm(g)
        along = g / torch.where(size > 0, size, torch.ones_like(size))
        return norm(self.objective(x + reach * along)[1] - g) / reach

    def value(self, x: Tensor) -> Tensor:
        """The objective's value alone."""
        return self._scalar(self.params(x)).detach().to(x.dtype)

    def mapped(self, x: Tensor) -> Tensor:
        """A map's value."""
        with torch.set_grad_enabled(not self._looked):
            value = self.fun(self.params(x), *self.args)
        if not self._looked:
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            self.captured = [leaf for leaf in leaves if carries_derivative(leaf)]
            self._looked = True
        return self.flat("T(params, ...)", value).detach()

    def _scalar(self, params: Any) -> Tensor:
        return scalar("objective", self.fun(params, *self.args))

    def _differentiated(self, x: Tensor, *, twice: bool) -> tuple[Tensor, Tensor, Replay | None]:
        def evaluate(aliases: list[Tensor]) -> tuple[Tensor, Any, Replay | None]:
            value = self._scalar(self.tree.rebuild(aliases))
            self._note([value], aliases)
            found: Any = [None] * len(aliases)
            if value.requires_grad:
                found = torch.autograd.grad(value, aliases, create_graph=twice, allow_unused=True)
            for position, part in enumerate(found):
                if part is None:
                    raise NotConnected(
                        f"The objective does not depend on {self.tree.variable_path(position)}. "
                        "Leave that leaf out of init, or use it: a module must be called as torch."
                        "func.functional_call(module, params, args), and a .detach(), .item() or "
                        "torch.no_grad() inside cuts the connection."
                    )
            return value.detach(), found, Replay(found, aliases) if twice else None

        with advice([self.tree]):
            value, found, hessian = trace(evaluate, self.layout.split(x))
        return alive(value).to(x.dtype), self._flat_gradient(found, x), hessian

    def _flat_gradient(self, parts: Any, x: Tensor) -> Tensor:
        found = [
            torch.zeros_like(like) if part is None else alive(part.detach())
            for part, like in zip(parts, self.layout.split(x), strict=True)
        ]
        return self.layout.flatten(found)

    def _note(self, values: list[Tensor], aliases: list[Tensor]) -> None:
        """At the first evaluation, find what is differentiated around the call."""
        if not self._looked:
            refuse_past_arguments("The inner solver's function", values, aliases, [self.tree])
            self.captured = [t for value in values for t in further_out(value, aliases)]
            self._looked = True


@dataclasses.dataclass
class Progress:
    """Which tasks are still at work, and how the others have ended.

    Attributes
    ----------
    tol : float, optional
        The relative residual that is asked for; None: what `precision` can reach.
    precision : torch.dtype
        The one in which the function is computed.
    size : Tensor
        The norm of the residual.
    value : Tensor
        The objective's; NaN where there is none.
    lowest : Tensor, optional
        The lowest curvature that is known before the first iteration.
    """

    tol: float | None
    precision: torch.dtype
    size: Tensor
    value: Tensor
    lowest: Tensor | None = None
    status: Tensor = dataclasses.field(init=False)
    active: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Stop at once where there is nothing to do, or nothing that can be done."""
        size = self.size
        self.active = torch.isfinite(size) & (size > 0)
        self.status = torch.where(
            torch.isfinite(size), int(Status.CONVERGED), int(Status.NOT_FINITE)
        )
        self.relative = torch.where(size == 0, size, torch.full_like(size, math.nan))
        self.first, self.best, self.best_value = size, size, self.value
        self.idle = torch.zeros_like(self.status)
        self.iterations, self.evaluations = self.idle, self.idle + 1
        self._curvature: list[Tensor] = []
        if self.lowest is None:
            self.lowest = torch.full_like(size, math.nan)

    def begin(self, evaluator: Evaluator, x: Tensor, g: Tensor) -> Tensor:
        """Look at the curvature along the gradient once; what a first step is to be as long as."""
        if not any_task(self.active):
            return torch.ones_like(self.size)
        seen = evaluator.curvature(x, g)
        self.evaluated(self.active)
        usable = torch.isfinite(seen) & (seen > 0)
        assert self.lowest is not None
        self.lowest = torch.where(usable, seen, self.lowest)
        guess = 0.1 * norm(x).clamp(min=1.0) / torch.where(self.size > 0, self.size, 1.0)
        return torch.where(usable, 1 / torch.where(usable, seen, 1.0), guess)

    def evaluated(self, active: Tensor, times: int = 1) -> None:
        """Count evaluations of some tasks."""
        self.evaluations = self.evaluations + times * active

    def update(
        self,
        x: Tensor,
        step: Tensor,
        change: Tensor,
        size: Tensor,
        value: Tensor,
        *,
        stuck: Tensor | None = None,
        floored: Tensor | None = None,
    ) -> None:
        """Judge an iteration of the active tasks.

        Parameters
        ----------
        x : Tensor
            Where it has led.
        step, change : Tensor
            How `x` and the residual have changed.
        size, value : Tensor
            The residual's norm there, and the objective's value.
        stuck : Tensor, optional
            bool: no step could be made.
        floored : Tensor, optional
            bool: the residual is the rounding error of what it was computed from.
        """
        no = torch.zeros_like(self.active)
        stuck, floored = no if stuck is None else stuck, no if floored is None else floored
        eps = torch.finfo(self.precision).eps
        length = norm(x).clamp(min=(torch.finfo(x.dtype).eps * max(x.shape[-1], 1)) ** 0.5)
        squared = dot(step, step)
        along = dot(step, change)
        seen = torch.where(along > 0, along / squared, norm(change) / norm(step))
        # Too short a step shows no curvature, only rounding.
        seen = torch.where(norm(step) > 8 * eps * length, seen, torch.full_like(seen, math.inf))
        self._curvature = [*self._curvature[1 - _WINDOW :], seen]
        assert self.lowest is not None
        lowest = torch.stack(self._curvature).amin(dim=0)
        lowest = torch.where(torch.isfinite(lowest), lowest, self.lowest)
        self.lowest = torch.where(self.active, lowest, self.lowest)
        relative = torch.where(size == 0, torch.zeros_like(size), size / (lowest * length))
        stuck = stuck | ~(norm(step) > eps / 4 * length)

        noise = 4 * eps * self.best_value.abs()
        better = (size < self.best) | (value < self.best_value - noise)
        idle = torch.where(better, torch.zeros_like(self.idle), self.idle + 1)
        met = relative <= (_REACHABLE[self.precision] if self.tol is None else self.tol)
        ended = torch.full_like(self.status, int(Status.MAX_ITERATIONS))
        stagnated = stuck | floored | (idle >= _PATIENCE)
        ended = torch.where(stagnated, int(Status.STAGNATED), ended)
        ended = torch.where(met & ((size == 0) | ~stuck), int(Status.CONVERGED), ended)
        diverged = (size > _GROWTH * self.first) | torch.isinf(size) | torch.isinf(value)
        ended = torch.where(diverged, int(Status.DIVERGED), ended)
        ended = torch.where(torch.isnan(size), int(Status.NOT_FINITE), ended)
        active = self.active
        self.iterations = self.iterations + active
        self.status = torch.where(active, ended, self.status)
        self.relative = torch.where(active, relative, self.relative)
        self.size = torch.where(active, size, self.size)
        self.value = torch.where(active, value, self.value)
        self.best = torch.where(active, torch.fmin(self.best, size), self.best)
        self.best_value = torch.where(active, torch.fmin(self.best_value, value), self.best_value)
        self.idle = torch.where(active, idle, self.idle)
        self.active = active & (ended == Status.MAX_ITERATIONS)

    def info(self, method: str) -> InnerInfo:
        """The evidence."""
        success = self.status == Status.CONVERGED
        if self.tol is None:
            success = success | ((self.status == Status.STAGNATED) & (self.relative <= _ENOUGH))
        return InnerInfo(
            status=self.status,
            success=success,
            iterations=self.iterations,
            evaluations=self.evaluations,
            residual_norm=self.size,
            inner_residual=self.relative,
            value=self.value,
            method=method,
        )


class InnerSolver(ABC):
    """A method for inner problems, as a value: frozen, printable and shareable.

    Every one has the fields `maxiter`, most iterations, and `tol`, the relative residual at which
    a task stops: the residual divided by the curvature that the last ten iterations have seen and
    by the norm of the parameters, an estimate of their relative distance to the solution. None is
    what the dtype can reach (1e-8 in float64, 1e-5 in float32).

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner
    >>> loss = lambda w, t: ((w - t) ** 2).sum()
    >>> for solver in (inner.LBFGS(), inner.Nesterov(tol=1e-4)):
    ...     w, info = solver(loss, torch.zeros(2), torch.ones(2))
    ...     print(info.method, info.success.item(), torch.allclose(w, torch.ones(2)))
    LBFGS True True
    Nesterov True True
    """

    maxiter: int
    tol: float | None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("maxiter", self.maxiter, 1)
        at_least("tol", self.tol, 0.0)
        step = getattr(self, "step_size", None)
        if isinstance(step, int | float) and not 0 < step < math.inf:
            raise ValueError(f"step_size must be positive and finite; got {step!r}.")

    def __call__(self, fun: Callable[..., Any], init: Any, *args: Any) -> tuple[Any, InnerInfo]:
        """Solve the inner problem.

        Parameters
        ----------
        fun : callable
            ``fun(params, *args)``: a scalar objective, which must not be random; of `Anderson` a
            map.
        init : pytree of Tensor
            Where the iteration starts.
        *args
            Passed on to `fun`.

        Returns
        -------
        params : pytree of Tensor
            The answer, shaped like `init` and detached.
        info : InnerInfo
            How it ended.
        """
        return self._solve(fun, init, args)

    @never_compiled
    def _solve(self, fun: Callable[..., Any], init: Any, args: Any) -> tuple[Any, InnerInfo]:
        tree = Tree("init", init)
        layout = Layout(tree, tree.variables)
        evaluator = Evaluator(fun, tree, layout, args)
        start = layout.flatten([detached(v).clone() for v in tree.variables])
        with torch.no_grad():
            x, progress = self._run(evaluator, start)
        sources = [t for t in pytree.tree_leaves((init, args)) if isinstance(t, Tensor)]
        leaves = refuse_derivatives(
            [leaf.contiguous() for leaf in layout.split(x)],
            [t for t in sources if t.is_floating_point()] + evaluator.captured,
            _not_differentiable,
            plain=being_traced(),
        )
        return tree.rebuild(leaves), progress.info(type(self).__name__)

    @abstractmethod
    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress]:
        """Solve a flat problem."""


def going_on(progress: Progress, iteration: int, maxiter: int) -> bool:
    """Whether another iteration is to be made. Synchronises with the host once."""
    return iteration < maxiter and any_task(progress.active)


def for_task(flag: Tensor, new: Tensor, old: Tensor) -> Tensor:
    """`new` where the task's flag is set, else `old`; both are vectors or both numbers."""
    return torch.where(flag, new, old)


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "What an inner solver returns is detached: its derivative would go through the iterations. "
        "Call it inside a function that custom_argmin (or custom_root, custom_fixed_point) "
        "decorates, or unroll steps with unrolled_grad."
    )
