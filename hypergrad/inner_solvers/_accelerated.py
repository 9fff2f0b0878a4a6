"""Accelerated gradient descent, plain and proximal, with restarts."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._autograd.maps import Taken, selected, taken
from ._base import InnerSolver
from ._evaluator import Evaluator
from ._fixed_steps import FixedSteps, accelerate
from ._momentum import pushed
from ._numbers import dot, norm
from ._progress import Progress

_PROBES = 4  # power steps for the largest curvature
_HALVINGS = 60

Backward = Callable[[Tensor, Any], Tensor]


@dataclasses.dataclass(frozen=True)
class Nesterov(InnerSolver):
    """Nesterov's accelerated gradient descent; the momentum starts again when it points uphill.

    Parameters
    ----------
    step_size : float or Tensor, optional
        The length of the gradient steps, at most one over the largest curvature. None: from
        differences of gradients, shortened where the objective shows that it is too long.
    maxiter : int
        Most iterations.
    tol : float, optional
        The relative residual at which a task stops; None: 1e-8 in float64, 1e-5 in float32. 0,
        with a `step_size`: exactly `maxiter` steps, as in `GradientDescent`.

    References
    ----------
    Nesterov, A method of solving a convex programming problem with convergence rate O(1/k^2),
    1983; O'Donoghue and Candes, Adaptive restart for accelerated gradient schemes, 2015,
    section 3.2.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner_solvers
    >>> steep = torch.tensor([1.0, 100.0])
    >>> f = lambda x, c: (steep * (x - c) ** 2).sum() / 2
    >>> x, info = inner_solvers.Nesterov()(f, torch.zeros(2), torch.ones(2))
    >>> torch.allclose(x, torch.ones(2), rtol=1e-4), bool(info.success)
    (True, True)
    """

    step_size: float | Tensor | None = None
    maxiter: int = 10_000
    tol: float | None = None

    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress | FixedSteps]:
        return _accelerated(self, evaluator, x, None)


@dataclasses.dataclass(frozen=True)
class FISTA(InnerSolver):
    """The accelerated proximal gradient method with restarts, for ``f + g`` with g's proximal map.

    Call it with the smooth part: ``FISTA(prox)(f, init, *args)``. The arguments of `prox` are those
    of `ProximalGradient`, which differentiates the solution; a projection is
    ``prox=hypergrad.prox.from_projection(project)``. Coordinates that the map holds at zero or at a
    bound are there exactly.

    Parameters
    ----------
    prox : callable, optional
        ``prox(v, step_size, *args)``, shaped like the parameters. One that takes no more than
        ``prox(v, step_size)`` or ``prox(v)`` is called so. None: that of `hypergrad.argmin`, which
        the solver is passed to. An optional argument of it takes the one of `f` in its place; where
        `f` uses that too, under another name, a lambda has to say what is meant.
    step_size, maxiter, tol
        As in `Nesterov`.

    References
    ----------
    Beck and Teboulle, A fast iterative shrinkage-thresholding algorithm for linear inverse
    problems, 2009, equations 4.1 to 4.3; O'Donoghue and Candes, Adaptive restart for accelerated
    gradient schemes, 2015.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner_solvers, prox
    >>> y = torch.tensor([3.0, 0.5])
    >>> f = lambda w, lam: ((w - y) ** 2).sum() / 2
    >>> w, info = inner_solvers.FISTA(prox.l1)(f, torch.zeros(2), torch.tensor(1.0))
    >>> w.round(decimals=3)
    tensor([2., 0.])
    """

    prox: Callable[..., Any] | None = None
    step_size: float | Tensor | None = None
    maxiter: int = 10_000
    tol: float | None = None

    @functools.cached_property
    def _takes(self) -> Taken:
        assert self.prox is not None
        return taken(self.prox, 2)

    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress | FixedSteps]:
        prox = self.prox
        if prox is None:
            raise TypeError(
                "FISTA needs a proximal map: FISTA(prox), or argmin(objective, solver=FISTA(), "
                "prox=...). A projection is FISTA(hypergrad.prox.from_projection(project)). For "
                "neither take Nesterov()."
            )
        takes, given = self._takes, len(evaluator.args)
        for place in takes.unclear(evaluator.fun, given):
            if evaluator.uses(place, x):
                raise takes.unclear_error(evaluator.fun, given, place)

        def backward(v: Tensor, step: Tensor) -> Tensor:
            def mapped(v: Any, *steps: Tensor) -> Any:
                fixed = self.step_size  # as the caller has passed it
                if fixed is not None:
                    steps = (torch.as_tensor(fixed, dtype=x.dtype, device=x.device).detach(),)
                return prox(*selected(takes.most, (v, *steps), evaluator.args))

            steps = () if self.step_size is not None else (step[..., 0],)
            called = getattr(prox, "called", "prox")
            return evaluator.plain(f"{called}(v, ...)", mapped, v, *steps)

        return _accelerated(self, evaluator, x, backward)


def _accelerated(
    solver: Nesterov | FISTA, evaluator: Evaluator, x: Tensor, backward: Backward | None
) -> tuple[Tensor, Progress | FixedSteps]:
    fixed = solver.step_size is not None
    if solver.step_size is not None and solver.tol == 0:
        length = evaluator.step_size(solver.step_size)
        return accelerate(evaluator, backward, x, length, solver.maxiter)
    y = x
    value, g = evaluator.objective(y)
    momentum = torch.ones_like(value)
    if solver.step_size is not None:
        step, probes = evaluator.step_size(solver.step_size), 0
    else:
        step, probes = _safe_step(evaluator, x, value, g)
    precision = evaluator.layout.precision
    z, z_value, step, used = _forward_backward(evaluator, backward, y, value, g, step, fixed, None)
    residual = step * g if backward is None else y - z
    size = norm(residual) + 0 * value
    # In units of the step the curvature is at most one.
    progress = Progress(solver.tol, precision, size, value, torch.ones_like(size))
    progress.evaluated(progress.active, probes + used)
    # The best point so far is the end of a step, also where that step has led nowhere.
    best = torch.where(torch.isfinite(norm(z)), z, x)
    for active in progress.rounds(solver.maxiter):
        begin, momentum = pushed(x, y, z, momentum)
        y_new = torch.where(active, begin, y)
        x = torch.where(active, z, x)
        value, g = evaluator.objective(y_new)
        progress.evaluated(active)
        z_new, z_value, step, used = _forward_backward(
            evaluator, backward, y_new, value, g, step, fixed, active
        )
        progress.evaluated(active, used)
        residual_new = step * g if backward is None else y_new - z_new
        size = norm(residual_new) + 0 * value
        floored = None
        if backward is not None:  # a difference below the last digits of its parts
            floored = size <= 4 * torch.finfo(precision).eps * norm(y_new)
        progress.update(z_new, y_new - y, residual_new - residual, size, z_value, floored=floored)
        sound = active & torch.isfinite(size)
        best = torch.where(sound, z_new, best)
        y, z = torch.where(sound, y_new, y), torch.where(sound, z_new, z)
        residual = torch.where(sound, residual_new, residual)
    return best, progress


def _safe_step(evaluator: Evaluator, x: Tensor, value: Tensor, g: Tensor) -> tuple[Tensor, int]:
    """Estimate one over the largest curvature by power steps; count the gradients that it took."""
    v, seen, probes = g, torch.zeros_like(norm(g)), 0
    for _ in range(_PROBES):
        v, used = evaluator.curved(x, value, g, v)
        probes += used
        seen = torch.fmax(seen, norm(v))
    usable = (seen > 0) & torch.isfinite(seen)
    return torch.where(usable, 1 / torch.where(usable, seen, torch.ones_like(seen)), 1.0), probes


def _forward_backward(
    evaluator: Evaluator,
    backward: Backward | None,
    y: Tensor,
    value: Tensor,
    g: Tensor,
    step: Tensor,
    fixed: bool,
    active: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Step from `y`: to the end, the value there, the length, and how often the value was taken."""

    def end(step: Tensor) -> Tensor:
        return y - step * g if backward is None else backward(y - step * g, step)

    z = end(step)
    if fixed:
        return z, value, step, 0
    noise = 10 * torch.finfo(evaluator.layout.precision).eps * value.abs()
    evaluated = 0
    while evaluated < _HALVINGS:
        evaluated += 1
        z_value = evaluator.value(z)
        moved = z - y
        bound = value + dot(g, moved) + dot(moved, moved) / (2 * step) + noise
        long = torch.isfinite(value) & ~(z_value <= bound)
        if active is not None:
            long = long & active
        if not any_task(long):
            break
        step = torch.where(long, step / 2, step)
        z = torch.where(long, end(step), z)
    return z, z_value, step, evaluated
