"""Penalty gradients (F2SA) against closed forms, and their bias."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import hypergrad
from benchmarks.allocator import peak_bytes
from hypergrad import penalty_grad
from tests.problems import F64, data, relative_error, ridge, ridge_data

RIDGE = ridge()
LAM = RIDGE.hparams
W = RIDGE.solve(LAM)
X, Y = ridge_data()
X_VAL, Y_VAL = data(2, 10, 5, dtype=F64), data(3, 10, dtype=F64)


def penalised(penalty: float) -> Tensor:
    """The minimiser of inner + outer / penalty, by the normal equations."""
    A = X.T @ X + LAM * torch.eye(5, dtype=F64) + X_VAL.T @ X_VAL / penalty
    return torch.linalg.solve(A, X.T @ Y + X_VAL.T @ Y_VAL / penalty)


def test_the_penalty_gradient_is_its_formula():
    z = penalised(10.0)
    hypergradient = penalty_grad(RIDGE.outer, RIDGE.inner, W, LAM, penalty=10.0, penalised=z)
    torch.testing.assert_close(hypergradient, LAM / 5 + 10 * (z @ z - W @ W) / 2)


def test_twice_the_penalty_is_half_the_bias():
    exact = RIDGE.hypergradient(LAM)
    errors = [
        relative_error(
            penalty_grad(
                RIDGE.outer, RIDGE.inner, W, LAM, penalty=penalty, penalised=penalised(penalty)
            ),
            exact,
        )
        for penalty in (100.0, 200.0, 400.0, 1e7)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.05)
    assert errors[1] / errors[2] == pytest.approx(2, rel=0.05)
    assert errors[3] < 1e-6


def test_gradient_steps_find_the_penalised_minimiser():
    expected = penalty_grad(
        RIDGE.outer, RIDGE.inner, W, LAM, penalty=50.0, penalised=penalised(50.0)
    )
    hypergradient, info, z = penalty_grad(
        RIDGE.outer,
        RIDGE.inner,
        W,
        LAM,
        penalty=50.0,
        lr=0.02,
        steps=300,
        return_info=True,
        return_params=True,
    )
    torch.testing.assert_close(hypergradient, expected)
    torch.testing.assert_close(z, penalised(50.0))
    assert info.success
    # The displacement stands for the solution of the linear system.
    A = X.T @ X + LAM * torch.eye(5, dtype=F64)
    b = grad(RIDGE.outer)(z, LAM)
    torch.testing.assert_close(info.solution, torch.linalg.solve(A, b))
    assert float(info.residual_norm) < 1e-6


def test_the_residual_is_that_of_the_linear_system():
    z = W - 0.1 * data(60, 5, dtype=F64)
    _, info = penalty_grad(
        RIDGE.outer,
        RIDGE.inner,
        W,
        LAM,
        penalty=5.0,
        penalised=z,
        rtol=None,
        return_info=True,
    )
    A, b = X.T @ X + LAM * torch.eye(5, dtype=F64), grad(RIDGE.outer)(z, LAM)
    u = 5 * (W - z)
    torch.testing.assert_close(info.solution, u)
    torch.testing.assert_close(info.residual_norm, (b - A @ u).norm() / b.norm())


def test_a_penalised_problem_that_is_not_solved_is_said():
    """At y itself the difference is zero: the direct term alone, which would pass in silence."""
    given = (RIDGE.outer, RIDGE.inner, W, LAM)
    with pytest.warns(hypergrad.ConvergenceWarning, match=r"penalised problem.*steps.*penalised"):
        penalty_grad(*given, penalty=100.0, penalised=W.clone())
    with pytest.raises(hypergrad.NotConverged, match="relative residual is 1,"):
        penalty_grad(*given, penalty=100.0, penalised=W.clone(), on_failure="raise")
    penalty_grad(*given, penalty=100.0, penalised=W.clone(), rtol=None)


def test_an_inner_problem_that_is_not_solved_is_said():
    away = W + 0.1
    given = (RIDGE.outer, RIDGE.inner, away, LAM)
    with pytest.warns(hypergrad.ConvergenceWarning, match="params does not solve"):
        _, info = penalty_grad(
            *given, penalty=10.0, penalised=penalised(10.0), rtol=None, return_info=True
        )
    assert not info.success
    implicit = hypergrad.implicit_grad(
        *given, on_failure="ignore", return_info=True, solver=hypergrad.Exact()
    )[1]
    assert 0.1 < float(info.inner_residual / implicit.inner_residual) < 10


def test_a_penalty_too_large_for_the_dtype_is_said():
    w, lam = W.float(), LAM.float()
    problem = ridge(torch.float32)
    given = (problem.outer, problem.inner, w, lam)
    with pytest.warns(hypergrad.ConvergenceWarning, match="penalty smaller, or use float64"):
        penalty_grad(*given, penalty=1e8, lr=0.01, rtol=None, inner_tol=None)
    hypergradient = penalty_grad(*given, penalty=300.0, lr=0.02, steps=300)
    assert relative_error(hypergradient, RIDGE.hypergradient(LAM)) < 1e-2


def test_both_points_see_one_dropout():
    """With masks of their own the difference would be multiplied by the penalty."""
    torch.manual_seed(0)
    x = data(61, 30, 4, dtype=F64)
    y = x.sum(dim=1)

    def inner(w: Tensor, h: Tensor) -> Tensor:
        mask = torch.rand(30, 4, dtype=F64) > 0.3
        return ((mask * x) @ w - y).square().mean() + h.exp() * w.square().sum()

    outer = lambda w, h: (w - 1).square().sum()
    h = torch.tensor(-1.0, dtype=F64)
    torch.manual_seed(1)
    masked = torch.rand(30, 4, dtype=F64) > 0.3
    after = torch.rand(3)
    A = 2 * (masked * x).T @ (masked * x) / 30 + 2 * h.exp() * torch.eye(4, dtype=F64)
    w = torch.linalg.solve(A, 2 * (masked * x).T @ y / 30)
    exact = -(2 * h.exp() * w) @ torch.linalg.solve(A, 2 * (w - 1))
    torch.manual_seed(1)
    hypergradient = penalty_grad(outer, inner, w, h, penalty=1e5, lr=0.2, steps=400)
    assert relative_error(hypergradient, exact) < 1e-3
    torch.testing.assert_close(after, torch.rand(3))


def test_losses_are_evaluated_as_often_as_documented_and_the_memory_is_that_of_one_gradient():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(20, 200), nn.Tanh(), nn.Linear(200, 1))
    x, calls = torch.randn(400, 20), []
    params = {k: v.detach() for k, v in net.named_parameters()}
    h = torch.zeros(400)

    def inner(w: Any, h: Tensor) -> Tensor:
        calls.append("inner")
        return (h.sigmoid() * functional_call(net, w, (x,)).squeeze().square()).mean()

    def outer(w: Any, h: Tensor) -> Tensor:
        calls.append("outer")
        return functional_call(net, w, (x,)).square().mean()

    options: dict[str, Any] = {"rtol": None, "inner_tol": None}
    z = {k: v - 1e-2 for k, v in params.items()}
    call = lambda: penalty_grad(outer, inner, params, h, penalty=10.0, penalised=z, **options)
    call()
    assert sorted(calls) == ["inner", "inner", "outer"]
    calls.clear()
    penalty_grad(outer, inner, params, h, penalty=10.0, lr=1e-3, steps=4, **options)
    assert calls.count("inner") == 6
    assert calls.count("outer") == 5

    def one() -> Any:
        leaves = {k: v.clone().requires_grad_() for k, v in params.items()}
        return torch.autograd.grad(inner(leaves, h.clone().requires_grad_()), list(leaves.values()))

    one()
    assert peak_bytes(call) < 1.3 * peak_bytes(one)


def test_penalties_of_a_batch_of_tasks_are_those_of_the_loop():
    lams = torch.tensor([1.0, 2.0, 4.0], dtype=F64)

    def task(lam: Tensor) -> Any:
        A = X.T @ X + lam * torch.eye(5, dtype=F64)
        w = torch.linalg.solve(A, X.T @ Y)
        return penalty_grad(
            RIDGE.outer, RIDGE.inner, w, lam, penalty=50.0, lr=0.02, steps=200, return_info=True
        )

    found, info = vmap(task)(lams)
    expected = [task(lam) for lam in lams]
    torch.testing.assert_close(found, torch.stack([g for g, _ in expected]))
    torch.testing.assert_close(
        info.residual_norm, torch.stack([i.residual_norm for _, i in expected]), rtol=0.1, atol=1e-9
    )


@pytest.mark.parametrize(
    "options",
    [
        {"penalty": -1.0, "lr": 0.1},
        {"penalty": 1.0},
        {"penalty": 1.0, "lr": 0.1, "penalised": W},
        {"penalty": 1.0, "lr": 0.1, "steps": -1},
    ],
    ids=["sign", "neither", "both", "steps"],
)
def test_arguments_that_do_not_go_together_are_refused(options):
    with pytest.raises(ValueError, match=r"must|either"):
        penalty_grad(RIDGE.outer, RIDGE.inner, W, LAM, **options)


def test_a_penalised_minimiser_of_another_shape_is_refused():
    with pytest.raises(hypergrad.StructureMismatch, match="penalised has shape"):
        penalty_grad(RIDGE.outer, RIDGE.inner, W, LAM, penalty=1.0, penalised=W[:2])
