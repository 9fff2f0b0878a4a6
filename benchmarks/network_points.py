"""Where an inner solver stops: solved, cut short, near, at a saddle, run away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.linalg import vector_norm

from benchmarks.calibration_problems import Draws
from benchmarks.network_truth import Scalar, derivatives, minimise

#: How the point is made; each as often as it stands here.
POINTS = (
    *("SGD", "Adam"),
    *("L-BFGS",) * 2,
    *("Newton",) * 7,
    *("near the solution",) * 20,
    "saddle, zero weights",
    "saddle, equal units",
    "stationary",
    "run away",
)
BUDGETS = (1, 3, 10, 30, 100, 300, 1000)


def stopped(draws: Draws, how: str, f: Scalar, start: Tensor) -> Tensor:
    """Where an inner solver of the kind `how` stops, in the dtype of the start."""
    if how == "SGD":
        return _descent(draws, f, start, draws.log_uniform(0.1, 1.5))
    if how == "run away":
        return _descent(draws, f, start, draws.log_uniform(3, 100), draws.log_uniform(10, 1e9))
    if how == "Adam":
        rate = draws.log_uniform(1e-3, 0.1)
        return _optimised(draws, f, start, lambda w: torch.optim.Adam([w], lr=rate))
    if how == "stationary":
        return _stationary(f, start)
    if how.startswith("saddle"):
        if draws.one_of([True, False]):
            return _descent(draws, f, start, draws.log_uniform(0.3, 1.5))
        return _lbfgs(f, start, draws.one_of(BUDGETS))
    if how == "L-BFGS":
        return _lbfgs(f, start, draws.one_of(BUDGETS))
    # A first approach spares most of the Hessians.
    solution = minimise(f, _lbfgs(f, start, 40), steps=30).w
    if how == "Newton":
        return solution
    way = draws.normal(len(start)).to(start)
    low, high = draws.one_of([(1e-8, 1e-1), *[(1e-6, 1e-2)] * 3])
    size = draws.log_uniform(low, high) * vector_norm(solution)
    return solution + size * way / vector_norm(way)


def _descent(
    draws: Draws, f: Scalar, start: Tensor, rate: float, largest: float = float("inf")
) -> Tensor:
    """Gradient steps, with momentum or without; `rate` in units of the curvature at the start.

    They end early where the parameters have grown by the factor `largest`.
    """
    curvature = torch.linalg.matrix_norm(derivatives(f, start)[2], 2)
    momentum = draws.one_of([0.0, 0.9])
    end = largest * (1 + float(vector_norm(start)))
    return _optimised(
        draws,
        f,
        start,
        lambda w: torch.optim.SGD([w], lr=rate / float(curvature), momentum=momentum),
        end,
    )


def _optimised(
    draws: Draws,
    f: Scalar,
    start: Tensor,
    make: Callable[[Tensor], torch.optim.Optimizer],
    end: float = float("inf"),
) -> Tensor:
    """Some steps of an optimiser; it ends at the last point before `end`, or before NaN."""
    w = start.clone().requires_grad_()
    optimiser = make(w)
    for _ in range(draws.one_of(BUDGETS)):
        before = w.detach().clone()
        (w.grad,) = torch.autograd.grad(f(w), w)
        optimiser.step()
        size = float(vector_norm(w.detach()))
        if not size <= end or size == float("inf"):
            return before if size != size or size == float("inf") else w.detach()
    return w.detach()


def _lbfgs(f: Scalar, start: Tensor, budget: int) -> Tensor:
    w = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [w],
        max_iter=budget,
        max_eval=2 * budget + 10,
        tolerance_grad=0,
        tolerance_change=1e-2 * torch.finfo(w.dtype).eps,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        value = f(w)
        (w.grad,) = torch.autograd.grad(value, w)
        return value

    optimiser.step(closure)
    return w.detach()


def _stationary(f: Scalar, start: Tensor) -> Tensor:
    """Levenberg's method for a zero of the gradient, of whatever kind it is."""
    w, damping = start, 1e-3
    _, gradient, hessian = derivatives(f, w)
    for _ in range(60):
        normal = hessian @ hessian
        shift = damping * normal.diagonal().mean()
        step = torch.linalg.solve(normal + shift * torch.eye(len(w)).to(w), hessian @ gradient)
        _, ahead, there = derivatives(f, w - step)
        if not bool(vector_norm(ahead) < vector_norm(gradient)):
            damping *= 10
            if damping > 1e6:
                break
            continue
        w, gradient, hessian, damping = w - step, ahead, there, damping / 10
    return w
