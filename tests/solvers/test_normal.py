"""Rectangular systems: `LSMR` and `NormalCG` by themselves."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import CG, GMRES, LSMR, BiCGSTAB, FixedPoint, NormalCG, Root, Status
from tests.problems import F64, data, relative_error
from tests.systems import indefinite, skewed, solve

SOLVERS = pytest.mark.parametrize("solver", [LSMR(), NormalCG()], ids=["LSMR", "NormalCG"])
SHAPES = pytest.mark.parametrize("shape", [(9, 4), (4, 9), (6, 1), (1, 6)], ids=str)


def solved(solver, A, b, **options):
    return solver.solve(lambda v: A @ v, b, rmatvec=lambda v: A.T @ v, **options)


@SOLVERS
@SHAPES
@pytest.mark.parametrize("units", [1e-8, 1.0, 1e8])
@pytest.mark.parametrize("start", [False, True], ids=["", "x0"])
def test_the_answer_is_that_of_least_squares_and_of_minimum_norm(solver, shape, units, start):
    A, b = data(1, *shape, dtype=F64), units * data(2, shape[0], dtype=F64)
    x0 = torch.zeros(shape[1], dtype=F64) if start else None
    x, info = solved(solver, A, b, x0=x0)
    right = torch.linalg.pinv(A) @ b
    torch.testing.assert_close(x, right, rtol=0, atol=1e-6 * float(right.abs().max()))
    assert info.success
    assert info.status == Status.CONVERGED
    missed = (b - A @ x).norm() / b.norm()
    torch.testing.assert_close(info.residual_norm, missed, rtol=1e-6, atol=1e-9)


@SOLVERS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_where_rank_is_lacking_the_norm_is_the_least(solver, dtype):
    A = data(3, 9, 3, dtype=F64) @ data(4, 3, 6, dtype=F64)
    b = data(5, 9, dtype=F64)
    right = torch.linalg.pinv(A, rtol=1e-10) @ b
    x, info = solved(solver, A.to(dtype), b.to(dtype))
    assert info.success
    assert x.dtype == dtype
    close = 1e-8 if dtype == F64 else 1e-3
    assert (x - right).norm() < close * right.norm()


@SOLVERS
def test_it_starts_where_it_is_told_and_stays_as_close_to_it_as_it_can(solver):
    A, x0 = data(6, 3, 7, dtype=F64), data(7, 7, dtype=F64)
    b = data(8, 3, dtype=F64)
    x, info = solved(type(solver)(rtol=1e-12), A, b, x0=x0)
    torch.testing.assert_close(x, x0 + torch.linalg.pinv(A) @ (b - A @ x0))
    assert info.success
    again, info = solved(solver, A, b, x0=x)
    torch.testing.assert_close(again, x)
    assert info.success


@SOLVERS
def test_columns_in_units_that_differ(solver):
    A, b = data(9, 9, 3, dtype=F64), data(10, 9, dtype=F64)
    units = torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    x, info = solved(solver, A * units, b)
    assert info.success
    torch.testing.assert_close(x * units, torch.linalg.pinv(A) @ b, rtol=1e-4, atol=1e-5)


@SOLVERS
def test_pytrees_of_different_structures_on_both_sides(solver):
    A, b = data(11, 6, 3, dtype=F64), data(12, 6, dtype=F64)
    there = lambda x: (A @ torch.cat([x["w"], x["c"][None]])).reshape(2, 3)

    def back(y):
        found = A.T @ y.reshape(6)
        return {"w": found[:2], "c": found[2]}

    x, info = solver.solve(there, b.reshape(2, 3), rmatvec=back)
    torch.testing.assert_close(
        torch.cat([x["w"], x["c"][None]]), torch.linalg.pinv(A) @ b, rtol=1e-6, atol=1e-8
    )
    assert info.success
    with pytest.raises(hypergrad.StructureMismatch, match="matvec"):
        solver.solve(lambda x: there(x).reshape(6), b.reshape(2, 3), rmatvec=back)


@SOLVERS
def test_a_preconditioner_is_shaped_like_the_unknown(solver):
    A, b = data(13, 8, 4, dtype=F64), data(14, 8, dtype=F64)
    A = A * torch.tensor([1.0, 10.0, 100.0, 1000.0], dtype=F64)
    inverse = torch.linalg.inv(torch.linalg.qr(A).R)
    kind = type(solver)(rtol=1e-12, preconditioner=lambda v: inverse @ v)
    x, info = solved(kind, A, b)
    torch.testing.assert_close(x, torch.linalg.pinv(A) @ b)
    assert info.iterations <= 2


@SOLVERS
def test_what_is_cut_short_or_no_number_says_so(solver):
    A, b = data(15, 30, 12, dtype=F64), data(16, 30, dtype=F64)
    kind = type(solver)
    _, info = solved(kind(maxiter=2, rtol=1e-10), A, b)
    assert info.status == Status.MAX_ITERATIONS
    assert not info.success
    _, info = solved(kind(maxiter=2), A, b)
    assert info.success  # a budget
    x, info = solved(solver, A, torch.full_like(b, math.nan))
    assert info.status == Status.NOT_FINITE
    assert x.isnan().all()
    x, info = solved(solver, A, torch.zeros_like(b), x0=torch.ones(12, dtype=F64))
    assert torch.equal(x, torch.zeros(12, dtype=F64))
    assert info.success
    orthogonal = b - A @ (torch.linalg.pinv(A) @ b)
    x, info = solved(solver, A, orthogonal)  # nothing can be gained
    assert x.norm() < 1e-8 * orthogonal.norm()
    assert info.success


@SOLVERS
def test_damping_and_square_methods_are_refused(solver):
    A, b, x0 = data(17, 5, 3, dtype=F64), data(18, 5, dtype=F64), torch.zeros(3, dtype=F64)
    with pytest.raises(hypergrad.UnsupportedOperation, match="a rectangular A has not"):
        solved(type(solver)(damping=0.1), A, b)
    for square in (CG(), GMRES()):
        with pytest.raises(hypergrad.StructureMismatch, match="x0 has shape"):
            solved(square, A, b, x0=x0)


@SOLVERS
def test_a_square_system_without_a_solution_stays_singular(solver):
    A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=F64)
    x, info = solved(solver, A, torch.tensor([1.0, 2.0], dtype=F64))
    assert info.status == Status.SINGULAR
    assert not info.success
    torch.testing.assert_close(x, torch.full((2,), 0.75, dtype=F64))


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
    hypergradient = hypergrad.implicit_grad(lambda x, c: w @ x, condition, x, c, solver=solver)
    assert relative_error(hypergradient, expected) < 1e-9
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
    hypergradient = hypergrad.implicit_grad(
        lambda w, theta: w.sum(),
        hypergrad.Root(lambda w, theta: A @ (w - theta), symmetric=True),
        theta.clone(),
        theta,
        solver=method(rtol=1e-12),
    )
    assert relative_error(hypergradient, torch.ones(6, dtype=F64)) < 1e-9


@pytest.mark.parametrize("method", [NormalCG, LSMR, BiCGSTAB])
def test_a_preconditioner_need_not_be_symmetric(method):
    A, b = skewed(10), data(9, 10, dtype=F64)
    inverse = A.inverse() + 0.01 * data(10, 10, 10, dtype=F64)
    x, info = solve(method(rtol=1e-10, preconditioner=lambda v: inverse @ v), A, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-8
