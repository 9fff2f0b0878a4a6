"""The Neumann series: its step size, its budget, and matrices for which there is none."""

from __future__ import annotations

import re

import pytest
import torch

import hypergrad
from hypergrad import Neumann, Status
from tests.problems import F64, data, relative_error
from tests.systems import definite, hypergradient_with, residual


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
