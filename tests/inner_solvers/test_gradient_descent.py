"""Gradient descent: its step size."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

from hypergrad import prox
from hypergrad.inner_solvers import FISTA, GradientDescent, Nesterov
from tests.problems import F64

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
def test_every_unknown_may_have_a_step_of_its_own(batched):
    steep, y = torch.tensor([1.0, 10.0], dtype=F64), torch.tensor([[3.0, 2.0]], dtype=F64)
    steps = 0.5 / steep
    options = {"step_size": steps, "tol": 1e-10}
    f = lambda w, y: (steep * (w - y) ** 2).sum() / 2

    def one(y):
        lasso, _ = FISTA(lambda v, s, y: prox.l1(v, s, 1.0), **options)(f, torch.zeros_like(y), y)
        plain = [s(**options)(f, torch.zeros_like(y), y)[0] for s in (GradientDescent, Nesterov)]
        return lasso, *plain

    lasso, *plain = vmap(one)(y) if batched else (part[None] for part in one(y[0]))
    torch.testing.assert_close(lasso, y - 1 / steep, rtol=1e-8, atol=0)
    for found in plain:
        torch.testing.assert_close(found, y, rtol=1e-8, atol=0)
