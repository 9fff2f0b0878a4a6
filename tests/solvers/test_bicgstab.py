"""BiCGSTAB: singular systems, and where it breaks down."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import BiCGSTAB, Root, Status
from tests.problems import F64, data
from tests.systems import residual, solve


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
