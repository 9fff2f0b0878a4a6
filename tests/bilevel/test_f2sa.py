"""F2SA: the steps of the paper, and the bias of its penalty."""

from __future__ import annotations

import pytest
import torch

from hypergrad import F2SA
from tests.bilevel_by_hand import (
    GAMMA,
    RHO,
    STEPS,
    assert_steps_of_the_paper,
    by_z,
    of_outer,
)
from tests.bilevel_quadratic import F64, Quadratic, loop, run


def test_the_bias_of_f2sa_is_of_the_order_of_one_over_the_penalty():
    problem = Quadratic()
    biases = []
    for penalty in (10.0, 100.0):
        method = F2SA(penalty, 0.0, relaxed_lr=0.4, inner_decay=0.0, outer_decay=0.0)
        bilevel = loop(problem, method, outer_lr=0.2)
        run(bilevel, 50)
        biases.append(problem.distance(bilevel.hparams))
    assert biases[0] < 0.1
    assert biases[1] == pytest.approx(biases[0] / 10, rel=0.3)


def test_f2sa_with_a_growing_penalty_goes_on_towards_the_optimum():
    problem = Quadratic()
    method = F2SA(10.0, growth=1 / 3, relaxed_lr=0.4, inner_decay=0.0, outer_decay=1 / 3)
    bilevel = loop(problem, method, outer_lr=0.4)
    run(bilevel, 20)
    early = problem.distance(bilevel.hparams)
    run(bilevel, 60)
    assert problem.distance(bilevel.hparams) < 0.5 * early < 0.1


def f2sa(hand, method):
    y = torch.zeros(4, dtype=F64)
    for k in range(STEPS):
        gamma = RHO * (k + 1) ** -method.inner_decay  # of z
        lam = method.penalty * (k + 1) ** method.growth
        alpha = gamma / (2 * lam)  # the paper's lam = gamma / (2 alpha)
        for _ in range(method.inner_steps):
            hand.z = hand.z - gamma * by_z(next(hand.inner), hand.z, hand.x)
            g, f = next(hand.inner), next(hand.outer)
            y = y - alpha * (of_outer(f, y, hand.x)[0] + lam * by_z(g, y, hand.x))
        f, at_y, at_z = next(hand.outer), next(hand.inner), next(hand.inner)
        dx = of_outer(f, y, hand.x)[1] + lam * (at_y.C @ y - at_z.C @ hand.z)
        hand.x = hand.x - GAMMA * (k + 1) ** -method.outer_decay * dx


def test_f2sa_takes_the_steps_of_its_paper():
    assert_steps_of_the_paper(F2SA(penalty=2.0, inner_steps=2), f2sa)
