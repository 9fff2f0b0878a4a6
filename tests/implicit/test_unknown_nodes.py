"""Operations whose second derivative nobody has tested are tested once, where they are met."""

from __future__ import annotations

import torch

from hypergrad import implicit_grad
from tests.problems import F64


def test_a_custom_function_that_is_right_is_compared_once_and_silent():
    class Cube(torch.autograd.Function):
        @staticmethod
        def forward(ctx, w):
            ctx.save_for_backward(w)
            return w**3

        @staticmethod
        def backward(ctx, grad):
            (w,) = ctx.saved_tensors
            return 3 * w**2 * grad

    calls = 0

    def inner(w, t):  # minimal where w^2 + w = t
        nonlocal calls
        calls += 1
        return (Cube.apply(w) / 3 + w**2 / 2 - t * w).sum()

    t = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    w = ((1 + 4 * t).sqrt() - 1) / 2
    counts = []
    for _ in range(3):
        calls = 0
        hypergradient = implicit_grad(lambda w, t: w.sum(), inner, w, t)
        torch.testing.assert_close(hypergradient, 1 / (2 * w + 1))
        counts.append(calls)
    assert counts[0] > counts[1] == counts[2] == 1
