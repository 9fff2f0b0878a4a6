"""What the directions of an iteration say about the inverse, beside its solution."""

from __future__ import annotations

import pytest
import torch

from hypergrad import CG, MINRES
from hypergrad.solvers._krylov import Pass
from hypergrad.solvers._observer import Observer
from hypergrad.solvers._system import Counted
from tests.problems import F64, data, relative_error

n = 40


Q = torch.linalg.qr(data(0, n, n, dtype=F64)).Q


@pytest.mark.parametrize("indefinite", [False, True])
def test_an_observed_iteration_finds_the_newton_step(indefinite):
    """After n steps the directions span the space, and the step is A^-1 F to rounding."""
    size = 8
    basis, modes = Q[:size, :size], torch.linspace(1, 3, size, dtype=F64)
    basis = torch.linalg.qr(basis).Q
    if indefinite:
        modes[::2] *= -1
    M = basis * modes @ basis.T
    b, F = data(5, size, dtype=F64), data(6, size, dtype=F64)
    solver = MINRES(rtol=1e-12) if indefinite else CG(rtol=1e-12)
    for method in {solver, MINRES(rtol=1e-12)}:
        start = Pass(
            matvec=Counted(lambda v: v @ M, 0.0),
            precondition=None,
            r=b,
            tol=torch.tensor(1e-14, dtype=F64),
            active=torch.tensor(True),
            limit=size,
            looks=True,
            condition=F,
        )
        part = method._iterate(start)
        assert isinstance(part.observer, Observer)
        assert relative_error(part.observer.step, torch.linalg.solve(M, F)) < 1e-8
        assert part.observer.left.norm() < 1e-8
        assert part.observer.inverse(part.x) <= 1 / modes.abs().min() * (1 + 1e-9)
