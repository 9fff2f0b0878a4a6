"""One-step, Jacobian-free and T1-T2 gradients and the Neumann series: exact where theory says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import FixedPoint, Identity, Minimum, Neumann
from tests.problems import F64, Problem, affine, data, equilibrium, logistic, relative_error, ridge

LOGISTIC = logistic()


def newton(w: Tensor, h: Tensor) -> Tensor:
    g = torch.func.grad(LOGISTIC.inner)(w, h)
    return w - torch.linalg.solve(torch.func.hessian(LOGISTIC.inner)(w, h), g)


def test_one_step_of_newton_is_exact_at_the_solution():
    h = LOGISTIC.hparams
    w = LOGISTIC.solve(h)
    hypergradient, params = hypergrad.one_step_grad(
        LOGISTIC.outer, newton, w, h, return_params=True
    )
    assert relative_error(hypergradient, LOGISTIC.hypergradient(h)) < 1e-9
    torch.testing.assert_close(params, w)


def test_one_step_near_the_solution_is_off_by_as_much_as_the_point():
    """Newton's step squares the distance, but its derivative there is of the order of it."""
    h = LOGISTIC.hparams
    w, away = LOGISTIC.solve(h), data(30, 4, dtype=F64)
    errors = [
        relative_error(
            hypergrad.one_step_grad(LOGISTIC.outer, newton, w + size * away, h),
            LOGISTIC.hypergradient(h),
        )
        for size in (0.02, 0.01)
    ]
    assert 1.7 < errors[0] / errors[1] < 2.3


@pytest.mark.parametrize("make", [affine, equilibrium])
def test_one_step_at_a_fixed_point_is_jacobian_free_backpropagation(make):
    problem: Problem = make()
    z = problem.solve(problem.hparams)
    one = hypergrad.one_step_grad(problem.outer, problem.inner, z, problem.hparams)
    free = hypergrad.implicit_grad(
        problem.outer, FixedPoint(problem.inner), z, problem.hparams, solver=Identity()
    )
    assert relative_error(one, free) < 1e-9

    def by_hand(h: Any) -> Tensor:  # one application of the map, at a constant
        return problem.outer(problem.inner(z.detach(), h), h)

    assert relative_error(one, torch.func.grad(by_hand)(problem.hparams)) < 1e-9


def test_the_error_of_one_step_is_of_the_order_of_the_contraction():
    """rho / (1 - rho) times ||dT/dhparams|| ||b||, where rho is the norm of dT/dparams."""
    problem = affine()
    errors = []
    for scale in (0.05, 0.025):
        h = {"scale": torch.tensor(scale, dtype=F64), "shift": problem.hparams["shift"]}
        hypergradient = hypergrad.one_step_grad(problem.outer, problem.inner, problem.solve(h), h)
        exact = problem.hypergradient(h)
        b = exact["shift"]  # (I - J^T)^-1 b
        rho = 0.8 * scale
        bound = rho * b.norm()
        errors.append((hypergradient["shift"] - exact["shift"]).norm())
        assert errors[-1] < bound
    assert 1.8 < errors[0] / errors[1] < 2.2


def test_jacobian_free_is_exact_where_the_map_does_not_depend_on_its_variables():
    h = data(31, 3, dtype=F64)
    T = lambda z, h: h.sin() + 0 * z
    outer = lambda z, h: (z**2).sum() + h.sum()
    hypergradient = hypergrad.implicit_grad(outer, FixedPoint(T), h.sin(), h, solver=Identity())
    torch.testing.assert_close(hypergradient, 2 * h.sin() * h.cos() + 1)


@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_t1_t2_is_exact_where_the_hessian_is_a_multiple_of_the_identity(scale):
    h = data(32, 3, dtype=F64)
    inner = lambda w, h: scale * ((w - h.exp()) ** 2).sum() / 2
    outer = lambda w, h: (w**3).sum()
    hypergradient, info = hypergrad.implicit_grad(
        outer, Minimum(inner), h.exp(), h, solver=Identity(scale=scale), return_info=True
    )
    torch.testing.assert_close(hypergradient, 3 * h.exp() ** 3)
    assert info.success
    assert info.matvecs == 0


def test_t1_t2_of_ridge_is_the_formula_without_the_inverse():
    problem = ridge()
    lam = problem.hparams
    w = problem.solve(lam)
    hypergradient = hypergrad.implicit_grad(problem.outer, problem.inner, w, lam, solver=Identity())
    b = torch.func.grad(problem.outer)(w, lam)
    torch.testing.assert_close(hypergradient, lam / 5 - w @ b)


@pytest.mark.parametrize("terms", [1, 2, 7])
def test_terms_of_the_neumann_series_are_steps_that_are_unrolled_from_the_solution(terms):
    """Lorraine et al. 2020, theorem 1: gradient descent started where it ends."""
    h, rate = LOGISTIC.hparams, 0.5
    w = LOGISTIC.solve(h)
    step = lambda w, h: w - rate * torch.func.grad(LOGISTIC.inner)(w, h)
    unrolled = hypergrad.unrolled_grad(LOGISTIC.outer, step, w, h, steps=terms)
    series = hypergrad.implicit_grad(
        LOGISTIC.outer,
        LOGISTIC.inner,
        w,
        h,
        solver=Neumann(terms=terms, step_size=rate),
    )
    assert relative_error(series, unrolled) < 1e-9


def test_the_neumann_series_converges_to_the_hypergradient():
    h, w = LOGISTIC.hparams, LOGISTIC.solve(LOGISTIC.hparams)
    H = torch.func.hessian(LOGISTIC.inner)(w, h)
    rate = 1 / torch.linalg.eigvalsh(H)[-1].item()
    rho = 1 - rate * torch.linalg.eigvalsh(H)[0].item()
    errors = [
        relative_error(
            hypergrad.implicit_grad(
                LOGISTIC.outer,
                LOGISTIC.inner,
                w,
                h,
                solver=Neumann(terms=k, step_size=rate),
                on_failure="ignore",
            ),
            LOGISTIC.hypergradient(h),
        )
        for k in (60, 80, 200)
    ]
    assert errors[2] < 1e-6
    assert errors[1] / errors[0] == pytest.approx(rho**20, rel=0.2)


def test_a_function_in_place_of_params_is_refused_with_the_cure():
    with pytest.raises(hypergrad.StructureMismatch, match="unrolled_grad"):
        hypergrad.one_step_grad(lambda w, h: w, lambda w, h: w * h, lambda h: h, torch.tensor(1.0))
    with pytest.raises(hypergrad.StructureMismatch, match="named_parameters"):
        hypergrad.one_step_grad(
            lambda w, h: w, lambda w, h: w * h, torch.nn.Linear(1, 1), torch.tensor(1.0)
        )
