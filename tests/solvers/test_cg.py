"""Conjugate gradients: negative curvature, symmetry, and when a batch stops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import CG, FixedPoint, Root, SolveInfo, Status
from hypergrad._pytrees import Layout, Tree
from hypergrad.solvers import LinearSystem
from tests.problems import F64, data
from tests.systems import Counting, definite, hypergradient_with, residual

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)


@pytest.mark.parametrize("multiple", [1e-12, 0.3, 7.0, 1e12])
@DTYPES
def test_a_multiple_of_the_identity_takes_cg_one_iteration(multiple, dtype):
    b = data(9, 5, dtype=dtype)
    x, info = CG().solve(lambda v: multiple * v, b)
    torch.testing.assert_close(x, b / multiple, rtol=1e-6, atol=0)
    assert info.iterations == 1
    assert info.status == Status.CONVERGED


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
    hypergradient = hypergrad.implicit_grad(outer, declared, 2 * theta, theta, solver=CG())
    torch.testing.assert_close(hypergradient, torch.full((3,), 2.0, dtype=F64), rtol=1e-6, atol=0)


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


@pytest.mark.parametrize("tasks", [(), (2,)], ids=["one", "two tasks"])
def test_curvature_below_the_noise_of_products_ends_nothing(tasks):
    """One direction has 1e5 times the curvature of the others, and products are right to 1e-3."""
    scales = torch.ones(12)
    scales[-1] = 1e5
    b = scales.sqrt().expand(*tasks, 12).clone()
    tree = Tree("b", b)
    system = LinearSystem(
        matvec=lambda v: scales * v,
        b=b,
        layout=Layout(Tree("b", b[(0,) * len(tasks)]), [b[(0,) * len(tasks)]]),
        tree=tree,
        noise=torch.full(tasks, 1e-3),
    )
    solution = hypergrad.CG(maxiter=4).run(system)
    assert torch.allclose(solution.x, b / scales, rtol=1e-2)
    assert not solution.negative_curvature.any()
