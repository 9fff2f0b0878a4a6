"""Newton's method with conjugate gradients: few iterations, and curvature that is not positive."""

from __future__ import annotations

import torch

from hypergrad.inner_solvers import GradientDescent, NewtonCG
from tests.problems import F64, bowl


def test_a_quadratic_takes_a_handful_of_iterations():
    start = torch.zeros(12, dtype=F64)
    _, newton = NewtonCG()(bowl, start, 1.0)
    _, descent = GradientDescent()(bowl, start, 1.0)
    assert newton.success
    assert newton.iterations <= 8 < 50 < descent.iterations


def test_a_start_where_the_curvature_is_negative_is_left():
    double_well = lambda x: ((x**2 - 1) ** 2).sum() / 4
    start = torch.tensor([0.1, -0.2, 0.3], dtype=F64)
    assert (3 * start**2 < 1).all()  # the Hessian there is negative definite
    x, info = NewtonCG()(double_well, start)
    assert info.success
    torch.testing.assert_close(x, start.sign(), rtol=1e-5, atol=0)
