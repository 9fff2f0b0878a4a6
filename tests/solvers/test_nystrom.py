"""The Nystrom approximation: as a preconditioner and by itself."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import hypergrad
from hypergrad import CG, GMRES, MINRES, Nystrom, Status
from tests.problems import F64, data, ill_conditioned_ridge, relative_error
from tests.systems import residual, solve, spread, with_spectrum

SYMMETRIC = (CG, MINRES)
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)


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
    hypergradient = hypergrad.implicit_grad(
        problem.outer,
        problem.condition,
        problem.solve(problem.hparams),
        problem.hparams,
        solver=CG(rtol=1e-10, preconditioner=Nystrom(rank=4)),
        inner_tol=None,
    )
    assert relative_error(hypergradient, hypergrad_problem.hypergradient(problem.hparams)) < 1e-6
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


def test_nystrom_gives_zeros_for_a_zero_right_hand_side_without_a_product():
    def product(v):
        raise AssertionError("a product was formed")

    x, info = Nystrom(4).solve(product, torch.zeros(5), rmatvec=product)
    assert not x.any()
    assert info.status == Status.CONVERGED
    assert info.success
    assert info.matvecs == 0
    assert info.residual_norm == 0


def test_nystrom_shifts_the_matrix_by_its_damping():
    A, b = with_spectrum(spread(6, 1, 9)), data(2, 6, dtype=F64)
    x, _ = solve(Nystrom(6, damping=2.5), A, b)
    assert relative_error(x, torch.linalg.solve(A + 2.5 * torch.eye(6, dtype=F64), b)) < 1e-5
