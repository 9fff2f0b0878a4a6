"""FSLA: the paper's steps, and what its momentum is for."""

from __future__ import annotations

import torch

from hypergrad import FSLA
from tests.bilevel_by_hand import GAMMA, RHO, STEPS, assert_steps_of_the_paper, by_z, of_outer
from tests.bilevel_quadratic import F64, Quadratic, loop, run


def fsla(hand, method):
    """Batches: i1 for z, i2 and j1 for u, i3 and j2 for the outer direction at both points."""
    d, before = torch.zeros(3, dtype=F64), None
    for k in range(STEPS):
        decay = (k + 1) ** -0.5
        rho, gamma, eta = RHO * decay, GAMMA * decay, method.eta * decay
        z = hand.z - rho * by_z(next(hand.inner), hand.z, hand.x)
        g, f = next(hand.inner), next(hand.outer)
        u = hand.u - rho * (g.H @ hand.u - of_outer(f, z, hand.x)[0])
        f, g = next(hand.outer), next(hand.inner)

        def direction(z, u, x, f=f, g=g):
            return of_outer(f, z, x)[1] - g.C @ u

        new = direction(z, u, hand.x)
        if before is None:
            d = new
        else:
            assert next(hand.outer) is f
            assert next(hand.inner) is g
            d = new + (1 - eta) * (d - direction(hand.z, hand.u, before))
        before, hand.x = hand.x, hand.x - gamma * d
        hand.z, hand.u = z, u


def test_fsla_takes_the_steps_of_its_paper():
    assert_steps_of_the_paper(FSLA(eta=0.6), fsla)


def test_the_momentum_of_fsla_takes_noise_out_of_the_outer_direction():
    """At rest at the optimum, up to noise: the smaller eta, the less of it in the direction."""
    problem = Quadratic(noise=0.2)
    sizes = []
    for eta in (1.0, 0.05):
        method = FSLA(eta=eta, inner_decay=0.0, outer_decay=0.0)
        bilevel = loop(problem, method, batches=True, inner_lr=0.02, outer_lr=0.02)
        run(bilevel, 800)
        late = [
            problem.hypergradient(bilevel.hparams).sub(bilevel.step().grads) for _ in range(200)
        ]
        sizes.append(torch.stack(late).norm())
    assert sizes[1] < 0.7 * sizes[0]
