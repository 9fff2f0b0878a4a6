"""Value-function gradients (BOME) against closed forms."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import vmap

import hypergrad
from hypergrad import penalty_grad, value_function_grad
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


def test_the_value_function_gradient_is_its_formula():
    """With a Hessian of 2 one step of 1/2 solves the inner problem: y = h."""
    inner = lambda w, h: (w - h).square().sum()
    outer = lambda w, h: (w**3).sum() + (h**2).sum()
    w, h, eta = data(62, 3, dtype=F64), data(63, 3, dtype=F64), 0.4
    hypergradient, info = value_function_grad(
        outer, inner, w, h, lr=0.5, steps=1, eta=eta, return_info=True
    )
    f = torch.cat([2 * h, 3 * w**2])
    q = torch.cat([-2 * (w - h), 2 * (w - h)])  # y = h, so inner is flat in h there
    weight = (eta - f @ q / (q @ q)).clamp(min=0)
    torch.testing.assert_close(info.multiplier, weight)
    torch.testing.assert_close(torch.cat([hypergradient, info.params_grads]), f + weight * q)
    torch.testing.assert_close(info.gap, (w - h).square().sum())


def test_the_multiplier_is_the_least_that_lowers_the_gap_as_asked():
    inner = lambda w, h: (w - h).square().sum()
    w, h = torch.tensor([1.0, 2.0], dtype=F64), torch.zeros(2, dtype=F64)
    down = lambda w, h: (w**2).sum()  # its own descent lowers the gap faster than is asked
    _, info = value_function_grad(down, inner, w, h, lr=0.5, steps=1, eta=0.1, return_info=True)
    assert info.multiplier == 0
    up = lambda w, h: -(w**2).sum()
    hypergradient, info = value_function_grad(
        up, inner, w, h, lr=0.5, steps=1, eta=0.1, return_info=True
    )
    q_w, q_h = 2 * (w - h), -2 * (w - h)
    lowered = info.params_grads @ q_w + hypergradient @ q_h
    torch.testing.assert_close(lowered, 0.1 * (q_w @ q_w + q_h @ q_h))


@pytest.mark.parametrize("multiplier", [20.0, 1e4])
def test_where_the_joint_descent_rests_it_is_the_penalty_gradient(multiplier):
    z = penalised(multiplier)
    hypergradient, info = value_function_grad(
        RIDGE.outer,
        RIDGE.inner,
        z,
        LAM,
        lr=0.02,
        steps=500,
        multiplier=multiplier,
        return_info=True,
    )
    want = penalty_grad(RIDGE.outer, RIDGE.inner, W, LAM, penalty=multiplier, penalised=z)
    assert relative_error(hypergradient, want) < 1e-6
    assert info.params_grads.norm() < 1e-8 * multiplier


def test_the_joint_descent_solves_the_bilevel_problem():
    """min over h of ||w - t||^2 + ||h||^2 with w = argmin (w - M h)^2: h = (I + M^T M)^-1 M^T t."""
    M, t = data(64, 2, 2, dtype=F64), data(65, 2, dtype=F64)
    inner = lambda w, h: (w - M @ h).square().sum() / 2
    outer = lambda w, h: ((w - t).square().sum() + h.square().sum()) / 2
    best = torch.linalg.solve(torch.eye(2, dtype=F64) + M.T @ M, M.T @ t)
    w, h = torch.zeros(2, dtype=F64), torch.zeros(2, dtype=F64)
    distances = []
    for k in range(500):
        hypergradient, info = value_function_grad(
            outer, inner, w, h, lr=1.0, steps=1, return_info=True
        )
        rate = 0.2 / (1 + k / 50)
        w, h = w - rate * info.params_grads, h - rate * hypergradient
        distances.append(float((h - best).norm() / best.norm()))
    assert distances[-1] < 0.03
    assert distances[-1] < distances[100]


def test_steps_that_raise_the_inner_objective_are_said():
    given = (RIDGE.outer, RIDGE.inner, W + 0.1, LAM)
    with pytest.warns(hypergrad.ConvergenceWarning, match="lr is too large"):
        value_function_grad(*given, lr=1.0)
    with pytest.raises(hypergrad.Diverged, match="lr is too large"):
        value_function_grad(*given, lr=1.0, on_failure="raise")


def test_value_functions_of_a_batch_of_tasks_are_those_of_the_loop():
    lams = torch.tensor([1.0, 2.0, 4.0], dtype=F64)

    def task(lam: Tensor) -> Any:
        return value_function_grad(
            RIDGE.outer, RIDGE.inner, W + 0.1, lam, lr=0.01, return_info=True
        )

    found, info = vmap(task)(lams)
    expected = [task(lam) for lam in lams]
    torch.testing.assert_close(found, torch.stack([g for g, _ in expected]))
    torch.testing.assert_close(info.gap, torch.stack([i.gap for _, i in expected]))


@pytest.mark.parametrize("options", [{"lr": 0.0}, {"eta": -1.0}, {"multiplier": -1.0}], ids=repr)
def test_rates_and_multipliers_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="must be"):
        value_function_grad(RIDGE.outer, RIDGE.inner, W, LAM, **{"lr": 0.1, **options})
