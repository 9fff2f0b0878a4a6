"""One draw of random numbers for all evaluations of an answer."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import hypergrad
from hypergrad import CG, implicit_grad

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


def test_random_numbers_are_drawn_as_by_one_call_of_each_loss():
    w, t = torch.ones(50, dtype=D), torch.ones(50, dtype=D)

    def noisy(w, t):
        return ((F.dropout(w, 0.5) - t) ** 2).sum() + 0.5 * ((w * t) ** 2).sum()

    torch.manual_seed(3)
    noisy(w, t), noisy(w, t)
    after = torch.get_rng_state()
    for solver in (None, CG(), hypergrad.GMRES()):
        torch.manual_seed(3)
        implicit_grad(noisy, noisy, w, t, solver=solver, inner_tol=None)
        assert torch.equal(torch.get_rng_state(), after)


def test_every_product_sees_the_same_draw_and_two_calls_draw_differently():
    w, t = torch.ones(50, dtype=D), torch.ones(50, dtype=D)
    drawn = []

    def noisy(w, t):
        mask = F.dropout(torch.ones(50, dtype=D), 0.5)
        drawn.append(mask)
        return ((mask * w - t) ** 2).sum() / 2 + (t * w**2).sum() / 2

    def reference(inner_mask):
        # A = diag(mask^2 + t), cross = -mask ... + w, with the outer loss sum(w)
        return -(w - inner_mask) / (inner_mask**2 + t)

    answers = []
    for solver in (None, CG(rtol=1e-12), CG(rtol=1e-12)):
        drawn.clear()
        answers.append(
            implicit_grad(lambda w, t: w.sum(), noisy, w, t, solver=solver, inner_tol=None)
        )
        (mask,) = drawn
        torch.testing.assert_close(answers[-1], reference(mask), rtol=1e-9, atol=1e-12)
    assert not torch.equal(answers[1], answers[2])
