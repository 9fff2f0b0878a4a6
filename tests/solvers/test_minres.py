"""MINRES: its preconditioner, and the matrices that it refuses."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import MINRES, Status
from tests.problems import F64, data
from tests.systems import indefinite, residual, solve, spread, with_spectrum


@pytest.mark.parametrize("method", [MINRES])
def test_a_method_for_symmetric_matrices_refuses_the_rest(method):
    theta = torch.ones(3, dtype=F64)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"MINRES.*symmetric.*GMRES"):
        hypergrad.root_vjp(lambda w, t: w - t, theta, (theta,), theta, solver=method())


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
