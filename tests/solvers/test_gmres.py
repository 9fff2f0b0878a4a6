"""GMRES: cycles of any length, and singular systems."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import GMRES, Status
from tests.problems import F64, data, relative_error
from tests.systems import hypergradient_with, residual, semidefinite


@pytest.mark.parametrize("restart", [None, 1, 3, 6, 50])
def test_gmres_solves_what_is_not_symmetric_at_any_length_of_a_cycle(restart):
    A, b = data(5, 12, 12, dtype=F64) + 10 * torch.eye(12, dtype=F64), data(6, 12, dtype=F64)
    x, info = GMRES(rtol=1e-10, restart=restart).solve(lambda v: A @ v, b)
    assert info.status == Status.CONVERGED
    assert relative_error(x, torch.linalg.solve(A, b)) < 1e-8


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


@pytest.mark.parametrize("seed", range(3))
def test_restarted_gmres_on_a_singular_inconsistent_system_claims_no_success(seed):
    A, b = semidefinite(8, 5, seed), data(seed + 20, 8, dtype=F64)
    x, info = GMRES(restart=3).solve(lambda v: A @ v, b)
    assert not info.success
    assert residual(A, x, b) <= 1 + 1e-9
    with pytest.raises(hypergrad.HypergradError):
        hypergradient_with(A, b, GMRES(restart=3), on_failure="raise")
