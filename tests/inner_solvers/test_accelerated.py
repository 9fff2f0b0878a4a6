"""Accelerated gradient descent: where it pays, and FISTA on its own condition."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from torch.func import grad, vmap

import hypergrad
from hypergrad import implicit_grad, projections, prox
from hypergrad.inner_solvers import FISTA, GradientDescent, Nesterov
from tests.constrained import box_qp, elastic_net, lasso
from tests.problems import F64, STEEP, bowl, data, relative_error

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def test_acceleration_pays_where_the_condition_number_is_large():
    step = 1 / float(STEEP.max())
    counts = {}
    for solver in (GradientDescent, Nesterov):
        _, info = solver(step_size=step, tol=1e-5)(bowl, torch.zeros(12, dtype=F64), 1.0)
        assert info.success
        counts[solver] = int(info.iterations)
    assert counts[Nesterov] < counts[GradientDescent] / 4  # sqrt(100) is 10


@DTYPES
@pytest.mark.parametrize("make", [lasso, elastic_net, box_qp], ids=lambda make: make.__name__)
def test_fista_solves_what_its_condition_says(make, dtype):
    problem = make(dtype)
    condition = problem.condition
    _, outer_map = condition.outer_map
    expected = problem.solve(problem.hparams)
    x, solved = FISTA(outer_map)(condition.f, torch.zeros_like(expected), problem.hparams)
    assert solved.success
    assert relative_error(x, expected) < (1e-6 if dtype == F64 else 1e-3)
    assert torch.equal(x == 0, expected == 0)  # exact zeros
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        hypergradient = implicit_grad(problem.outer, condition, x, problem.hparams)
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < (
        1e-5 if dtype == F64 else 1e-3
    )


def test_a_derivative_by_the_step_or_by_what_a_prox_captures_is_refused():
    f, start, one = lambda x: (x - 3).square().sum(), torch.zeros(2, dtype=F64), torch.ones(())
    by_step = lambda s: GradientDescent(step_size=s)(f, start)[0].sum()
    by_penalty = lambda t: FISTA(lambda v, s: prox.l1(v, s, t))(f, start)[0].sum()
    for value in (by_step, by_penalty):
        with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
            grad(value)(0.1 * one)
        assert not value((0.1 * one).requires_grad_()).requires_grad


def test_a_projection_makes_fista_projected_gradient_descent():
    target = torch.tensor([0.9, 0.6, 0.3, -0.4], dtype=F64)
    project = lambda v, step, *args: projections.simplex(v)
    x, info = FISTA(project)(lambda x: (x - target).square().sum(), torch.zeros(4, dtype=F64))
    assert info.success
    torch.testing.assert_close(x, projections.simplex(target), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
@pytest.mark.parametrize(
    "step", [0.1, torch.tensor(0.1), np.float32(0.1)], ids=["float", "0-d", "np"]
)
def test_a_prox_is_given_the_step_that_the_caller_gave(step, batched):
    y = data(183, 3, 2, dtype=F64)
    seen = []

    def soft(v, step, lam):
        seen.append(float(step))
        return prox.l1(v, step, lam)

    solver = FISTA(soft, step_size=step)
    one = lambda y: solver(lambda w, lam: ((w - y) ** 2).sum() / 2, torch.zeros_like(y), 0.2)[0]
    found = vmap(one)(y) if batched else torch.stack([one(row) for row in y])
    torch.testing.assert_close(found, prox.l1(y, 1.0, 0.2), rtol=1e-6, atol=1e-7)
    assert seen == pytest.approx([0.1] * len(seen))
