"""SOBA and MA-SOBA: the steps of the papers, one evaluation a batch."""

from __future__ import annotations

import pytest
import torch

from hypergrad import MASOBA, SOBA
from tests.bilevel_by_hand import (
    GAMMA,
    RHO,
    STEPS,
    assert_steps_of_the_paper,
    by_z,
    of_outer,
    stochastic,
)
from tests.bilevel_quadratic import F64, Inner, Outer, Quadratic


def soba(hand, method):
    for k in range(STEPS):
        rho, gamma = RHO * (k + 1) ** -0.5, GAMMA * (k + 1) ** -0.5
        g, f = next(hand.inner), next(hand.outer)
        dz, (fz, fx) = by_z(g, hand.z, hand.x), of_outer(f, hand.z, hand.x)
        du, dx = g.H @ hand.u - fz, fx - g.C @ hand.u
        hand.z, hand.u, hand.x = hand.z - rho * dz, hand.u - rho * du, hand.x - gamma * dx


def ma_soba(hand, method):
    h = torch.zeros(3, dtype=F64)
    for _ in range(STEPS):
        g, f = next(hand.inner), next(hand.outer)
        dz, (fz, fx) = by_z(g, hand.z, hand.x), of_outer(f, hand.z, hand.x)
        du, dx = g.H @ hand.u - fz, fx - g.C @ hand.u
        hand.z, hand.u, hand.x = hand.z - RHO * dz, hand.u - RHO * du, hand.x - GAMMA * h
        h = (1 - method.theta) * h + method.theta * dx


@pytest.mark.parametrize(
    ("method", "algorithm"), [(SOBA(), soba), (MASOBA(theta=0.3), ma_soba)], ids=["SOBA", "MA-SOBA"]
)
def test_soba_takes_the_steps_of_its_paper(method, algorithm):
    assert_steps_of_the_paper(method, algorithm)


def test_the_losses_are_evaluated_once_for_each_batch_of_a_single_loop_step():
    problem = Quadratic()
    for method in (SOBA(), MASOBA()):
        problem.seen.clear()
        bilevel = stochastic(problem, method)
        for _ in range(3):
            bilevel.step()
        assert [type(batch) for batch in problem.seen] == [Inner, Outer] * 3
