"""Anderson acceleration: deep equilibria, maps that do not contract, batches."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.func import grad, vmap

import hypergrad
from hypergrad import Status, implicit_grad
from hypergrad.inner_solvers import Anderson
from tests.problems import F64, data, equilibrium, relative_error

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


@pytest.mark.parametrize("history", [0, 1, 5])
@DTYPES
def test_anderson_finds_a_deep_equilibrium(history, dtype):
    problem = equilibrium(dtype)
    z, info = Anderson(history)(problem.inner, torch.zeros(3, 4, dtype=dtype), problem.hparams)
    assert info.success
    expected = problem.solve(problem.hparams)
    assert relative_error(z, expected) < (1e-7 if dtype == F64 else 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient = implicit_grad(problem.outer, problem.condition, z, problem.hparams)
    expected = problem.hypergradient(problem.hparams)
    assert relative_error(hypergradient, expected) < (1e-6 if dtype == F64 else 1e-3)


def test_anderson_needs_no_contraction_and_fewer_evaluations():
    M = data(130, 8, 8, dtype=F64)
    M = 0.99 * (M + M.T) / 2 / torch.linalg.matrix_norm((M + M.T) / 2, 2)
    b = data(131, 8, dtype=F64)
    expected = torch.linalg.solve(torch.eye(8, dtype=F64) - M, b)
    affine = lambda x: M @ x + b
    x, info = Anderson()(affine, torch.zeros(8, dtype=F64))
    _, plain = Anderson(history=0)(affine, torch.zeros(8, dtype=F64))
    assert relative_error(x, expected) < 1e-7
    assert info.evaluations < plain.evaluations / 10
    x, info = Anderson(8)(lambda x: 3 * M @ x + b, torch.zeros(8, dtype=F64))
    assert info.success
    expected = torch.linalg.solve(torch.eye(8, dtype=F64) - 3 * M, b)
    assert relative_error(x, expected) < 1e-6


def test_the_equilibrium_is_differentiated_as_its_iteration_is():
    problem = equilibrium()
    x = data(20, 3, 2, dtype=F64)

    def layer(z, W, U, b):
        return torch.tanh(z @ W.T + x @ U.T + b)

    fit = hypergrad.custom_fixed_point(layer)(lambda z, *args: Anderson()(layer, z, *args)[0])
    start, args = torch.zeros(3, 4, dtype=F64), tuple(problem.hparams.values())

    def unrolled(*args):
        z = start
        for _ in range(150):
            z = layer(z, *args)
        return z

    value = lambda solve: lambda *args: problem.outer(solve(*args), problem.hparams)
    places = (0, 1, 2)
    found = grad(value(lambda *args: fit(start, *args)), places)(*args)
    assert relative_error(found, grad(value(unrolled), places)(*args)) < 1e-6


def test_anderson_in_a_batch_is_anderson_one_by_one():
    problem = equilibrium()
    starts = data(132, 4, 3, 4, dtype=F64)
    scales = torch.tensor([0.0, 0.5, 1.0, 1.2], dtype=F64)

    def one(z, scale):
        T = lambda z, h: problem.inner(z, {**h, "W": scale * h["W"]})
        return Anderson()(T, z, problem.hparams)

    z, info = vmap(one)(starts, scales)
    for k in range(4):
        alone, alone_info = one(starts[k], scales[k])
        torch.testing.assert_close(z[k], alone, rtol=1e-7, atol=1e-9)
        assert info.iterations[k] == alone_info.iterations


def test_a_map_that_does_not_contract_diverges_and_says_so():
    x, info = Anderson(history=0)(lambda x: 2 * x + 1, torch.zeros(2, dtype=F64))
    assert info.status == Status.DIVERGED
    assert torch.isfinite(x).all()


def test_anderson_says_nan():
    _, info = Anderson()(lambda x: x / 0, torch.zeros(2, dtype=F64))
    assert info.status == Status.NOT_FINITE
    assert not info.success
