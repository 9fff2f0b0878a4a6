"""L-BFGS: its two loops, and as many evaluations as SciPy's."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.func import grad

from hypergrad.inner_solvers import LBFGS
from hypergrad.inner_solvers._lbfgs import _two_loops
from tests.problems import F64, bowl, data

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def test_lbfgs_needs_about_as_many_evaluations_as_scipys():
    def with_gradient(x):
        with_gradient.calls += 1
        x = torch.from_numpy(x)
        return float(bowl(x, 1.0)), grad(bowl)(x, 1.0).numpy()

    with_gradient.calls = 0
    options = {"ftol": 0.0, "gtol": 1e-6, "maxfun": 10_000}
    minimize(with_gradient, np.zeros(12), jac=True, method="L-BFGS-B", options=options)
    _, info = LBFGS()(bowl, torch.zeros(12, dtype=F64), 1.0)
    assert info.evaluations < 2 * with_gradient.calls


def test_the_two_loops_are_the_bfgs_update():
    H = 0.7 * torch.eye(5, dtype=F64)
    memory = []
    for k in range(4):
        s, y = data(150 + k, 5, dtype=F64), data(160 + k, 5, dtype=F64)
        y = y * torch.sign(s @ y)
        weight = 1 / (s @ y)
        V = torch.eye(5, dtype=F64) - weight * torch.outer(y, s)
        H = V.T @ H @ V + weight * torch.outer(s, s)
        memory.append((s, y, weight))
    g = data(170, 5, dtype=F64)
    found = _two_loops(memory, torch.tensor(0.7, dtype=F64), g)
    torch.testing.assert_close(found, H @ g, rtol=1e-12, atol=1e-12)
