"""`LevenbergMarquardt`: nonlinear least squares, and the derivative of the minimum."""

from __future__ import annotations

import math

import pytest
import scipy.optimize
import torch
from torch.func import jacrev, vmap

import hypergrad
from hypergrad import Status
from hypergrad.inner_solvers import LevenbergMarquardt
from tests.problems import F64, data

TIMES = torch.linspace(0, 4, 25, dtype=F64)
SEEN = 2 * torch.exp(-0.7 * TIMES) + 0.1 * torch.cos(3 * TIMES)
ONES = torch.ones(2, dtype=F64)


def misfit(p, y):
    return p[0] * torch.exp(-p[1] * TIMES.to(p.dtype)) - y


@pytest.mark.parametrize("units", [1e-8, 1.0, 1e8])
def test_least_squares_in_any_units(units):
    reference = scipy.optimize.least_squares(
        lambda p: misfit(torch.from_numpy(p), SEEN).numpy(), [1, 1], xtol=1e-15, ftol=1e-15
    )
    right = torch.from_numpy(reference.x)
    for residuals, scale in (
        (lambda p: units * misfit(p, SEEN), ONES),
        (lambda p: misfit(p / torch.tensor([units, 1.0], dtype=F64), SEEN), None),
    ):
        scale = torch.tensor([units, 1.0], dtype=F64) if scale is None else scale
        p, info = LevenbergMarquardt()(residuals, scale.clone())
        assert info.success
        torch.testing.assert_close(p / scale, right, rtol=1e-6, atol=0)
    torch.testing.assert_close(2 * info.value, misfit(right, SEEN).square().sum())


def test_a_valley_a_system_and_too_few_equations():
    valley = lambda p: torch.stack([10 * (p[1] - p[0] ** 2), 1 - p[0]])
    p, info = LevenbergMarquardt()(valley, torch.tensor([-1.2, 1.0], dtype=F64))
    assert info.success
    torch.testing.assert_close(p, ONES)
    A, b = data(1, 3, 8, dtype=F64), data(2, 3, dtype=F64)
    p, info = LevenbergMarquardt()(lambda x: A @ x - b, torch.zeros(8, dtype=F64))
    assert info.success
    torch.testing.assert_close(A @ p, b)
    init = {"u": torch.tensor(1.0, dtype=F64), "w": torch.zeros(2, dtype=F64)}
    p, info = LevenbergMarquardt()(
        lambda x: {"a": x["u"] ** 2 - 2, "b": [x["w"] * x["u"] - 1]}, init
    )
    assert info.success
    torch.testing.assert_close(p["u"] * p["w"], ONES)


def test_least_squares_over_tasks_in_float32_and_where_there_is_no_number():
    solver = LevenbergMarquardt()
    ys = torch.stack([SEEN, 2 * SEEN, -SEEN])
    one = lambda y: solver(misfit, ONES, y)
    p, info = vmap(one)(ys)
    torch.testing.assert_close(p, torch.stack([one(y)[0] for y in ys]), rtol=1e-6, atol=1e-8)
    assert info.success.all()
    single, info = solver(misfit, ONES.float(), SEEN.float())
    assert info.success
    torch.testing.assert_close(single.double(), p[0], rtol=1e-3, atol=0)
    assert solver(misfit, math.nan * ONES, SEEN)[1].status == Status.NOT_FINITE
    for wrong in (lambda p: 1.0, lambda p: torch.ones(2, dtype=torch.int64)):
        with pytest.raises(hypergrad.StructureMismatch, match="residuals must be floating-point"):
            solver(wrong, ONES)
    _, info = LevenbergMarquardt(maxiter=1)(misfit, ONES, SEEN)
    assert info.status == Status.MAX_ITERATIONS
    with pytest.raises(ValueError, match="damping"):
        LevenbergMarquardt(damping=-1.0)


def test_the_minimum_of_least_squares_is_differentiable():
    solver = LevenbergMarquardt(tol=1e-12)

    @hypergrad.custom_argmin(lambda p, y: (misfit(p, y) ** 2).sum() / 2)
    def fit(init, y):
        return solver(misfit, init, y)[0]

    jacobian = jacrev(lambda y: fit(ONES, y))(SEEN)
    direction = data(3, 25, dtype=F64)
    ends = fit(ONES, SEEN + 1e-5 * direction), fit(ONES, SEEN - 1e-5 * direction)
    torch.testing.assert_close(
        jacobian @ direction, (ends[0] - ends[1]) / 2e-5, rtol=1e-5, atol=1e-7
    )
