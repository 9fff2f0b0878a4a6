"""`check_hypergrad` blames the part that was spoilt."""

from __future__ import annotations

import pytest
import torch

from hypergrad import CG, FixedPoint, GaussNewton, Identity, Root, check_hypergrad
from tests.problems import F64, affine, data, per_feature_ridge, ridge, ridge_data
from tests.spoilt_parts import (
    blamed,
    check,
    check_three,
    gradient_descent,
    inner_of_three,
    solve_of_three,
)


def test_an_inner_solver_that_stops_early():
    problem = ridge()
    w = torch.zeros(5, dtype=F64)
    assert check(problem, solve=gradient_descent(problem, w, 2000, 0.02)).ok
    report = check(problem, solve=gradient_descent(problem, w, 5, 0.02))
    assert blamed(report, "inner problem not solved", "relative inner residual", "Newton")
    assert report.unrolled_error < 1e-6  # the differences are those of the few steps


def test_an_inner_solver_that_stops_a_little_early():
    problem = ridge()
    w = torch.zeros(5, dtype=F64)
    report = check(problem, solve=gradient_descent(problem, w, 25, 0.02))
    assert float(report.info.inner_residual) < 1e-2
    assert blamed(report, "inner problem not solved")


@pytest.mark.parametrize(
    ("solver", "word"),
    [
        (CG(maxiter=2), "relative residual"),
        (CG(rtol=1e-10, damping=1.0), "damping=1"),
        (Identity(), "identity"),
    ],
    ids=repr,
)
def test_a_linear_system_that_is_not_solved(solver, word):
    report = check(ridge(), solver=solver)
    assert blamed(report, "linear system not solved", word)


def test_a_linear_solve_without_success_is_quoted():
    report = check(ridge(), solver=CG(maxiter=2, rtol=1e-9))
    assert blamed(report, "linear system not solved", "maxiter", "MAX_ITERATIONS")


def test_a_hyperparameter_that_the_inner_loss_captures():
    problem = per_feature_ridge()
    captured = problem.hparams

    def inner(w, hparams):
        return problem.inner(w, captured)

    report = check(problem, inner=inner)
    assert blamed(report, "hyperparameter not connected", "hparams['log_penalty']", "captures")


def test_one_of_two_hyperparameters_that_the_inner_loss_captures():
    X, y = ridge_data()
    hparams = {"decay": torch.tensor(2.0, dtype=F64), "shift": torch.tensor(0.3, dtype=F64)}

    def objective(w, decay, shift):
        return (X @ w + shift - y).square().sum() / 2 + decay * (w @ w) / 2

    def solve(h):
        return torch.linalg.solve(X.T @ X + h["decay"] * torch.eye(5), X.T @ (y - h["shift"]))

    def outer(w, h):
        return (w - 1).square().sum() + h["decay"]

    def right(w, h):
        return objective(w, h["decay"], h["shift"])

    def wrong(w, h):
        return objective(w, h["decay"], hparams["shift"])

    assert check_hypergrad(outer, right, solve, hparams).ok
    report = check_hypergrad(outer, wrong, solve, hparams)
    assert blamed(report, "hyperparameter not connected", "hparams['shift']")
    assert "hparams['decay']" not in report.reason


def test_a_captured_hyperparameter_that_requires_grad():
    problem = ridge()
    lam = problem.hparams.clone().requires_grad_()
    report = check(problem, inner=lambda w, _: problem.inner(w, lam), hparams=lam)
    assert blamed(report, "hyperparameter not connected", "hparams")
    assert lam.grad is None


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_hyperparameters_used_through_detach(where):
    problem = ridge()
    loss = getattr(problem, where)
    report = check(problem, **{where: lambda w, lam: loss(w, lam.detach())})
    assert blamed(report, "hyperparameter not connected", "hparams", ".detach()")


def test_a_hyperparameter_that_is_detached_in_one_of_two_places():
    problem = ridge()

    def inner(w, lam):
        return problem.inner(w, lam / 2 + lam.detach() / 2)

    report = check(problem, inner=inner)
    assert blamed(report, "hyperparameter not connected", ".detach()")


def test_a_hyperparameter_that_the_inner_loss_captures_in_part():
    problem = ridge()
    captured = problem.hparams
    report = check(problem, inner=lambda w, lam: problem.inner(w, lam / 2 + captured / 2))
    assert blamed(report, "hyperparameter not connected", "in the same way")


def test_a_solve_that_returns_a_constant():
    problem = ridge()
    w = problem.solve(problem.hparams)
    report = check(problem, solve=lambda lam: w)
    assert blamed(report, "hyperparameter not connected", "same params")
    assert any("detached" in note for note in report.notes)


def test_a_hyperparameter_of_the_solver_alone():
    problem = ridge()
    hparams = {"lam": problem.hparams, "rate": torch.tensor(0.01, dtype=F64)}

    def solve(h):
        w = torch.zeros(5, dtype=F64)
        return gradient_descent(problem_of(h["lam"]), w, 3, h["rate"])(h["lam"])

    def problem_of(lam):
        return problem

    report = check(
        problem,
        outer=lambda w, h: problem.outer(w, h["lam"]) + 0 * h["rate"],
        inner=lambda w, h: problem.inner(w, h["lam"]),
        solve=solve,
        hparams=hparams,
    )
    assert not report.ok
    assert report.blame in ("hyperparameter not connected", "inner problem not solved")


@pytest.mark.parametrize("solver", [None, CG(rtol=1e-8)], ids=repr)
def test_a_root_that_is_declared_symmetric_and_is_not(solver):
    problem = affine()

    def F(x, hparams):
        return x - problem.inner(x, hparams)

    assert check(problem, inner=Root(F)).ok
    report = check(problem, inner=Root(F, symmetric=True), solver=solver)
    assert blamed(report, "implicit gradient", "u.Av")  # of methods that make no use of it, too


def test_a_fixed_point_that_is_declared_symmetric_and_is_not():
    problem = affine()
    report = check(problem, inner=FixedPoint(problem.inner, symmetric=True), solver=CG(rtol=1e-9))
    assert blamed(report, "implicit gradient", "FixedPoint", "symmetric=False")


def test_a_custom_function_with_a_wrong_backward():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, grad):
            return 2 * grad

    problem = ridge()
    report = check(problem, outer=lambda w, lam: problem.outer(Wrong.apply(w), lam))
    assert blamed(report, "implicit gradient", "outer", "backward")


def test_gauss_newton_where_the_residuals_are_large():
    x = data(40, 8, dtype=F64)

    def outputs(w, lam):
        return (w * x).sin()

    def loss(z, lam):
        return (z - 3).square().sum() / 2

    def regulariser(w, lam):
        return lam * w * w / 2

    def objective(w, lam):
        return loss(outputs(w, lam), lam) + regulariser(w, lam)

    def solve(lam):
        w = torch.zeros((), dtype=F64)
        slope = torch.func.grad(objective)
        for _ in range(200):
            w = w - 0.1 * slope(w, lam)
        return w

    lam = torch.tensor(5.0, dtype=F64)
    assert check_hypergrad(lambda w, lam: w, objective, solve, lam).ok
    inner = GaussNewton(outputs, loss, regulariser)
    report = check_hypergrad(lambda w, lam: w, inner, solve, lam)
    assert blamed(report, "implicit gradient", "Gauss-Newton")


def test_params_that_a_loss_does_not_use():
    problem = ridge()
    report = check(problem, outer=lambda w, lam: lam**2)
    assert blamed(report, "params not connected", "outer does not depend on params")


A = torch.diag(torch.tensor([1.0, 2.0, 4.0], dtype=F64))
BEST = float((1 / A.diag()).sum() / (1 / A.diag().square()).sum())  # of the outer problem


@pytest.mark.parametrize("dtype", [F64, torch.float32])
def test_a_hypergradient_of_zero_at_an_optimum_of_the_outer_problem(dtype):
    assert check_three(BEST, dtype).ok

    def steps(theta):
        w = torch.zeros(3, dtype=dtype)
        for _ in range(150):
            w = w - 0.2 * torch.func.grad(inner_of_three)(w, theta)
        return w

    assert check_three(BEST, dtype, solve=steps).ok


def test_a_fault_at_an_optimum_of_the_outer_problem_still_speaks():
    report = check_three(BEST, inner=lambda w, h: inner_of_three(w, (h + h.detach()) / 2))
    assert blamed(report, "hyperparameter not connected", ".detach()")
    report = check_three(BEST, inner=lambda w, h: inner_of_three(w, (h + BEST) / 2))
    assert blamed(report, "hyperparameter not connected", "in the same way")
    report = check_three(BEST, inner=lambda w, h: inner_of_three(w, BEST))
    assert blamed(report, "hyperparameter not connected", "captures")


@pytest.mark.parametrize("wrap", [torch.Tensor.requires_grad_, torch.nn.Parameter])
def test_a_solve_that_returns_leaves_that_require_grad(wrap):
    assert check_three(solve=lambda h: wrap(solve_of_three(h.detach()))).ok


def test_a_matrix_of_zeros_is_not_taken_for_a_captured_value():
    report = check_three(
        outer=lambda w, h: w.sum(), inner=lambda w, h: ((w - h) ** 4).sum(), solve=torch.clone
    )
    assert blamed(report, "linear system not solved", "singular")


def test_a_solver_that_descends_a_wrong_gradient():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            return w.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad / 2

    def inner(w, h):
        return inner_of_three(w, h) + Halved.apply(w).square().sum()

    def solve(h):  # where the gradient that autograd gives is zero
        return h / (A.diag() + 1)

    assert blamed(check_three(inner=inner, solve=solve), "implicit gradient", "difference of its")
