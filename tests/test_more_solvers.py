"""The solvers beyond CG, GMRES, Neumann and Exact: what each is for, and the default."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    Auto,
    BiCGSTAB,
    Exact,
    FixedPoint,
    NormalCG,
    Nystrom,
    Root,
    SolveInfo,
    Status,
)
from tests.problems import EVERY, F64, WELL_POSED, data, ill_conditioned_ridge, relative_error

NEW = [MINRES, BiCGSTAB, NormalCG, LSMR]
ITERATIVE = [CG, GMRES, *NEW]
SYMMETRIC = (CG, MINRES)
ALWAYS = functools.partial(Auto, dense_below=0)  # the iterations of Auto at any size
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
each_new = pytest.mark.parametrize("method", NEW, ids=lambda m: m.__name__)
each = pytest.mark.parametrize("method", ITERATIVE, ids=lambda m: m.__name__)


def with_spectrum(*values: Any, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """A symmetric matrix with given eigenvalues."""
    spectrum = torch.cat([torch.as_tensor(v, dtype=F64).reshape(-1) for v in values])
    Q = torch.linalg.qr(data(seed, len(spectrum), len(spectrum), dtype=F64)).Q
    A = Q * spectrum @ Q.T
    return ((A + A.T) / 2).to(dtype)


def spread(n: int, low: float, high: float) -> Tensor:
    return torch.logspace(math.log10(low), math.log10(high), n, dtype=F64)


def indefinite(n: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return with_spectrum(-spread(n // 2, 1, 4), spread(n - n // 2, 1, 20), seed=seed, dtype=dtype)


def skewed(n: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """A well-conditioned matrix that is far from symmetric."""
    A = data(seed, n, n, dtype=F64) / n**0.5
    return (A.triu() - A.tril() / 2 + 2 * torch.eye(n, dtype=F64)).to(dtype)


def suiting(method: Any, n: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    """A matrix of the kind that a method is for."""
    if method is CG:
        return with_spectrum(spread(n, 1, 30), seed=seed, dtype=dtype)
    return indefinite(n, seed, dtype) if method is MINRES else skewed(n, seed, dtype)


def solve(solver: Any, A: Tensor, b: Tensor, **options: Any) -> tuple[Tensor, SolveInfo]:
    found: tuple[Tensor, SolveInfo] = solver.solve(
        lambda v: A @ v, b, rmatvec=lambda v: A.mT @ v, **options
    )
    return found


def residual(A: Tensor, x: Tensor, b: Tensor) -> float:
    return float((b - A @ x).norm() / b.norm())


# The closed forms


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        pytest.param(method, problem, id=f"{method.__name__}-{problem.__name__}")
        for method in ITERATIVE
        for problem in WELL_POSED
        if problem().symmetric or method not in SYMMETRIC
    ],
)
def test_each_iterative_solver_finds_the_closed_forms_that_fit_it(method, problem):
    problem = problem()
    found, info = hypergrad.implicit_grad(
        problem.outer,
        problem.condition,
        problem.solve(problem.hparams),
        problem.hparams,
        solver=method(rtol=1e-10),
        on_failure="raise",
        return_info=True,
    )
    assert relative_error(found, problem.hypergradient(problem.hparams)) < 1e-6
    assert info.status == Status.CONVERGED
    assert info.method == method.__name__


@pytest.mark.parametrize("problem", [*WELL_POSED, ill_conditioned_ridge], ids=lambda p: p.__name__)
@pytest.mark.parametrize("solver", [Auto(), ALWAYS(), ALWAYS(rtol=1e-10)], ids=repr)
def test_auto_finds_every_closed_form(solver, problem):
    problem = problem()
    found, info = hypergrad.implicit_grad(
        problem.outer,
        problem.condition,
        problem.solve(problem.hparams),
        problem.hparams,
        solver=solver,
        inner_tol=None,
        return_info=True,
    )
    assert relative_error(found, problem.hypergradient(problem.hparams)) < 1e-5
    assert info.success


@pytest.mark.parametrize("problem", EVERY, ids=lambda p: p.__name__)
@pytest.mark.parametrize("solver", [Auto(), ALWAYS()], ids=repr)
def test_auto_in_float32_is_right_or_says_so(solver, problem):
    problem = problem(torch.float32)
    found, info = hypergrad.implicit_grad(
        problem.outer,
        problem.condition,
        problem.solve(problem.hparams),
        problem.hparams,
        solver=solver,
        inner_tol=None,
        on_failure="ignore",
        return_info=True,
    )
    error = relative_error(found, problem.hypergradient(problem.hparams))
    assert error < 2e-3 or not info.success


@pytest.mark.parametrize("method", [NormalCG, LSMR])
@pytest.mark.parametrize("kind", [Root, FixedPoint])
def test_what_needs_the_transpose_gets_it_from_every_entry_point(method, kind):
    A, solver = skewed(5) / 4, method(rtol=1e-12)

    def F(x: Tensor, c: Tensor) -> Tensor:
        return A @ x - c if kind is Root else x - (A @ x - c)

    matrix = A  # also that of the fixed point of T = x - F
    c, w = data(1, 5, dtype=F64), data(2, 5, dtype=F64)
    x = torch.linalg.solve(matrix, c)
    expected = torch.linalg.solve(matrix.T, w)
    condition = kind(F)
    found = hypergrad.implicit_grad(lambda x, c: w @ x, condition, x, c, solver=solver)
    assert relative_error(found, expected) < 1e-9
    assert (
        relative_error(hypergrad.root_vjp(condition, x, (c,), w, solver=solver)[0], expected) < 1e-9
    )
    again, info = hypergrad.root_vjp(condition, x, (c,), w, solver=solver, return_info=True)
    assert relative_error(again[0], expected) < 1e-9
    assert info.method == method.__name__
    moved = hypergrad.root_jvp(condition, x, (c,), (w,), solver=solver)
    assert relative_error(moved, torch.linalg.solve(matrix, w)) < 1e-9

    decorate = hypergrad.custom_root if kind is Root else hypergrad.custom_fixed_point

    @decorate(F, solver=solver)
    def fit(init: None, c: Tensor) -> Tensor:
        return torch.linalg.solve(matrix, c)

    given = c.clone().requires_grad_()
    (fit(None, given) @ w).backward()
    assert given.grad is not None
    assert relative_error(given.grad, expected) < 1e-9
    assert relative_error(torch.func.jacrev(lambda c: fit(None, c))(c), matrix.inverse()) < 1e-9
    assert relative_error(torch.func.jacfwd(lambda c: fit(None, c))(c), matrix.inverse()) < 1e-9
    batch = torch.stack([c, 2 * c])
    grads = torch.func.vmap(torch.func.grad(lambda c: fit(None, c) @ w))(batch)
    assert relative_error(grads, expected.expand(2, 5)) < 1e-9


@pytest.mark.parametrize("method", [NormalCG, LSMR])
def test_a_solve_without_the_transpose_names_what_is_missing(method):
    with pytest.raises(hypergrad.UnsupportedOperation, match="rmatvec"):
        method().solve(lambda v: 2 * v, torch.ones(3))


@pytest.mark.parametrize("method", [NormalCG, LSMR])
def test_a_symmetric_condition_is_its_own_transpose(method):
    A, theta = indefinite(6), torch.ones(6, dtype=F64)
    found = hypergrad.implicit_grad(
        lambda w, theta: w.sum(),
        hypergrad.Root(lambda w, theta: A @ (w - theta), symmetric=True),
        theta.clone(),
        theta,
        solver=method(rtol=1e-12),
    )
    assert relative_error(found, torch.ones(6, dtype=F64)) < 1e-9


# Symmetric indefinite and singular systems


@DTYPES
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("solver", [MINRES(), ALWAYS(), Auto(), LSMR(), NormalCG()], ids=repr)
def test_a_symmetric_indefinite_system_is_solved(solver, seed, dtype):
    A, b = indefinite(40, seed, dtype), data(seed + 9, 40, dtype=dtype)
    x, info = solve(solver, A, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(A.to(F64), b.to(F64)).to(dtype)) < (
        1e-5 if dtype == F64 else 2e-3
    )


@DTYPES
@pytest.mark.parametrize("n", [8, 60])
@pytest.mark.parametrize("solver", [MINRES(), LSMR(), NormalCG(), Auto()], ids=repr)
def test_a_singular_consistent_system_gets_the_answer_of_minimum_norm(solver, n, dtype):
    A = with_spectrum([0.0] * (n // 3), -spread(n // 3, 1, 4), spread(n - 2 * (n // 3), 1, 9))
    x_min = A @ data(3, n, dtype=F64)  # in the range of A
    x, info = solve(solver, A.to(dtype), (A @ x_min).to(dtype))
    assert info.status == Status.CONVERGED
    assert relative_error(x, x_min.to(dtype)) < (1e-5 if dtype == F64 else 2e-3)


@DTYPES
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("n", [8, 60])
@pytest.mark.parametrize(
    "solver",
    [MINRES(), MINRES(rtol=1e-8), MINRES(maxiter=500), LSMR(), NormalCG(), Auto()],
    ids=repr,
)
def test_a_singular_inconsistent_system_is_named_as_such_and_never_nan(solver, n, seed, dtype):
    A = with_spectrum([0.0] * (n // 3), spread(n - n // 3, 1, 9), seed=seed, dtype=dtype)
    b = data(seed + 20, n, dtype=dtype)
    x, info = solve(solver, A, b)
    assert info.status == Status.SINGULAR
    assert not info.success
    assert x.isfinite().all()
    least_squares = b - A @ (torch.linalg.pinv(A.to(F64), rtol=1e-5) @ b.to(F64)).to(dtype)
    assert residual(A, x, b) <= 1.01 * float(least_squares.norm() / b.norm())
    assert x.norm() < 100 * b.norm()  # the least eigenvalue but zero is 1


@pytest.mark.parametrize("seed", range(4))
def test_bicgstab_on_a_singular_system_is_right_or_says_so(seed):
    n = 8
    A = data(seed, n, 5, dtype=F64) @ data(seed + 1, 5, n, dtype=F64)
    for b in (A @ data(seed + 2, n, dtype=F64), data(seed + 3, n, dtype=F64)):
        x, info = solve(BiCGSTAB(), A, b)
        assert x.isfinite().all()
        assert bool(info.success) == (residual(A, x, b) <= 1e-6)
        assert info.status in (Status.CONVERGED, Status.SINGULAR, Status.BREAKDOWN)
        assert residual(A, x, b) <= 1 + 1e-9
        assert x.norm() < 1e4 * b.norm()


def test_bicgstab_breaks_down_where_its_coefficients_vanish():
    turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=F64)
    b = torch.tensor([1.0, 2.0], dtype=F64)
    x, info = solve(BiCGSTAB(), turn, b)
    assert info.status == Status.BREAKDOWN
    assert not info.success
    assert x.isfinite().all()
    assert residual(turn, x, b) <= 1
    with pytest.raises(hypergrad.NotConverged, match=r"broke down.*GMRES"):
        hypergrad.implicit_grad(
            lambda w, t: b @ w,
            Root(lambda w, t: turn @ w - t),
            torch.zeros(2, dtype=F64),
            torch.zeros(2, dtype=F64),
            solver=BiCGSTAB(),
            on_failure="raise",
        )


@each_new
def test_the_zero_matrix_is_singular(method):
    x, info = solve(method(), torch.zeros(3, 3, dtype=F64), torch.ones(3, dtype=F64))
    assert info.status == Status.SINGULAR
    assert not info.success
    assert not x.any()


@pytest.mark.parametrize("solver", [*(m() for m in NEW), ALWAYS(), Auto()], ids=repr)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_number_that_is_not_finite_is_never_turned_into_an_answer(solver, bad):
    A, b = torch.eye(4, dtype=F64), torch.ones(4, dtype=F64)
    A[1, 2] = bad
    for matrix, rhs in ((A, b), (torch.eye(4, dtype=F64), torch.full_like(b, bad))):
        x, info = solve(solver, matrix, rhs)
        assert info.status == Status.NOT_FINITE
        assert not info.success
        assert x.isnan().all()


@pytest.mark.parametrize("method", [MINRES])
def test_a_method_for_symmetric_matrices_refuses_the_rest(method):
    theta = torch.ones(3, dtype=F64)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"MINRES.*symmetric.*GMRES"):
        hypergrad.root_vjp(lambda w, t: w - t, theta, (theta,), theta, solver=method())


# Fields


@each
@pytest.mark.parametrize("damping", [-0.3, 2.5])
def test_damping_shifts_the_matrix(method, damping):
    A = suiting(method, 7)
    b, damped = data(2, 7, dtype=F64), A + damping * torch.eye(7, dtype=F64)
    x, info = solve(method(damping=damping, rtol=1e-10), A, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(damped, b)) < 1e-8
    assert float(info.residual_norm) == pytest.approx(residual(damped, x, b), abs=1e-13)


def test_damping_shifts_the_matrix_of_auto_and_nystrom_too():
    A, b = with_spectrum(spread(6, 1, 9)), data(2, 6, dtype=F64)
    damped = A + 2.5 * torch.eye(6, dtype=F64)
    for solver in (Auto(damping=2.5), ALWAYS(damping=2.5), Nystrom(6, damping=2.5)):
        x, _ = solve(solver, A, b)
        assert relative_error(x, torch.linalg.solve(damped, b)) < 1e-5


@each_new
def test_x0_that_is_the_answer_is_kept_and_one_near_it_saves_iterations(method):
    A, b = suiting(method, 40), data(4, 40, dtype=F64)
    exact = torch.linalg.solve(A, b)
    kept, info = solve(method(), A, b, x0=exact)
    assert info.iterations == 0
    torch.testing.assert_close(kept, exact, rtol=1e-14, atol=0)
    _, cold = solve(method(rtol=1e-8), A, b)
    x, warm = solve(method(rtol=1e-8), A, b, x0=exact + 1e-6 * data(5, 40, dtype=F64))
    assert warm.iterations < cold.iterations
    assert residual(A, x, b) <= 1e-8
    far, _ = solve(method(rtol=1e-10), A, b, x0=1e3 * data(6, 40, dtype=F64))
    assert relative_error(far, exact) < 1e-8


@pytest.mark.parametrize("solver", [*(m() for m in NEW), ALWAYS(), Nystrom(4)], ids=repr)
def test_a_zero_right_hand_side_gives_zeros_without_a_product(solver):
    def product(v: Tensor) -> Tensor:
        raise AssertionError("a product was formed")

    x, info = solver.solve(product, torch.zeros(5), rmatvec=product)
    assert not x.any()
    assert info.status == Status.CONVERGED
    assert info.success
    assert info.matvecs == 0
    assert info.residual_norm == 0


@each_new
@DTYPES
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_tiny_or_huge_right_hand_side_loses_no_accuracy(method, dtype, scale):
    A, b = suiting(method, 12, dtype=dtype), data(5, 12, dtype=dtype)
    x, info = solve(method(), A, b)
    scaled, again = solve(method(), A, scale * b)
    assert relative_error(scaled.to(F64) / scale, x.to(F64)) < 1e-3
    assert again.status == info.status == Status.CONVERGED
    assert residual(A.to(F64), scaled.to(F64), scale * b.to(F64)) <= (
        1e-6 if dtype == F64 else 1.1e-4
    )


@each_new
@DTYPES
@pytest.mark.parametrize("scale", [1e-12, 1e12])
def test_a_tiny_or_huge_matrix_is_no_singular_one(method, scale, dtype):
    A, b = suiting(method, 12, dtype=dtype), data(5, 12, dtype=dtype)
    x, info = solve(method(), scale * A, b)
    assert info.status == Status.CONVERGED
    assert relative_error(scale * x, torch.linalg.solve(A, b)) < (1e-5 if dtype == F64 else 1e-3)


@each_new
def test_a_tolerance_is_met_or_missed_and_said(method):
    A, b = suiting(method, 40), data(6, 40, dtype=F64)
    x, info = solve(method(rtol=1e-3), A, b)
    assert info.status == Status.CONVERGED
    assert residual(A, x, b) <= 1e-3
    for solver, success in (
        (method(maxiter=2), True),
        (method(maxiter=2, rtol=1e-8), False),
    ):
        x, info = solve(solver, A, b)
        assert info.status == Status.MAX_ITERATIONS
        assert bool(info.success) == success
        assert info.iterations == 2
        assert residual(A, x, b) <= 1
        assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=1e-9)
    _, info = solve(method(rtol=1e-17), A, b)
    assert not info.success
    assert info.residual_norm < 1e-12
    _, info = solve(method(atol=1.1 * float(b.norm())), A, b)
    assert info.iterations == info.matvecs == 0


@each_new
def test_products_are_counted_exactly(method):
    A, count = suiting(method, 12), 0

    def product(M: Tensor, v: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return M @ v

    _, info = method().solve(
        lambda v: product(A, v), data(7, 12, dtype=F64), rmatvec=lambda v: product(A.T, v)
    )
    assert info.matvecs == count


@each_new
@DTYPES
def test_a_system_on_a_pytree_keeps_structure_and_dtypes(method, dtype):
    b = {"a": torch.ones(2, 3, dtype=dtype), "b": (torch.ones((), dtype=dtype),)}

    def product(tree: Any) -> Any:
        return pytree.tree_map(lambda leaf: 2 * leaf, tree)

    x, info = method().solve(product, b, rmatvec=product)
    assert pytree.tree_structure(x) == pytree.tree_structure(b)
    assert all(leaf.dtype == dtype for leaf in pytree.tree_leaves(x))
    assert relative_error(x, pytree.tree_map(lambda leaf: leaf / 2, b)) < 1e-6
    assert info.success


# Preconditioners


@each_new
def test_an_inexact_preconditioner_saves_iterations_and_keeps_the_answer(method):
    scales = spread(40, 1, 1e3)
    A, b = scales.diag() + with_spectrum(spread(40, 0.1, 0.5)), data(8, 40, dtype=F64)
    _, before = solve(method(rtol=1e-10), A, b)
    x, info = solve(method(rtol=1e-10, preconditioner=lambda v: v / scales), A, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-7
    assert 2 * info.iterations < before.iterations
    assert residual(A, x, b) <= 1e-10


@pytest.mark.parametrize("method", [NormalCG, LSMR, BiCGSTAB])
def test_a_preconditioner_need_not_be_symmetric(method):
    A, b = skewed(10), data(9, 10, dtype=F64)
    inverse = A.inverse() + 0.01 * data(10, 10, 10, dtype=F64)
    x, info = solve(method(rtol=1e-10, preconditioner=lambda v: inverse @ v), A, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-8


def test_minres_breaks_down_at_an_indefinite_preconditioner():
    A, b = indefinite(6), data(11, 6, dtype=F64)
    _, info = solve(MINRES(preconditioner=lambda v: -v), A, b)
    assert info.status == Status.BREAKDOWN
    assert not info.success


@pytest.mark.parametrize("seed", range(3))
def test_minres_with_a_preconditioner_names_a_singular_system(seed):
    A = with_spectrum([0.0] * 4, -spread(8, 1, 4), spread(8, 1, 9), seed=seed)
    M = with_spectrum(spread(20, 0.1, 3), seed=seed + 1)
    solver = MINRES(preconditioner=lambda v: M @ v)
    x, info = solve(solver, A, data(seed + 2, 20, dtype=F64))
    assert info.status == Status.SINGULAR
    assert x.isfinite().all()
    b = A @ data(seed + 3, 20, dtype=F64)
    x, info = solve(solver, A, b)
    assert info.status == Status.CONVERGED
    assert residual(A, x, b) <= 1e-6


@DTYPES
@pytest.mark.parametrize("method", SYMMETRIC)
@pytest.mark.parametrize("damping", [0.0, 0.5])
def test_a_nystrom_preconditioner_saves_iterations_on_low_rank_plus_identity(
    method, damping, dtype
):
    A = with_spectrum(spread(12, 30, 3000), [1.0] * 188, dtype=dtype)
    A = A + torch.diag(torch.rand(200, generator=torch.Generator().manual_seed(0))).to(dtype) / 4
    b = data(12, 200, dtype=dtype)
    _, plain = solve(method(damping=damping), A, b)
    solver = method(damping=damping, preconditioner=Nystrom(rank=30))
    x, info = solve(solver, A, b)
    assert info.status == Status.CONVERGED
    assert 2 * info.iterations < plain.iterations
    damped = A.to(F64) + damping * torch.eye(200, dtype=F64)
    assert relative_error(x, torch.linalg.solve(damped, b.to(F64)).to(dtype)) < 1e-3
    # The sketch, one a step, and the two for the residual (one less with no second pass).
    assert info.matvecs <= 30 + info.iterations + 2
    tasks, _ = torch.func.vmap(lambda b: solver.solve(lambda v: A @ v, b))(torch.stack([b, 2 * b]))
    assert relative_error(tasks, torch.stack([x, 2 * x])) < 1e-3


def test_nystrom_by_itself_solves_low_rank_plus_damping():
    B = data(13, 50, 5, dtype=F64)
    A, b = B @ B.T, data(14, 50, dtype=F64)
    x, info = solve(Nystrom(rank=8, damping=0.3), A, b)
    damped = A + 0.3 * torch.eye(50, dtype=F64)
    assert relative_error(x, torch.linalg.solve(damped, b)) < 1e-9
    assert info.status == Status.CONVERGED
    assert info.matvecs == 9
    least, info = solve(Nystrom(rank=8), A, A @ b)
    assert relative_error(least, torch.linalg.pinv(A, hermitian=True) @ (A @ b)) < 1e-7
    x, info = solve(Nystrom(rank=3, damping=0.3), A, b)
    assert not info.success
    assert float(info.residual_norm) == pytest.approx(residual(damped, x, b), rel=1e-9)


def test_nystrom_leaves_the_callers_random_numbers_alone_and_repeats_itself():
    A, b = with_spectrum(spread(30, 0.01, 9)), data(15, 30, dtype=F64)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    x, _ = solve(Nystrom(rank=10, damping=0.1), A, b)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    again, _ = solve(Nystrom(rank=10, damping=0.1), A, b)
    torch.testing.assert_close(again, x, rtol=0, atol=0)
    batched, _ = torch.func.vmap(
        lambda A, b: Nystrom(rank=10, damping=0.1).solve(lambda v: A @ v, b)
    )(torch.stack([A, 2 * A]), torch.stack([b, b]))
    assert relative_error(batched[0], x) < 1e-10


def test_nystrom_works_in_a_hypergradient_of_several_tasks():
    problem = hypergrad_problem = ill_conditioned_ridge()
    found = hypergrad.implicit_grad(
        problem.outer,
        problem.condition,
        problem.solve(problem.hparams),
        problem.hparams,
        solver=CG(rtol=1e-10, preconditioner=Nystrom(rank=4)),
        inner_tol=None,
    )
    assert relative_error(found, hypergrad_problem.hypergradient(problem.hparams)) < 1e-6
    A = torch.stack([with_spectrum(spread(9, 1, 9), seed=s) for s in range(3)])
    b = data(16, 3, 9, dtype=F64)

    @hypergrad.custom_argmin(
        lambda w, t, A: (w - t) @ A @ (w - t) / 2,
        solver=CG(rtol=1e-10, preconditioner=Nystrom(rank=5)),
    )
    def fit(init: None, t: Tensor, A: Tensor) -> Tensor:
        return t.clone()

    grads = torch.func.vmap(torch.func.grad(lambda t, A, b: fit(None, t, A) @ b))(b, A, b)
    assert relative_error(grads, b) < 1e-8


def test_a_solver_that_is_no_preconditioner_is_refused():
    with pytest.raises(hypergrad.UnsupportedOperation, match="Nystrom"):
        CG(preconditioner=GMRES()).solve(lambda v: 2 * v, torch.ones(3))


# Ritz values


@pytest.mark.parametrize("n", [1, 7, 30])
@pytest.mark.parametrize("method", SYMMETRIC)
def test_ritz_values_at_full_length_are_the_extreme_eigenvalues(method, n):
    A, b = with_spectrum(torch.linspace(1, 9, n).to(F64)), data(17, n, dtype=F64)
    _, info = solve(method(maxiter=n, rtol=1e-15), A, b)
    spectrum = torch.linalg.eigvalsh(A)
    torch.testing.assert_close(info.eigenvalues, spectrum[[0, -1]], rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("steps", [1, 2, 5, 20])
@pytest.mark.parametrize("method", SYMMETRIC)
def test_ritz_values_lie_inside_the_spectrum(method, steps, seed):
    A = with_spectrum(spread(80, 1e-2, 1e2), seed=seed)
    _, info = solve(method(maxiter=steps), A, data(seed + 5, 80, dtype=F64))
    spectrum, (low, high) = torch.linalg.eigvalsh(A), info.eigenvalues
    assert spectrum[0] * (1 - 1e-9) <= low <= high <= spectrum[-1] * (1 + 1e-9)
    _, damped = solve(
        dataclasses.replace(method(maxiter=steps), damping=3.0), A, data(seed + 5, 80, dtype=F64)
    )
    assert 3 + spectrum[0] * (1 - 1e-9) <= damped.eigenvalues[0]


def test_ritz_values_show_negative_curvature_and_singular_directions():
    b = data(18, 20, dtype=F64)
    _, info = solve(CG(), indefinite(20), b)
    assert info.eigenvalues[0] < 0
    _, info = solve(MINRES(rtol=1e-12), indefinite(20), b)
    torch.testing.assert_close(
        info.eigenvalues, torch.tensor([-4.0, 20.0], dtype=F64), rtol=1e-6, atol=0
    )
    _, info = solve(MINRES(), with_spectrum([0.0] * 4, spread(16, 1, 9)), b)
    assert info.eigenvalues[0].abs() < 1e-10


@pytest.mark.parametrize("method", SYMMETRIC)
def test_ritz_values_of_a_batch_are_those_of_each_task(method):
    A = torch.stack([with_spectrum(spread(12, 1, 2.0 + 9 * s), seed=s) for s in range(4)])
    b = data(19, 4, 12, dtype=F64)
    b[3] = 0
    _, info = torch.func.vmap(lambda A, b: method(rtol=1e-3).solve(lambda v: A @ v, b))(A, b)
    assert info.iterations[0] < info.iterations[2]
    for task in range(3):
        _, alone = solve(method(rtol=1e-3), A[task], b[task])
        torch.testing.assert_close(info.eigenvalues[task], alone.eigenvalues, rtol=1e-9, atol=0)
    assert info.eigenvalues[3].isnan().all()


def test_ritz_values_of_a_long_iteration_are_those_of_its_parts():
    A, b = with_spectrum(spread(700, 1, 1e4)), data(20, 700, dtype=F64)
    _, info = solve(CG(rtol=1e-10), A, b)
    assert info.iterations > 520
    assert info.eigenvalues[0] == pytest.approx(1, rel=0.1)
    assert info.eigenvalues[1] == pytest.approx(1e4, rel=1e-6)


@pytest.mark.parametrize("n", [1, 6, 128, 129])
def test_exact_gives_the_spectrum_of_a_small_symmetric_matrix(n):
    A, theta = with_spectrum(torch.linspace(1, 9, n).to(F64)), torch.ones(n, dtype=F64)
    _, info = hypergrad.implicit_grad(
        lambda w, t: w.sum(),
        lambda w, t: (w - t) @ A @ (w - t) / 2,
        theta.clone(),
        theta,
        solver=Exact(damping=0.5),
        return_info=True,
    )
    if n > 128:
        assert info.eigenvalues.isnan().all()
    else:
        expected = torch.linalg.eigvalsh(A)[[0, -1]] + 0.5
        torch.testing.assert_close(info.eigenvalues, expected)


def test_with_a_preconditioner_the_ritz_values_are_not_known():
    _, info = solve(CG(preconditioner=lambda v: v / 2), indefinite(5) ** 2, torch.ones(5).to(F64))
    assert info.eigenvalues.isnan().all()


# Batches


@pytest.mark.parametrize("solver", [*(m(rtol=1e-2) for m in NEW), ALWAYS(rtol=1e-2)], ids=repr)
def test_each_task_of_a_batch_is_the_solve_by_itself(solver):
    kinds = {
        "easy": torch.eye(40, dtype=F64),
        "hard": with_spectrum(-spread(5, 1, 2), spread(35, 1, 3), seed=1),
        "huge": 1e9 * with_spectrum(spread(40, 1, 4), seed=2),
        "singular": with_spectrum([0.0] * 10, spread(30, 1, 3), seed=3),
        "not finite": torch.full((40, 40), math.nan, dtype=F64),
        "zero": torch.zeros(40, 40, dtype=F64),
        "again": with_spectrum(spread(40, 1, 3), seed=4),
    }
    A = torch.stack(list(kinds.values()))
    b = data(35, len(kinds), 40, dtype=F64)
    b[0] *= 1e-9
    x, info = torch.func.vmap(
        lambda A, b: solver.solve(lambda v: A @ v, b, rmatvec=lambda v: A.mT @ v)
    )(A, b)
    close = 1e-2 if isinstance(solver, BiCGSTAB) else 1e-6  # it is sensitive to rounding
    for task, name in enumerate(kinds):
        alone, own = solve(solver, A[task], b[task])
        assert info.status[task] == own.status, name
        assert info.success[task] == own.success, name
        if name == "singular":  # when that is noticed, is up to rounding
            assert x[task].isfinite().all()
            continue
        assert info.iterations[task] == own.iterations, name
        if name not in ("zero", "not finite"):
            assert relative_error(x[task], alone) < close, name
        torch.testing.assert_close(
            info.residual_norm[task], own.residual_norm, rtol=close, atol=1e-12, equal_nan=True
        )
    status = dict(zip(kinds, info.status.tolist(), strict=True))
    assert status["easy"] == Status.CONVERGED
    assert status["not finite"] == Status.NOT_FINITE
    assert status["zero"] == Status.SINGULAR
    assert status["singular"] != Status.CONVERGED


@pytest.mark.parametrize("solver", [*(m() for m in NEW), ALWAYS()], ids=repr)
def test_two_batch_dimensions_are_two_nested_loops(solver):
    A = torch.stack([suiting(type(solver), 5, seed) for seed in range(6)]).view(2, 3, 5, 5)
    b = data(37, 2, 3, 5, dtype=F64)

    def one(A: Tensor, b: Tensor) -> Any:
        return solver.solve(lambda v: A @ v, b, rmatvec=lambda v: A.mT @ v)

    x, info = torch.func.vmap(torch.func.vmap(one))(A, b)
    assert info.status.shape == (2, 3)
    assert relative_error(x, torch.linalg.solve(A, b[..., None])[..., 0]) < 1e-4


@each_new
def test_without_looks_nothing_is_read_from_the_device(method, monkeypatch):
    A, b = suiting(CG, 12), data(5, 12, dtype=F64)

    def refuse(flag: Tensor) -> bool:
        raise AssertionError("the host looked")

    theta = torch.ones_like(b)
    expected = A @ torch.linalg.solve(A, b)
    for name, module in list(sys.modules.items()):
        if name.startswith("hypergrad.solvers.") and hasattr(module, "any_task"):
            monkeypatch.setattr(module, "any_task", refuse)
    found = hypergrad.implicit_grad(
        lambda w, t: b @ w,
        lambda w, t: (w - t) @ A @ (w - t) / 2,
        theta.clone(),
        theta,
        solver=method(maxiter=30, rtol=0.0),
        on_failure="ignore",
    )
    assert relative_error(found, expected) < 1e-6


# Auto


def test_auto_says_what_it_did():
    n = 40
    b, theta = data(21, n, dtype=F64), torch.ones(n, dtype=F64)

    def method_for(A: Tensor, **fields: Any) -> tuple[str, Tensor]:
        found, info = hypergrad.implicit_grad(
            lambda w, t: b @ w,
            hypergrad.Root(lambda w, t: A @ (w - t), symmetric=True),
            theta.clone(),
            theta,
            solver=Auto(**fields),
            return_info=True,
        )
        assert relative_error(found, b) < 1e-5
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


def test_right_hand_sides_that_share_a_matrix_share_its_factorisation():
    n, counts = 60, []
    A, t = indefinite(n), data(42, n, dtype=F64)
    for solver in (Exact(), Auto(dense_below=2)):

        @hypergrad.custom_root(
            hypergrad.Root(lambda w, t: A @ (w - t), symmetric=True),
            solver=solver,
            callback=counts.append,
        )
        def fit(init: None, t: Tensor) -> Tensor:
            return t.clone()

        for jacobian in (torch.func.jacrev, torch.func.jacfwd):
            found = jacobian(lambda t: fit(None, t))(t)
            torch.testing.assert_close(found, torch.eye(n, dtype=F64), rtol=0, atol=1e-9)
            info = counts.pop()
            assert not counts
            assert info.method == "Exact"
            assert info.success.shape == (n,)
            assert set(info.matvecs.tolist()) == {n}


@each
def test_right_hand_sides_that_share_a_matrix_share_the_products_of_a_step(method):
    n, calls = 20, []
    A, t = suiting(CG, n), data(43, n, dtype=F64)

    @hypergrad.custom_argmin(
        lambda w, t: (w - t) @ A @ (w - t) / 2, solver=method(rtol=1e-10), callback=calls.append
    )
    def fit(init: None, t: Tensor) -> Tensor:
        return t.clone()

    found = torch.func.jacrev(lambda t: fit(None, t))(t)
    torch.testing.assert_close(found, torch.eye(n, dtype=F64), rtol=0, atol=1e-8)
    (info,) = calls
    assert info.iterations.shape == (n,)
    products = 2 if method in (BiCGSTAB, NormalCG, LSMR) else 1
    around = 13  # products that look for negative curvature, which these methods do not see
    assert info.matvecs[0] <= products * (info.iterations.max() + 3) + 2 + around


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_exact_at_the_rounding_floor_is_a_success_and_an_inconsistent_system_none(dtype):
    for n in (6, 50, 200):
        A = with_spectrum(spread(n, 1, 9e4), dtype=dtype)
        b = data(44, n, dtype=dtype)
        x, info = solve(Exact(), A, b)
        assert info.success
        true = torch.linalg.solve(A.to(F64), b.to(F64))
        assert relative_error(x, true) < (1e-9 if dtype == F64 else 2e-3)
        A = with_spectrum([0.0], spread(n - 1, 1, 9), dtype=dtype)
        _, info = solve(Exact(), A, b)
        assert info.status == Status.SINGULAR
        assert not info.success


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


# Values

VALUES = [MINRES(), BiCGSTAB(), NormalCG(), LSMR(), Auto(), Nystrom(rank=2)]


@pytest.mark.parametrize("solver", VALUES, ids=lambda s: type(s).__name__)
def test_a_solver_is_a_frozen_printable_comparable_value(solver):
    name = next(iter(dataclasses.fields(solver))).name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(solver, name, 1)
    assert hash(solver) == hash(dataclasses.replace(solver))
    changed = dataclasses.replace(solver, **{name: 3})
    assert changed != solver
    assert eval(repr(changed), vars(hypergrad)) == changed


@pytest.mark.parametrize("solver", VALUES, ids=lambda s: type(s).__name__)
def test_every_leaf_of_an_info_is_a_tensor_with_fixed_dtype(solver):
    _, info = solver.solve(lambda v: 2 * v, torch.ones(2), rmatvec=lambda v: 2 * v)
    assert all(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(info))
    assert info.status.dtype == info.iterations.dtype == info.matvecs.dtype == torch.int64
    assert info.success.dtype == info.negative_curvature.dtype == torch.bool
    assert info.eigenvalues.shape == (2,)
    assert re.search(info.method, str(info))
    assert info.status == Status.CONVERGED


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        *[(m, "maxiter", 0) for m in [*NEW, Auto]],
        *[(m, "rtol", -1e-3) for m in [*NEW, Auto]],
        *[(m, "atol", math.nan) for m in [*NEW, Auto]],
        *[(m, "damping", math.inf) for m in [*NEW, Auto]],
        (Auto, "dense_below", -1),
        (Nystrom, "rank", 0),
        (functools.partial(Nystrom, 3), "damping", -1.0),
    ],
)
def test_a_field_that_means_nothing_is_refused(make, field, value):
    with pytest.raises(ValueError, match=field):
        make(**{field: value})
