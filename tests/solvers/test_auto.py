"""The default solver: right on every closed form, and it says what it did."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import CG, GMRES, Auto, Root, SolveInfo, Status
from tests.problems import EVERY, F64, WELL_POSED, data, ill_conditioned_ridge, relative_error
from tests.systems import indefinite, skewed, solve, spread, suiting, with_spectrum


@pytest.mark.parametrize(
    ("n", "condition", "method"),
    [
        (100, "minimum", "Exact"),
        (101, "minimum", "CG"),
        (300, "root", "Exact"),
        (301, "root", "Auto: entry by entry"),
    ],
)
def test_no_solver_means_exact_for_small_systems_alone(n, condition, method):
    theta = torch.ones(n, dtype=F64)
    inner: Callable[..., Any] | Root = lambda w, theta: (w - theta).square().sum()
    if condition == "root":
        inner = Root(lambda w, theta: w - theta)
    hypergradient, info = hypergrad.implicit_grad(
        lambda w, theta: w.sum(), inner, theta.clone(), theta, return_info=True
    )
    assert info.method == method
    torch.testing.assert_close(hypergradient, theta)


ALWAYS = functools.partial(Auto, dense_below=0)  # the iterations of Auto at any size
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)


@pytest.mark.parametrize("problem", [*WELL_POSED, ill_conditioned_ridge], ids=lambda p: p.__name__)
@pytest.mark.parametrize("solver", [Auto(), ALWAYS(), ALWAYS(rtol=1e-10)], ids=repr)
def test_auto_finds_every_closed_form(solver, problem):
    problem = problem()
    hypergradient, info = hypergrad.implicit_grad(
        problem.outer,
        problem.condition,
        problem.solve(problem.hparams),
        problem.hparams,
        solver=solver,
        inner_tol=None,
        return_info=True,
    )
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-5
    assert info.success


@pytest.mark.parametrize("problem", EVERY, ids=lambda p: p.__name__)
@pytest.mark.parametrize("solver", [Auto(), ALWAYS()], ids=repr)
def test_auto_in_float32_is_right_or_says_so(solver, problem):
    problem = problem(torch.float32)
    hypergradient, info = hypergrad.implicit_grad(
        problem.outer,
        problem.condition,
        problem.solve(problem.hparams),
        problem.hparams,
        solver=solver,
        inner_tol=None,
        on_failure="ignore",
        return_info=True,
    )
    error = relative_error(hypergradient, problem.hypergradient(problem.hparams))
    assert error < 2e-3 or not info.success


def test_auto_says_what_it_did():
    n = 40
    b, theta = data(21, n, dtype=F64), torch.ones(n, dtype=F64)

    def method_for(A: Tensor, **fields: Any) -> tuple[str, Tensor]:
        hypergradient, info = hypergrad.implicit_grad(
            lambda w, t: b @ w,
            hypergrad.Root(lambda w, t: A @ (w - t), symmetric=True),
            theta.clone(),
            theta,
            solver=Auto(**fields),
            return_info=True,
        )
        assert relative_error(hypergradient, b) < 1e-5
        return info.method, info.negative_curvature

    assert method_for(indefinite(n)) == ("Exact", torch.tensor(True))
    assert method_for(suiting(CG, n), dense_below=0) == ("CG", torch.tensor(False))
    for dense_below, expected in (
        (0, "Auto: CG, then MINRES"),
        (n - 1, "Auto: CG, then Exact"),  # at this size a factorisation is the cheaper one
        (n // 4, "Auto: CG, then MINRES, then Exact"),
    ):
        method, negative = method_for(indefinite(n), dense_below=dense_below)
        assert method == expected
        assert negative


def test_auto_falls_back_for_the_tasks_that_need_it_alone():
    good, bad = suiting(CG, 12), indefinite(12)
    counts = []

    @hypergrad.custom_root(
        hypergrad.Root(lambda w, t, A: A @ (w - t), symmetric=True),
        solver=ALWAYS(rtol=1e-10),
        callback=counts.append,
    )
    def fit(init: None, t: Tensor, A: Tensor) -> Tensor:
        return t.clone()

    b, A = data(22, 3, 12, dtype=F64), torch.stack([good, bad, good])
    grads = torch.func.vmap(torch.func.grad(lambda t, A, b: fit(None, t, A) @ b))(b, A, b)
    assert relative_error(grads, b) < 1e-8
    (info,) = counts
    assert info.method == "Auto: CG, then MINRES"
    assert info.success.all()
    assert info.negative_curvature.tolist() == [False, True, False]
    _, alone = solve(CG(rtol=1e-10), good, b[0])
    assert abs(info.iterations[0] - alone.iterations) <= 1


def test_auto_leaves_gmres_where_it_is_stuck():
    # A cyclic shift: every restart of GMRES before the n-th step gains nothing.
    n = 120
    A = torch.roll(torch.eye(n, dtype=F64), 1, dims=0)
    b = torch.eye(n, dtype=F64)[0]
    _, alone = solve(GMRES(), A, b)
    assert not alone.success
    x, info = solve(ALWAYS(), A, b)
    assert info.success
    assert info.method == "Auto: GMRES, then BiCGSTAB, then LSMR"
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-5
    assert info.matvecs > alone.matvecs


@pytest.mark.parametrize("symmetric", [True, False])
def test_where_iterations_run_out_the_last_resort_of_auto_is_a_factorisation(symmetric):
    A, theta = with_spectrum(spread(70, 1, 9e6)), torch.ones(70, dtype=F64)
    if not symmetric:
        A = torch.roll(A, 1, dims=0)
    b = data(27, 70, dtype=F64)

    def run(**fields: Any) -> SolveInfo:
        _, info = hypergrad.implicit_grad(
            lambda w, t: b @ w,
            Root(lambda w, t: A @ (w - t), symmetric=symmetric),
            theta.clone(),
            theta,
            solver=Auto(**fields),
            on_failure="ignore",
            return_info=True,
        )
        return info

    first = "Auto: CG" if symmetric else "Auto: GMRES"
    for dense_below in (2, 20):
        info = run(dense_below=dense_below)
        assert info.method == f"{first}, then Exact"
        assert info.success
        assert relative_error(info.solution, torch.linalg.solve(A.T, b)) < 1e-5
        assert info.matvecs <= 2 * 70  # of which the factorisation took 70
    assert "Exact" not in run(dense_below=1).method  # above fifty times as many unknowns
    assert "Exact" not in run(dense_below=20, maxiter=60, rtol=1e-6).method


@DTYPES
@pytest.mark.parametrize("n", [130, 330])
@pytest.mark.parametrize("symmetric", [True, False])
def test_auto_is_no_worse_than_a_factorisation_where_a_residual_says_little(symmetric, n, dtype):
    # CG meets its tolerance here within ten iterations, and is off by a tenth.
    A = with_spectrum(spread(5, 1e-7, 1e-6), spread(n - 5, 1, 2))
    if dtype == torch.float32:
        A = with_spectrum(spread(5, 3e-4, 1e-3), spread(n - 5, 1, 2))
    if not symmetric:
        A = skewed(n) @ A
    u, theta = data(41, n, dtype=F64), torch.ones(n, dtype=dtype)
    b = (A.T @ u).to(dtype)
    A = A.to(dtype)
    _, info = hypergrad.implicit_grad(
        lambda w, t: b @ w,
        Root(lambda w, t: A @ (w - t), symmetric=symmetric),
        theta.clone(),
        theta,
        on_failure="ignore",
        return_info=True,
    )
    exact = torch.linalg.solve(A.T.to(F64), b.to(F64))
    assert relative_error(info.solution, exact) < (1e-5 if dtype == F64 else 2e-3)
    assert info.success


@pytest.mark.parametrize("solver", [ALWAYS(), Auto()], ids=repr)
@pytest.mark.parametrize(
    ("A", "symmetric"),
    [
        (with_spectrum(spread(60, 1, 9e6)), True),
        (indefinite(60), True),
        (skewed(60), False),
    ],
    ids=["condition 9e6", "indefinite", "not symmetric"],
)
def test_auto_is_right_in_float64(solver, A, symmetric):
    u, theta = data(23, 60, dtype=F64), torch.ones(60, dtype=F64)
    b = A.T @ u  # so that u is the answer
    condition = Root(lambda w, t: A @ (w - t), symmetric=symmetric)
    _, info = hypergrad.implicit_grad(
        lambda w, t: b @ w, condition, theta.clone(), theta, solver=solver, return_info=True
    )
    assert relative_error(A.T @ info.solution, b) < 1e-5
    assert info.success


def test_the_text_of_a_failure_names_the_method_that_was_used():
    A = with_spectrum([0.0] * 4, spread(8, 1, 9))
    theta, b = torch.ones(12, dtype=F64), data(24, 12, dtype=F64)
    with pytest.raises(hypergrad.SingularHessian, match="Auto: CG, then MINRES"):
        hypergrad.implicit_grad(
            lambda w, t: b @ w,
            lambda w, t: (w - t) @ A @ (w - t) / 2,
            theta.clone(),
            theta,
            solver=ALWAYS(),
            on_failure="raise",
        )


def test_within_the_budget_of_a_large_system_minres_takes_over_from_cg_at_a_saddle(monkeypatch):
    monkeypatch.setattr("hypergrad.solvers._auto._LARGE", 100)
    n = 400
    modes = torch.linspace(1.0, 3.0, n, dtype=torch.float64)
    modes[:3] = -5.0
    b = torch.ones(n, dtype=torch.float64)
    b[:3] = 12.0

    def inner(w, h):
        return (modes * w**2).sum() / 2 - h * (b @ w)

    w, h = torch.zeros(n, dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    arguments = (lambda w, h: b @ w, inner, w, h)
    with pytest.warns(hypergrad.ConvergenceWarning, match="negative curvature"):
        _, info = hypergrad.implicit_grad(*arguments, solver=Auto(rtol=1e-15), return_info=True)
    assert info.method == "Auto: CG, then MINRES"
    assert info.negative_curvature
    assert not info.success
    assert Status(int(info.status)) is Status.NEGATIVE_CURVATURE
    assert info.iterations <= 20
    by_cg = CG(maxiter=int(info.iterations)).solve(lambda v: modes * v, b)[1]
    assert info.residual_norm < 1e-2 * by_cg.residual_norm
