"""A whole model: the library beside the loop that one would write by hand."""

from __future__ import annotations

import pytest
import torch

from benchmarks.allocator import peak_bytes
from benchmarks.whole_models import SIDES, Problem, Size

pytestmark = pytest.mark.filterwarnings("ignore")  # the profiler's

SMALL = Size(vocabulary=2_000, width=192, blocks=2)


@pytest.fixture(scope="module")
def problem():
    problem = Problem(SMALL)
    assert problem.count > 1_000_000  # so that it counts as a vast one
    return problem


def copies(problem, side, products):
    return peak_bytes(lambda: SIDES[side](problem, products)) / (4 * problem.count)


def test_every_side_finds_the_same_hypergradient(problem):
    by_hand = SIDES["hand"](problem, 12)
    for side in ("bare", "judged", "claimed"):
        assert torch.allclose(SIDES[side](problem, 12), by_hand, rtol=1e-3, atol=1e-7), side


def test_memory_is_that_of_a_loop_by_hand_however_many_products(problem):
    SIDES["bare"](problem, 2)
    by_hand = copies(problem, "hand", 4)
    few, many = copies(problem, "bare", 4), copies(problem, "bare", 12)
    assert few <= 1.1 * by_hand
    assert many <= few + 0.01
    for products in (3, 8, 16):  # the evidence takes up to seven vectors more
        assert copies(problem, "claimed", products) <= by_hand + 7
