"""Checkpoints: the same gradient in an eighth of the memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import hypergrad
from benchmarks.allocator import peak_bytes
from tests.problems import F64, data

X, Y = data(5, 60, 50, dtype=F64), data(6, 60, dtype=F64)


def descend(w: Tensor, h: Tensor) -> Tensor:
    return w - 0.01 * (X.T @ (X @ w - Y) / 60 + h.exp() * w)


def live(h: Tensor, steps: int, **options: Any) -> tuple[Tensor, int]:
    """The hypergradient, and the most bytes that were live at once."""
    found: list[Tensor] = []
    call = lambda: found.append(
        hypergrad.unrolled_grad(
            lambda w, h: (w @ w) / 2, descend, X[0] * 0, h, steps=steps, **options
        )
    )
    call()  # what PyTorch allocates once
    return found[0], peak_bytes(call)


def test_400_checkpointed_steps_take_an_eighth_of_the_memory_and_give_the_same_gradient():
    h = torch.zeros(50, dtype=F64)
    full, all_steps = live(h, 400)
    spared, some = live(h, 400, checkpoint=True)
    torch.testing.assert_close(spared, full, rtol=1e-12, atol=0)
    assert some < all_steps / 8


def test_checkpointed_memory_grows_as_the_square_root_of_the_steps():
    h = torch.zeros(50, dtype=F64)
    few, many = (live(h, steps, checkpoint=True)[1] for steps in (64, 576))
    assert many < 3.3 * few  # and not 9 times
