"""stocBiO: the steps of the paper."""

from __future__ import annotations

import torch

from hypergrad import StocBiO
from tests.bilevel_by_hand import (
    GAMMA,
    RHO,
    STEPS,
    assert_steps_of_the_paper,
    by_z,
    of_outer,
)
from tests.bilevel_quadratic import F64


def stocbio(hand, method):
    eye = torch.eye(4, dtype=F64)
    for _ in range(STEPS):
        for _ in range(method.inner_steps):
            hand.z = hand.z - RHO * by_z(next(hand.inner), hand.z, hand.x)
        fz, fx = of_outer(next(hand.outer), hand.z, hand.x)
        # B_Q first: the batch nearest to the right-hand side, as the products are nested.
        batches = [next(hand.inner) for _ in range(method.terms)]
        total = fz
        for q in range(1, method.terms + 1):
            product = eye
            for b in batches[:q]:
                product = (eye - method.linear_lr * b.H) @ product
            total = total + product @ fz
        hand.x = hand.x - GAMMA * (fx - next(hand.inner).C @ (method.linear_lr * total))


def test_stocbio_takes_the_steps_of_its_paper():
    assert_steps_of_the_paper(StocBiO(inner_steps=2, terms=3, linear_lr=0.1), stocbio)
