"""What every linear solver promises: the system it solves, when it stops, and what it says."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, GMRES, Exact, FixedPoint, Identity, Neumann, Root, SolveInfo, Status
from tests.problems import F64, data, relative_error, ridge

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
KRYLOV = [CG, GMRES]
METHODS = [Exact, CG, GMRES, lambda **fields: Neumann(terms=600, **fields)]
METHOD_NAMES = ["Exact", "CG", "GMRES", "Neumann"]
ALL = pytest.mark.parametrize("method", METHODS, ids=METHOD_NAMES)
ITERATIVE = pytest.mark.parametrize("method", METHODS[1:], ids=METHOD_NAMES[1:])


class Counting:
    """A matrix as a product that counts how often it is formed."""

    def __init__(self, A: Tensor) -> None:
        self.A, self.count = A, 0

    def __call__(self, v: Tensor) -> Tensor:
        self.count += 1
        return self.A @ v


def definite(n: int, seed: int = 0, condition: float = 10.0, dtype: torch.dtype = F64) -> Tensor:
    """A symmetric positive definite matrix with eigenvalues from 1 to `condition`."""
    Q = torch.linalg.qr(data(seed, n, n, dtype=F64)).Q
    A = Q * torch.logspace(0, math.log10(condition), n, dtype=F64) @ Q.T
    return ((A + A.T) / 2).to(dtype)


def semidefinite(n: int, rank: int, seed: int) -> Tensor:
    B = data(seed, n, rank, dtype=F64)
    return B @ B.T


def residual(A: Tensor, x: Tensor, b: Tensor) -> float:
    return float((b - A @ x).norm() / b.norm())


def hypergradient_with(A: Tensor, b: Tensor, solver: Any, **options: Any) -> Any:
    """A hypergradient whose linear system is ``A u = b``, at an exact inner solution."""

    def inner(w: Tensor, theta: Tensor) -> Tensor:
        return (w - theta) @ A @ (w - theta) / 2

    theta = torch.ones_like(b)
    return hypergrad.implicit_grad(
        lambda w, theta: b @ w, inner, theta.clone(), theta, solver=solver, **options
    )


# The system and its answer


@ALL
@DTYPES
def test_a_system_on_a_pytree_is_solved(method, dtype):
    A = definite(7, dtype=dtype)
    names = {"matrix": (2, 2), "scalar": (), "pair": (2,)}

    def split(v: Tensor) -> dict[str, Tensor]:
        return {"matrix": v[:4].view(2, 2), "scalar": v[4], "pair": (v[5:])}

    def joined(tree: dict[str, Tensor]) -> Tensor:
        return torch.cat([tree[name].reshape(-1) for name in names])

    b = data(1, 7, dtype=dtype)
    x, info = method().solve(lambda tree: split(A @ joined(tree)), split(b))
    assert {name: leaf.shape for name, leaf in x.items()} == names
    assert info.success
    expected = torch.linalg.solve(A.to(F64), b.to(F64))
    tolerance = 1e-5 if dtype == F64 else 1e-3
    assert relative_error(joined(x), expected.to(dtype)) < tolerance
    torch.testing.assert_close(info.solution, x, rtol=0, atol=0)


@ALL
def test_damping_means_the_same_in_every_solver(method):
    A, b, damping = definite(6), data(2, 6, dtype=F64), 2.5
    solver = method(damping=damping) if method is Exact else method(damping=damping, rtol=1e-10)
    damped = A + damping * torch.eye(6, dtype=F64)
    x, info = solver.solve(lambda v: A @ v, b)
    assert relative_error(x, torch.linalg.solve(damped, b)) < 1e-8
    assert float(info.residual_norm) == pytest.approx(residual(damped, x, b), abs=1e-13)
    # The hypergradient of `hypergradient_with` is A u.
    assert relative_error(hypergradient_with(A, b, solver), A @ x) < 1e-8


@pytest.mark.parametrize("damping", [-0.5, 3.0])
def test_damping_shifts_a_matrix_that_is_not_symmetric_too(damping):
    A, b = data(3, 6, 6, dtype=F64) + 8 * torch.eye(6, dtype=F64), data(4, 6, dtype=F64)
    expected = torch.linalg.solve(A + damping * torch.eye(6, dtype=F64), b)
    for solver in (GMRES(rtol=1e-12, damping=damping), Exact(damping=damping)):
        x, _ = solver.solve(lambda v: A @ v, b)
        assert relative_error(x, expected) < 1e-10


@pytest.mark.parametrize("restart", [None, 1, 3, 6, 50])
def test_gmres_solves_what_is_not_symmetric_at_any_length_of_a_cycle(restart):
    A, b = data(5, 12, 12, dtype=F64) + 10 * torch.eye(12, dtype=F64), data(6, 12, dtype=F64)
    x, info = GMRES(rtol=1e-10, restart=restart).solve(lambda v: A @ v, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-8


@pytest.mark.parametrize("solver", [GMRES(rtol=1e-10), Exact()], ids=["GMRES", "Exact"])
def test_a_symmetric_indefinite_system_is_solved(solver):
    Q = torch.linalg.qr(data(7, 6, 6, dtype=F64)).Q
    A = Q * torch.tensor([-3.0, -1.0, -0.5, 1.0, 2.0, 4.0], dtype=F64) @ Q.T
    b = data(8, 6, dtype=F64)
    x, info = solver.solve(lambda v: A @ v, b)
    assert info.success
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-8


@pytest.mark.parametrize("multiple", [1e-12, 0.3, 7.0, 1e12])
@DTYPES
def test_a_multiple_of_the_identity_takes_cg_one_iteration(multiple, dtype):
    b = data(9, 5, dtype=dtype)
    x, info = CG().solve(lambda v: multiple * v, b)
    torch.testing.assert_close(x, b / multiple, rtol=1e-6, atol=0)
    assert info.iterations == 1
    assert info.status == Status.CONVERGED


def test_the_identity_solver_divides_and_measures_nothing():
    product = Counting(definite(4))
    b = data(10, 4, dtype=F64)
    x, info = Identity(scale=4.0).solve(product, b)
    torch.testing.assert_close(x, b / 4, rtol=0, atol=0)
    assert product.count == 0
    assert info.success
    assert info.residual_norm.isnan()


@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_works_on_pytrees(method):
    d = {"a": torch.logspace(0, 5, 6, dtype=F64), "b": torch.tensor(1e3, dtype=F64)}
    b = pytree.tree_map(torch.ones_like, d)

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        return pytree.tree_map(torch.mul, d, v)

    def inverse(v: dict[str, Tensor]) -> dict[str, Tensor]:
        assert v["b"].shape == ()
        return pytree.tree_map(lambda v, d: v / d, v, d)

    plain = method(rtol=1e-8).solve(product, b)[1]
    x, info = method(rtol=1e-8, preconditioner=inverse).solve(product, b)
    torch.testing.assert_close(x, pytree.tree_map(torch.reciprocal, d), rtol=1e-7, atol=0)
    assert info.iterations == 1
    assert plain.iterations > 1


@pytest.mark.parametrize("method", KRYLOV)
def test_an_inexact_preconditioner_changes_the_path_and_not_the_answer(method):
    A, b = definite(30, condition=1e4), data(11, 30, dtype=F64)
    x, info = method(rtol=1e-10, preconditioner=lambda v: v / A.diagonal()).solve(
        lambda v: A @ v, b
    )
    assert residual(A, x, b) <= 1e-10
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), abs=1e-13)


@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_of_another_structure_is_refused(method):
    b = {"a": torch.ones(2, dtype=F64)}
    solver = method(preconditioner=lambda v: v["a"])
    with pytest.raises(hypergrad.StructureMismatch, match="preconditioner"):
        solver.solve(lambda v: v, b)


@ALL
def test_leaves_of_several_dtypes_each_keep_their_own(method):
    b = {"half": torch.ones(2, dtype=torch.float32), "full": torch.ones(3, dtype=F64)}
    x, info = method().solve(lambda v: pytree.tree_map(lambda t: 4 * t, v), b)
    expected = pytree.tree_map(lambda t: t / 4, b)
    torch.testing.assert_close(x, expected, rtol=1e-5, atol=0)
    assert info.residual_norm.dtype == F64


@ALL
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_solved_to_what_it_can_hold(method, dtype):
    A, b = definite(20, dtype=dtype), data(12, 20, dtype=dtype)
    x, info = method().solve(lambda v: A @ v, b)
    assert x.dtype == dtype
    assert info.success
    assert residual(A.to(F64), x.to(F64), b.to(F64)) < 3e-2


@ALL
def test_empty_and_strided_leaves_are_like_any_other(method):
    A = definite(6)
    b = {
        "empty": torch.zeros(0, 3, dtype=F64),
        "strided": data(13, 3, 2, dtype=F64).T,
        "expanded": torch.tensor(0.5, dtype=F64).expand(2)[:0],
    }

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**v, "strided": (A @ v["strided"].reshape(-1)).view(2, 3)}

    x, info = method().solve(product, b)
    expected = torch.linalg.solve(A, b["strided"].reshape(-1)).view(2, 3)
    assert relative_error(x["strided"], expected) < 1e-5
    assert x["empty"].shape == (0, 3)
    assert info.success


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda v: {"a": v["a"]}, "structure"),
        (lambda v: {**v, "b": v["b"][None]}, "shape"),
        (lambda v: {**v, "b": v["b"].float()}, "dtype"),
    ],
    ids=["structure", "shape", "dtype"],
)
def test_a_product_or_x0_of_another_structure_is_refused(change, what):
    b = {"a": torch.ones(2, dtype=F64), "b": torch.tensor(1.0, dtype=F64)}
    with pytest.raises(hypergrad.StructureMismatch, match=what):
        CG().solve(change, b)
    with pytest.raises(hypergrad.StructureMismatch, match=f"x0.*{what}"):
        CG().solve(lambda v: v, b, x0=change(b))


def test_nothing_of_the_callers_is_changed():
    A, b, x0 = definite(6), data(14, 6, dtype=F64), data(15, 6, dtype=F64)
    before = [t.clone() for t in (A, b, x0)]
    versions = [t._version for t in (A, b, x0)]
    for method in METHODS:
        method().solve(lambda v: A @ v, b, x0=x0)
    assert all(torch.equal(t, old) for t, old in zip((A, b, x0), before, strict=True))
    assert [t._version for t in (A, b, x0)] == versions


# When it stops


@pytest.mark.parametrize("method", KRYLOV)
def test_it_stops_at_the_first_iterate_whose_residual_meets_rtol(method):
    A, b = definite(40, condition=1e3), data(16, 40, dtype=F64)
    x, info = method(rtol=1e-3).solve(lambda v: A @ v, b)
    assert residual(A, x, b) <= 1e-3
    assert info.status == Status.CONVERGED
    earlier, before = method(rtol=1e-3, maxiter=int(info.iterations) - 1).solve(lambda v: A @ v, b)
    assert residual(A, earlier, b) > 1e-3
    assert before.status == Status.MAX_ITERATIONS


@pytest.mark.parametrize("method", KRYLOV)
def test_the_looser_of_rtol_and_atol_decides(method):
    A, b = definite(40, condition=1e3), 100 * data(16, 40, dtype=F64)
    size = float(b.norm())

    def iterations(**fields: float) -> int:
        return int(method(**fields).solve(lambda v: A @ v, b)[1].iterations)

    loose, tight = iterations(rtol=1e-2), iterations(rtol=1e-8)
    assert loose < tight
    assert iterations(rtol=1e-8, atol=1e-2 * size) == loose
    assert iterations(rtol=1e-2, atol=1e-8 * size) == loose
    assert iterations(rtol=1e-8, atol=1e-12 * size) == tight
    assert iterations(rtol=0.0, atol=1e-2 * size) == loose


@pytest.mark.parametrize("method", KRYLOV)
def test_a_right_hand_side_within_atol_needs_no_iteration(method):
    product = Counting(definite(4))
    x, info = method(atol=10.0).solve(product, torch.ones(4, dtype=F64))
    assert not x.any()
    assert info.iterations == 0
    assert info.success
    assert info.residual_norm == 1


@ITERATIVE
def test_an_explicit_rtol_that_is_missed_is_a_failure(method):
    A, b = definite(40, condition=1e3), data(17, 40, dtype=F64)
    solver = method(rtol=1e-10)
    budget = {"terms": 3} if isinstance(solver, Neumann) else {"maxiter": 3}
    solver = dataclasses.replace(solver, **budget)
    x, info = solver.solve(lambda v: A @ v, b)
    assert info.status == Status.MAX_ITERATIONS
    assert not info.success
    assert info.iterations == 3
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=1e-9)
    with pytest.raises(hypergrad.NotConverged, match="residual") as error:
        hypergradient_with(A, b, solver, on_failure="raise")
    assert f"{residual(A, x, b):.3g}" in str(error.value)  # the figure that went wrong
    assert next(iter(budget)) in str(error.value)  # and what to try
    with pytest.warns(hypergrad.ConvergenceWarning, match="ran out of iterations") as caught:
        hypergradient_with(A, b, solver)
    assert not re.search(r"\de-?\d", str(caught[0].message))  # figures are in the info


@ITERATIVE
def test_a_budget_that_runs_out_is_no_failure(method):
    A, b = definite(40, condition=1e3), data(17, 40, dtype=F64)
    solver = method()
    budget = {"terms": 3} if isinstance(solver, Neumann) else {"maxiter": 3}
    solver = dataclasses.replace(solver, **budget)
    x, info = solver.solve(lambda v: A @ v, b)
    assert info.status == Status.MAX_ITERATIONS
    assert info.success
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=1e-9)
    found = hypergradient_with(A, b, solver, on_failure="raise")
    assert relative_error(found, A @ x) < 1e-9


@pytest.mark.parametrize("method", KRYLOV)
def test_a_tolerance_below_the_rounding_floor_stagnates(method):
    A, b = definite(40, condition=1e4), data(18, 40, dtype=F64)
    x, info = method(rtol=1e-18).solve(lambda v: A @ v, b)
    assert info.status == Status.STAGNATED
    assert not info.success
    assert residual(A, x, b) < 1e-9  # the best iterate
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=0.5)


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("condition", [1e7, 1e8, 1e9])
def test_success_is_never_claimed_for_an_answer_that_is_no_better_than_none(method, condition):
    A, b = definite(50, condition=condition, dtype=torch.float32), data(19, 50, dtype=torch.float32)
    x, info = method().solve(lambda v: A @ v, b)
    true = residual(A.to(F64), x.to(F64), b.to(F64))
    assert not info.success or true < 0.1
    if info.status == Status.STAGNATED:  # the best iterate: zero has a residual of one
        assert true < 1 + 1e-5


@ITERATIVE
@DTYPES
def test_products_are_counted_exactly(method, dtype):
    for fields in ({}, {"rtol": 1e-12}, {"damping": 1.0}):
        for x0 in (None, torch.ones(12, dtype=dtype)):
            product = Counting(definite(12, dtype=dtype))
            _, info = method(**fields).solve(product, data(20, 12, dtype=dtype), x0=x0)
            assert info.matvecs == product.count
            assert 0 < info.iterations < product.count


def test_exact_forms_as_many_products_as_there_are_unknowns():
    seen = []

    def product(v: Tensor) -> Tensor:
        seen.append(v)
        return 2 * v

    _, info = Exact().solve(product, torch.ones(7, dtype=F64))
    assert info.matvecs == 7
    assert len(seen) == 1  # all of them at once


@ALL
def test_the_reported_residual_is_that_of_the_answer(method):
    A, b = definite(12), data(21, 12, dtype=F64)
    x, info = method().solve(lambda v: A @ v, b)
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=1e-3, abs=1e-15)


# Starting values


@ITERATIVE
def test_x0_that_is_the_answer_is_kept_without_an_iteration(method):
    A, b = definite(12), data(22, 12, dtype=F64)
    answer = torch.linalg.solve(A, b)
    x, info = method(rtol=1e-8).solve(lambda v: A @ v, b, x0=answer)
    assert info.iterations == 0
    assert info.matvecs <= 10  # the residual, and the power iterations of Neumann
    assert info.status == Status.CONVERGED
    torch.testing.assert_close(x, answer, rtol=1e-15, atol=0)


@pytest.mark.parametrize("method", KRYLOV)
def test_x0_near_the_answer_saves_iterations(method):
    A, b = definite(40, condition=1e3), data(23, 40, dtype=F64)
    near = torch.linalg.solve(A, b) * (1 + 1e-6 * data(24, 40, dtype=F64))
    cold = method(rtol=1e-8).solve(lambda v: A @ v, b)[1]
    x, warm = method(rtol=1e-8).solve(lambda v: A @ v, b, x0=near)
    assert warm.iterations < cold.iterations
    assert residual(A, x, b) <= 1e-8


@ITERATIVE
def test_any_x0_leads_to_the_same_answer(method):
    A, b = definite(12), data(25, 12, dtype=F64)
    for x0 in (data(26, 12, dtype=F64), 1e3 * data(26, 12, dtype=F64)):
        x, info = method(rtol=1e-8).solve(lambda v: A @ v, b, x0=x0)
        assert info.status == Status.CONVERGED
        assert residual(A, x, b) <= 1e-8


def test_the_last_solution_starts_the_next_hypergradient():
    A, b = definite(40, condition=1e3), data(27, 40, dtype=F64)
    solver = CG(rtol=1e-8)
    found, info = hypergradient_with(A, b, solver, return_info=True)
    again, second = hypergradient_with(A, b, solver, x0=info.solution, return_info=True)
    assert info.iterations > 5
    assert second.iterations == 0
    torch.testing.assert_close(found, again)


# Right-hand sides of any size


@ALL
@DTYPES
def test_a_zero_right_hand_side_gives_zeros_without_a_product(method, dtype):
    product = Counting(definite(5, dtype=dtype))
    x, info = method().solve(product, torch.zeros(5, dtype=dtype))
    assert torch.equal(x, torch.zeros(5, dtype=dtype))
    assert product.count == 0
    assert info.matvecs == 0
    assert info.iterations == 0
    assert info.status == Status.CONVERGED
    assert info.success
    assert info.residual_norm == 0


@ALL
def test_a_zero_right_hand_side_gives_zeros_from_any_x0(method):
    x, info = method().solve(lambda v: 2 * v, torch.zeros(5), x0=torch.ones(5))
    assert torch.equal(x, torch.zeros(5))
    assert info.status == Status.CONVERGED


@ALL
@DTYPES
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_a_tiny_or_huge_right_hand_side_loses_no_accuracy(method, dtype, scale):
    A, b = definite(10, dtype=dtype), data(28, 10, dtype=dtype)
    unit, _ = method().solve(lambda v: A @ v, b)
    x, info = method().solve(lambda v: A @ v, b * scale)
    assert info.status == Status.CONVERGED or method is METHODS[-1]
    assert info.success
    tolerance = 1e-4 if dtype == torch.float32 else 1e-8
    assert relative_error(x.to(F64) / scale, unit.to(F64)) < tolerance
    assert residual(A.to(F64), x.to(F64) / scale, b.to(F64)) < 1.1e-4


@pytest.mark.parametrize("scale", [1e-30, 1e30])
@DTYPES
@pytest.mark.parametrize("solver", [None, CG(), GMRES()], ids=repr)
def test_a_tiny_or_huge_outer_loss_scales_the_hypergradient(scale, dtype, solver):
    problem = ridge(dtype)
    w, lam = problem.solve(problem.hparams), problem.hparams

    def scaled(w: Tensor, lam: Tensor) -> Tensor:
        return scale * problem.outer(w, lam)

    unit = hypergrad.implicit_grad(problem.outer, problem.inner, w, lam, solver=solver)
    found = hypergrad.implicit_grad(scaled, problem.inner, w, lam, solver=solver)
    assert relative_error(found.to(F64) / scale, unit.to(F64)) < (1e-4 if dtype != F64 else 1e-9)


# Systems that a method cannot solve


def test_a_method_for_symmetric_matrices_refuses_the_rest_before_it_starts():
    calls = []

    def T(x: Tensor, theta: Tensor) -> Tensor:
        calls.append("inner")
        return 0.5 * x.flip(0) + theta

    def outer(x: Tensor, theta: Tensor) -> Tensor:
        calls.append("outer")
        return x.sum()

    theta = torch.ones(3, dtype=F64)
    for condition in (FixedPoint(T), Root(T)):
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"CG.*symmetric.*GMRES"):
            hypergrad.implicit_grad(outer, condition, 2 * theta, theta, solver=CG())
    with pytest.raises(hypergrad.UnsupportedOperation, match="symmetric"):
        hypergrad.root_vjp(T, theta, (theta,), theta, solver=CG())
    assert calls == []
    declared = FixedPoint(T, symmetric=True)
    found = hypergrad.implicit_grad(outer, declared, 2 * theta, theta, solver=CG())
    torch.testing.assert_close(found, torch.full((3,), 2.0, dtype=F64), rtol=1e-6, atol=0)


@pytest.mark.parametrize("seed", range(4))
def test_negative_curvature_stops_cg_with_its_best_iterate(seed):
    Q = torch.linalg.qr(data(seed, 8, 8, dtype=F64)).Q
    A = Q * torch.tensor([-1.0, -0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 8.0], dtype=F64) @ Q.T
    b = data(seed + 10, 8, dtype=F64)
    x, info = CG().solve(lambda v: A @ v, b)
    assert info.status == Status.NEGATIVE_CURVATURE
    assert info.negative_curvature
    assert not info.success
    assert residual(A, x, b) <= 1 + 1e-12
    assert float(info.residual_norm) == pytest.approx(residual(A, x, b), rel=1e-9)
    with pytest.raises(hypergrad.IndefiniteHessian, match=r"(?s)damping.*Gauss"):
        hypergradient_with(A, b, CG(), on_failure="raise")
    with pytest.warns(hypergrad.ConvergenceWarning, match="negative curvature"):
        hypergradient_with(A, b, CG())
    damped, shifted = CG(damping=1.5, rtol=1e-8).solve(lambda v: A @ v, b)
    assert shifted.status == Status.CONVERGED
    assert residual(A + 1.5 * torch.eye(8, dtype=F64), damped, b) <= 1e-8


def test_a_negative_matrix_is_negative_curvature_at_once():
    x, info = CG().solve(lambda v: -v, torch.ones(3, dtype=F64))
    assert info.status == Status.NEGATIVE_CURVATURE
    assert not x.any()
    assert info.residual_norm == 1


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("solver", [CG(rtol=1e-10), Exact()], ids=["CG", "Exact"])
def test_a_singular_consistent_system_gets_the_answer_of_minimum_norm(solver, seed):
    A = semidefinite(8, 5, seed)
    b = A @ data(seed + 10, 8, dtype=F64)
    x, info = solver.solve(lambda v: A @ v, b)
    assert relative_error(x, torch.linalg.pinv(A, hermitian=True) @ b) < 1e-8
    assert info.status == Status.CONVERGED


def test_exact_gives_the_minimum_norm_where_a_singular_matrix_is_not_symmetric():
    A = data(30, 7, 4, dtype=F64) @ data(31, 4, 7, dtype=F64)
    b = A @ data(32, 7, dtype=F64)
    x, info = Exact().solve(lambda v: A @ v, b)
    assert relative_error(x, torch.linalg.pinv(A) @ b) < 1e-8
    assert info.success


@pytest.mark.parametrize("seed", range(4))
def test_gmres_on_a_singular_consistent_system_is_right_or_says_so(seed):
    for A in (
        semidefinite(8, 5, seed),
        data(seed, 7, 4, dtype=F64) @ data(seed + 1, 4, 7, dtype=F64),
    ):
        b = A @ data(seed + 10, A.shape[0], dtype=F64)
        x, info = GMRES().solve(lambda v, A=A: A @ v, b)
        assert x.isfinite().all()
        assert info.status == Status.SINGULAR or residual(A, x, b) < 1e-6
        assert bool(info.success) == (residual(A, x, b) < 1e-6)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "solver",
    [CG(), CG(rtol=1e-8), CG(maxiter=100), GMRES(), GMRES(rtol=1e-8), Exact()],
    ids=["CG", "CG-rtol", "CG-maxiter", "GMRES", "GMRES-rtol", "Exact"],
)
def test_a_singular_inconsistent_system_is_named_as_such_and_never_nan(solver, seed):
    A, b = semidefinite(8, 5, seed), data(seed + 20, 8, dtype=F64)
    x, info = solver.solve(lambda v: A @ v, b)
    assert info.status == Status.SINGULAR
    assert not info.success
    assert x.isfinite().all()
    assert residual(A, x, b) <= 1 + 1e-9
    with pytest.raises(hypergrad.SingularHessian, match="damping"):
        hypergradient_with(A, b, solver, on_failure="raise")


@pytest.mark.parametrize("seed", range(3))
def test_restarted_gmres_on_a_singular_inconsistent_system_claims_no_success(seed):
    A, b = semidefinite(8, 5, seed), data(seed + 20, 8, dtype=F64)
    x, info = GMRES(restart=3).solve(lambda v: A @ v, b)
    assert not info.success
    assert residual(A, x, b) <= 1 + 1e-9
    with pytest.raises(hypergrad.HypergradError):
        hypergradient_with(A, b, GMRES(restart=3), on_failure="raise")


@ALL
def test_the_zero_matrix_is_singular(method):
    b = torch.ones(3, dtype=F64)
    x, info = method().solve(lambda v: 0 * v, b)
    assert x.isfinite().all()
    assert info.residual_norm == 1
    if not isinstance(method(), Neumann):
        assert info.status == Status.SINGULAR
        assert not info.success


def test_a_neumann_series_that_diverges_says_so_and_names_a_safe_step_size():
    A, b = definite(6, condition=100), data(33, 6, dtype=F64)
    solver = Neumann(step_size=0.1, terms=50)
    x, info = solver.solve(lambda v: A @ v, b)
    assert info.status == Status.DIVERGED
    assert not info.success
    assert residual(A, x, b) <= 1 + 1e-12  # the best partial sum, not the last
    with pytest.raises(hypergrad.Diverged) as error:
        hypergradient_with(A, b, solver, on_failure="raise")
    (named,) = re.findall(r"step_size of ([\d.e+-]+\d) is safe", str(error.value))
    assert 1e-4 < float(named) < 2 / 100
    safe, again = Neumann(step_size=float(named), terms=5000, rtol=1e-8).solve(lambda v: A @ v, b)
    assert again.status == Status.CONVERGED
    assert relative_error(safe, torch.linalg.solve(A, b)) < 1e-6


@pytest.mark.parametrize("largest", [1e-3, 1.0, 1e3, 1e6])
def test_neumanns_default_step_size_is_safe(largest):
    A, b = largest * definite(6, condition=100) / 100, data(34, 6, dtype=F64)
    x, info = Neumann(terms=4000, rtol=1e-6).solve(lambda v: A @ v, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-4


def test_neumann_finds_growth_that_the_right_hand_side_hardly_excites():
    d = torch.tensor([1.0, 2.0, 30.0], dtype=F64)
    b = torch.tensor([1.0, 1.0, 1e-20], dtype=F64)  # invisible to eight power iterations
    x, info = Neumann(terms=2000, rtol=1e-8).solve(lambda v: d * v, b)
    assert info.status == Status.CONVERGED
    assert residual(torch.diag(d), x, b) < 1e-8


@ALL
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["product", "right-hand side"])
def test_a_number_that_is_not_finite_is_never_turned_into_an_answer(method, bad, where):
    b = torch.ones(4, dtype=F64)
    factor = torch.ones(4, dtype=F64)
    (factor if where == "product" else b)[1] = bad
    x, info = method().solve(lambda v: factor * v, b)
    assert info.status == Status.NOT_FINITE
    assert not info.success
    assert x.isnan().any()
    assert info.residual_norm != 0


def test_exact_refuses_a_system_that_memory_cannot_hold_before_it_starts(monkeypatch):
    monkeypatch.setattr("hypergrad.solvers._exact.free_gib", lambda device: 1e-3)
    product = Counting(torch.eye(2000))
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"2000.*GiB.*0\.001.*CG"):
        Exact().solve(product, torch.ones(2000))
    assert product.count == 0


# Batches of systems


def batch(solver: Any, A: Tensor, b: Tensor) -> tuple[Tensor, SolveInfo]:
    found: tuple[Tensor, SolveInfo] = torch.func.vmap(
        lambda A, b: solver.solve(lambda v: A @ v, b)
    )(A, b)
    return found


@ALL
def test_each_task_of_a_batch_is_the_solve_by_itself(method):
    # Tasks of different difficulty at a loose tolerance: one that went on would be more accurate.
    A = torch.stack([definite(12, seed, 10.0 ** (seed / 2 + 0.5)) for seed in range(4)])
    b = data(35, 4, 12, dtype=F64) * torch.tensor([1e-9, 1.0, 1e9, 1.0], dtype=F64)[:, None]
    solver = method() if method is Exact else method(rtol=1e-2)
    x, info = batch(solver, A, b)
    for task in range(4):
        alone, own = solver.solve(lambda v, task=task: A[task] @ v, b[task])
        assert relative_error(x[task], alone) < 1e-10
        assert info.status[task] == own.status
        assert info.success[task] == own.success
        assert info.iterations[task] == own.iterations
        assert float(info.residual_norm[task]) == pytest.approx(
            float(own.residual_norm), rel=1e-8, abs=1e-14
        )
    if method is not Exact:
        assert info.iterations[0] < info.iterations[3]
        assert info.matvecs[0] == info.matvecs[3] >= info.iterations[3]


@pytest.mark.parametrize("method", [Exact, CG, GMRES])
def test_a_task_that_fails_does_not_disturb_the_others(method):
    good = definite(6, condition=100)
    kinds = {
        "good": good,
        "negative": good - 5 * torch.eye(6, dtype=F64),
        "not finite": good * math.nan,
        "singular": torch.diag(torch.tensor([0.0, 1, 2, 3, 4, 5], dtype=F64)),
        "again": 3 * good,
    }
    b = data(36, 6, dtype=F64)
    x, info = batch(method(), torch.stack(list(kinds.values())), b.expand(5, 6))
    status = dict(zip(kinds, info.status.tolist(), strict=True))
    for task, (name, A) in enumerate(kinds.items()):
        alone, own = method().solve(lambda v, A=A: A @ v, b)
        assert status[name] == own.status
        # GMRES is free to add to its answer what a singular matrix does not see.
        torch.testing.assert_close(A @ x[task], A @ alone, rtol=1e-8, atol=1e-8, equal_nan=True)
    assert status["good"] == status["again"] == Status.CONVERGED
    assert relative_error(x[0], torch.linalg.solve(good, b)) < 1e-4
    assert status["not finite"] == Status.NOT_FINITE
    assert status["singular"] == Status.SINGULAR
    if method is CG:
        assert status["negative"] == Status.NEGATIVE_CURVATURE
        assert info.negative_curvature.tolist() == [False, True, False, False, False]


@ALL
def test_zero_right_hand_sides_in_a_batch_are_exact_zeros(method):
    A = torch.stack([definite(5), math.nan * definite(5), definite(5)])
    b = torch.stack([torch.zeros(5, dtype=F64), torch.zeros(5, dtype=F64), torch.ones(5).to(F64)])
    x, info = batch(method(), A, b)
    assert not x[:2].any()
    assert info.status[:2].tolist() == [0, 0]
    assert info.success.all()
    assert residual(A[2], x[2], b[2]) < 1e-5


@ALL
def test_two_batch_dimensions_are_two_nested_loops(method):
    A = torch.stack([definite(5, seed) for seed in range(6)]).view(2, 3, 5, 5)
    b = data(37, 2, 3, 5, dtype=F64)
    x, info = torch.func.vmap(lambda A, b: batch(method(), A, b))(A, b)
    assert info.status.shape == (2, 3)
    expected = torch.linalg.solve(A, b[..., None])[..., 0]
    assert relative_error(x, expected) < 1e-5


@ALL
def test_tasks_may_share_the_matrix_or_the_right_hand_side(method):
    A, b = torch.stack([definite(5, seed) for seed in range(3)]), data(38, 3, 5, dtype=F64)
    shared, _ = torch.func.vmap(lambda b: method().solve(lambda v: A[0] @ v, b))(b)
    assert relative_error(shared, torch.linalg.solve(A[0], b.T).T) < 1e-5
    same, _ = torch.func.vmap(lambda A: method().solve(lambda v: A @ v, b[0]))(A)
    assert relative_error(same, torch.linalg.solve(A, b[0].expand(3, 5))) < 1e-5


def test_a_batch_of_hypergradients_fails_once_and_says_for_how_many_tasks():
    A = torch.stack([definite(4), definite(4) - 5 * torch.eye(4, dtype=F64), 2 * definite(4)])
    b = data(40, 3, 4, dtype=F64)

    def batched(on_failure: str) -> Any:
        return torch.func.vmap(lambda A, b: hypergradient_with(A, b, CG(), on_failure=on_failure))(
            A, b
        )

    with pytest.warns(hypergrad.ConvergenceWarning, match=r"^1 of 3 tasks: ") as caught:
        warned = batched("warn")
    assert len(caught) == 1
    with pytest.raises(hypergrad.IndefiniteHessian, match=r"^1 of 3 tasks: "):
        batched("raise")
    torch.testing.assert_close(batched("ignore"), warned, rtol=0, atol=0)
    assert relative_error(warned[[0, 2]], b[[0, 2]]) < 1e-6  # A u = b
    A[1] = math.nan
    for on_failure in ("warn", "raise"):
        with pytest.raises(hypergrad.NotFinite, match=r"^1 of 3 tasks: "):
            batched(on_failure)
    left = batched("ignore")
    assert left[1].isnan().all()  # never zero
    assert relative_error(left[[0, 2]], b[[0, 2]]) < 1e-6


@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_is_mapped_over_the_tasks_of_a_hypergradient(method):
    d = torch.stack([torch.logspace(0, k, 6, dtype=F64) for k in (1, 3, 5)])
    solver = method(rtol=1e-8, preconditioner=lambda v: v / d[1])

    def task(d: Tensor) -> Any:
        return hypergradient_with(d.diag(), torch.ones(6, dtype=F64), solver, return_info=True)

    found, info = torch.func.vmap(task)(d)
    torch.testing.assert_close(found, torch.ones(3, 6, dtype=F64), rtol=1e-4, atol=0)
    assert info.iterations[1] == 1


@pytest.mark.parametrize("x0", [True, False])
def test_a_batch_of_cg_stops_when_its_last_task_has(x0):
    product_counts = []

    def task(A: Tensor, b: Tensor, start: Tensor) -> tuple[Tensor, SolveInfo]:
        counting = Counting(A)
        found = CG(rtol=1e-8).solve(counting, b, x0=start if x0 else None)
        product_counts.append(counting.count)
        return found

    A = torch.stack([definite(10, 0, 2.0), definite(10, 1, 1e3)])
    b = data(39, 2, 10, dtype=F64)
    x, info = torch.func.vmap(task)(A, b, torch.ones(2, 10, dtype=F64))
    assert info.matvecs.tolist() == [product_counts[0]] * 2
    assert info.status.tolist() == [0, 0]
    assert all(residual(A[i], x[i], b[i]) <= 1e-8 for i in range(2))
    assert product_counts[0] <= int(info.iterations.max()) + 3


# Solvers and infos as values

SOLVERS = [CG(), GMRES(), Neumann(), Exact(), Identity()]


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_a_solver_is_a_frozen_printable_comparable_value(solver):
    name = next(iter(dataclasses.fields(solver))).name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(solver, name, 1)
    assert solver == type(solver)()
    assert hash(solver) == hash(type(solver)())
    changed = dataclasses.replace(solver, **{name: 3})
    assert changed != solver
    assert f"{name}=3" in repr(changed)
    assert eval(repr(changed), vars(hypergrad)) == changed


@pytest.mark.parametrize(
    ("make", "field", "value"),
    [
        *[(m, f, v) for m in KRYLOV for f, v in [("maxiter", 0), ("maxiter", -3)]],
        *[(m, "rtol", v) for m in [*KRYLOV, Neumann] for v in (-1e-3, math.nan)],
        *[(m, "atol", v) for m in KRYLOV for v in (-1.0, math.nan)],
        *[(m, "damping", v) for m in [*KRYLOV, Neumann, Exact] for v in (math.nan, math.inf)],
        (GMRES, "restart", 0),
        (Neumann, "terms", 0),
        *[(Neumann, "step_size", v) for v in (0.0, -1.0, math.nan)],
        *[(Identity, "scale", v) for v in (0.0, math.nan, math.inf)],
    ],
)
def test_a_field_that_means_nothing_is_refused(make, field, value):
    with pytest.raises(ValueError, match=field):
        make(**{field: value})


def test_the_numbers_of_the_statuses_are_fixed():
    assert {s.name: int(s) for s in Status} == {
        "CONVERGED": 0,
        "MAX_ITERATIONS": 1,
        "NEGATIVE_CURVATURE": 2,
        "BREAKDOWN": 3,
        "STAGNATED": 4,
        "DIVERGED": 5,
        "SINGULAR": 6,
        "NOT_FINITE": 7,
    }


@pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)
def test_every_leaf_of_an_info_is_a_tensor_with_fixed_dtype(solver):
    _, info = solver.solve(lambda v: 2 * v, torch.ones(3))
    leaves = pytree.tree_leaves(info)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert info.status.dtype == info.iterations.dtype == info.matvecs.dtype == torch.int64
    assert info.success.dtype == info.negative_curvature.dtype == torch.bool
    assert info.eigenvalues.shape == (2,)
    assert info.method == type(solver).__name__
    assert Status(info.status) is Status.CONVERGED or isinstance(solver, Neumann)
    assert info.method in str(info)
    assert Status(info.status).name in str(info)
    _, many = batch(solver, torch.eye(3).expand(4, 3, 3), torch.ones(4, 3))
    assert all(leaf.shape[0] == 4 for leaf in pytree.tree_leaves(many))
    assert "4 tasks" in str(many)
    assert "\n" not in str(many)


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
    found, info = hypergrad.implicit_grad(
        lambda w, theta: w.sum(), inner, theta.clone(), theta, return_info=True
    )
    assert info.method == method
    torch.testing.assert_close(found, theta)


def test_neumann_without_a_budget_owns_up_to_a_residual_that_is_far():
    A, b = definite(40, condition=1e3), data(29, 40, dtype=F64)
    _, info = Neumann().solve(lambda v: A @ v, b)
    _, budget = Neumann(terms=19).solve(lambda v: A @ v, b)
    assert info.residual_norm > 0.1
    assert (info.iterations, budget.iterations) == (20, 19)
    assert info.status == budget.status == Status.MAX_ITERATIONS
    assert budget.success
    assert not info.success
    with pytest.raises(hypergrad.NotConverged, match="terms"):
        hypergradient_with(A, b, Neumann(), on_failure="raise")
    A = definite(40, condition=5)
    _, info = Neumann().solve(lambda v: A @ v, b)
    assert info.residual_norm < 0.1
    assert info.success


def test_the_memory_that_is_free_is_known_without_proc(monkeypatch):
    from hypergrad.solvers import _exact

    known = _exact.free_gib(torch.device("cpu"))

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise FileNotFoundError

    monkeypatch.setattr(_exact, "open", refuse, raising=False)
    free = _exact.free_gib(torch.device("cpu"))
    assert 0 < free < math.inf
    assert 0 < known < math.inf
    monkeypatch.setattr(_exact.os, "sysconf", refuse)
    assert _exact.free_gib(torch.device("cpu")) == math.inf


def test_a_batch_without_tasks_gives_an_empty_answer():
    none = torch.zeros(0, 3, dtype=F64)

    def inner(w: Tensor, theta: Tensor) -> Tensor:
        return (w - theta).square().sum()

    @hypergrad.custom_argmin(inner)
    def fit(init: None, theta: Tensor) -> Tensor:
        return theta.clone()

    found = torch.func.vmap(
        lambda theta: hypergrad.implicit_grad(lambda w, t: w.sum(), inner, theta.clone(), theta)
    )(none)
    assert found.shape == (0, 3)
    found = torch.func.vmap(torch.func.grad(lambda theta: fit(None, theta).sum()))(none)
    assert found.shape == (0, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_trace_without_values_is_refused_with_advice():
    def inner(w: Tensor, theta: Tensor) -> Tensor:
        return (w - theta).square().sum()

    def hypergradient(theta: Tensor) -> Any:
        return hypergrad.implicit_grad(lambda w, t: w.sum(), inner, theta.clone(), theta)

    theta = torch.ones(3, dtype=F64)
    for call in (
        lambda: torch.func.functionalize(hypergradient)(theta),
        lambda: torch.func.linearize(hypergradient, theta),
    ):
        with pytest.raises(hypergrad.UnsupportedOperation, match=r"torch\.func\.vjp"):
            call()


@pytest.mark.parametrize("given", ["tensors", "leaves"])
def test_root_vjp_evaluates_the_condition_as_often_as_it_must(given):
    """Once to solve; once more to see what F captures, and once for a derivative of the answer."""
    calls = 0

    def F(x: Tensor, a: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x**2 - a

    x, a = torch.full((3,), 2.0, dtype=F64), torch.full((3,), 4.0, dtype=F64)
    if given == "leaves":
        a.requires_grad_()
    (found,) = hypergrad.root_vjp(F, x, (a,), torch.ones(3, dtype=F64))
    torch.testing.assert_close(found.detach(), torch.full((3,), 0.25, dtype=F64))
    assert found.requires_grad == (given == "leaves")
    assert calls == (2 if given == "tensors" else 3)
    with torch.no_grad():
        hypergrad.root_vjp(F, x, (a,), torch.ones(3, dtype=F64))
    assert calls == (3 if given == "tensors" else 4)


# The Neumann series of a matrix for which there is none


@pytest.mark.parametrize("terms", [5, 19, 21, 100, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_budget_of_neumann_does_not_hide_an_indefinite_matrix(terms, dtype):
    # The first steps bring the residual below one, and ever shorter ones leave it there.
    A = torch.diag(torch.tensor([-1.0, 2.0], dtype=dtype))
    _, info = Neumann(terms=terms).solve(lambda v: A @ v, torch.tensor([1.0, 3.0], dtype=dtype))

    assert info.status == Status.DIVERGED
    assert not info.success


@pytest.mark.parametrize("seed", range(20))
def test_neumann_tells_an_indefinite_matrix_from_a_slow_one(seed):
    generator = torch.Generator().manual_seed(seed)
    n = 3 + seed % 5
    Q = torch.linalg.qr(torch.randn(n, n, dtype=F64, generator=generator))[0]
    d = torch.rand(n, dtype=F64, generator=generator) + 0.05
    b = torch.randn(n, dtype=F64, generator=generator)
    for dtype in (F64, torch.float32):
        for lowest in (d[0], -d[0]):
            A = ((Q * torch.cat([lowest[None], d[1:]])) @ Q.T).to(dtype)
            _, info = Neumann(terms=400).solve(lambda v, A=A: A @ v, b.to(dtype))
            assert bool(info.success) == bool(lowest > 0)
            assert (info.status == Status.DIVERGED) == (not info.success)


def test_the_error_of_a_neumann_series_without_a_step_names_the_matrix_and_no_step():
    A = torch.diag(torch.tensor([-1.0, 2.0], dtype=F64))
    inner = lambda w, h: w @ A @ w / 2 - h * w.sum()
    with pytest.raises(hypergrad.Diverged, match="with any step where the matrix") as error:
        hypergrad.implicit_grad(
            lambda w, h: w.sum(), inner, torch.tensor([-1.0, 0.5], dtype=F64),
            torch.tensor(1.0, dtype=F64), solver=Neumann(terms=50), on_failure="raise",
        )  # fmt: skip
    assert "is safe" not in str(error.value)
