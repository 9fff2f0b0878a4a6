"""SRBA: the paper's steps, batches that have places, and the optimum on noisy batches."""

from __future__ import annotations

import itertools

import pytest
import torch

import hypergrad
from hypergrad import SOBA, SRBA
from tests.bilevel_by_hand import (
    GAMMA,
    RHO,
    STEPS,
    assert_steps_of_the_paper,
    by_z,
    of_outer,
    stochastic,
)
from tests.bilevel_quadratic import F64, Quadratic, loop, run


def directions(g, f, z, u, x):
    fz, fx = of_outer(f, z, x)
    return torch.cat([by_z(g, z, x), g.H @ u - fz, fx - g.C @ u])


def srba(hand, method):
    """Directions by SARAH: whole at steps 0, q, 2q, ..., followed on one batch in between."""
    d, before = torch.zeros(11, dtype=F64), ()
    for k in range(STEPS):
        point = hand.z, hand.u, hand.x
        if k % method.period == 0:
            g, f = (
                [next(side) for _ in range(n)] for side, n in ((hand.inner, 5), (hand.outer, 3))
            )
            rows = [directions(g[i], f[j], *point) for i in range(5) for j in range(3)]
            d = torch.stack(rows).mean(0)  # bilinear in the batches
        else:
            g, f = next(hand.inner), next(hand.outer)
            assert next(hand.inner) is g
            assert next(hand.outer) is f
            d = d + directions(g, f, *point) - directions(g, f, *before)
        before = point
        hand.z, hand.u, hand.x = hand.z - RHO * d[:4], hand.u - RHO * d[4:8], hand.x - GAMMA * d[8:]
        if method.radius is not None and hand.u.norm() > method.radius:
            hand.u = hand.u * method.radius / hand.u.norm()


@pytest.mark.parametrize("method", [SRBA(period=4), SRBA(period=3, radius=0.3)])
def test_srba_takes_the_steps_of_its_paper(method):
    assert_steps_of_the_paper(method, srba)


def test_the_ball_of_srba_bounds_the_solution_of_the_linear_system():
    bilevel, free = (stochastic(Quadratic(), SRBA(radius=r)) for r in (0.3, None))
    run(bilevel, 10)
    run(free, 10)
    assert free.state_dict()["state"]["u"].norm() > 0.4
    assert bilevel.state_dict()["state"]["u"].norm() <= 0.3 * (1 + 1e-12)


def test_srba_reaches_the_optimum_on_batches_with_rates_at_which_soba_does_not():
    problem = Quadratic()
    rates = {"inner_lr": 0.2, "outer_lr": 0.1, "batches": True}
    followed = loop(problem, SRBA(), **rates)
    noisy = loop(problem, SOBA(inner_decay=0.0, outer_decay=0.0), **rates)
    run(followed, 400)
    run(noisy, 400)
    assert problem.distance(followed.hparams) < 1e-9
    assert problem.distance(noisy.hparams) > 1e-3


def test_srba_wants_batches_that_have_places_and_draws_them_itself():
    problem = Quadratic()
    loader = itertools.cycle(problem.outer_batches)
    with pytest.raises(hypergrad.UnsupportedOperation, match="outer_batches must be a sequence"):
        loop(problem, SRBA(), batches=True, outer_batches=loader)
    bilevel = loop(problem, SRBA(), batches=True)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"SRBA .* call step\(\)"):
        bilevel.step(problem.inner_batches[0], problem.outer_batches[0])


def test_after_a_step_that_was_refused_srba_goes_on_from_the_last_good_one():
    """A batch with NaN in it is refused, and leaves no trace in what is remembered."""
    problem = Quadratic()
    bilevel = loop(problem, SRBA(), batches=True, inner_lr=0.2, outer_lr=0.1)
    run(bilevel, 3)
    good = [batch.c.clone() for batch in problem.inner_batches]
    for batch in problem.inner_batches:
        batch.c.fill_(float("nan"))
    kept = bilevel.state_dict()
    with pytest.raises(hypergrad.NotFinite):
        bilevel.step()
    for batch, c in zip(problem.inner_batches, good, strict=True):
        batch.c.copy_(c)
    torch.testing.assert_close(bilevel.state_dict()["state"], kept["state"])
    run(bilevel, 400)
    assert problem.distance(bilevel.hparams) < 1e-6
