"""Ritz values: inside the spectrum, and what they show."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from hypergrad import CG, MINRES
from tests.problems import F64, data
from tests.systems import indefinite, solve, spread, with_spectrum

SYMMETRIC = (CG, MINRES)


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


def test_with_a_preconditioner_the_ritz_values_are_not_known():
    _, info = solve(CG(preconditioner=lambda v: v / 2), indefinite(5) ** 2, torch.ones(5).to(F64))
    assert info.eigenvalues.isnan().all()
