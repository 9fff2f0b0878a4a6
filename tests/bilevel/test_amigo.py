"""AmIGO: the steps of the paper."""

from __future__ import annotations

from hypergrad import AmIGO
from tests.bilevel_by_hand import (
    GAMMA,
    RHO,
    STEPS,
    assert_steps_of_the_paper,
    by_z,
    of_outer,
)


def amigo(hand, method):
    for _ in range(STEPS):
        for _ in range(method.inner_steps):
            hand.z = hand.z - RHO * by_z(next(hand.inner), hand.z, hand.x)
        fz, fx = of_outer(next(hand.outer), hand.z, hand.x)
        for _ in range(method.linear_steps):
            hand.u = hand.u - RHO * (next(hand.inner).H @ hand.u - fz)
        hand.x = hand.x - GAMMA * (fx - next(hand.inner).C @ hand.u)


def test_amigo_takes_the_steps_of_its_paper():
    assert_steps_of_the_paper(AmIGO(inner_steps=3, linear_steps=2), amigo)
