"""SABA: batches that have places, and the means of its memory."""

from __future__ import annotations

import itertools

import pytest
import torch

import hypergrad
from hypergrad import SABA, SOBA
from tests.bilevel_by_hand import (
    GAMMA,
    RHO,
    STEPS,
    assert_steps_of_the_paper,
    by_z,
    of_outer,
    stochastic,
)
from tests.bilevel_quadratic import Quadratic, loop, run


def test_saba_reaches_the_optimum_on_batches_with_rates_at_which_soba_does_not():
    problem = Quadratic()
    rates = {"inner_lr": 0.2, "outer_lr": 0.1, "batches": True}
    reduced = loop(problem, SABA(), **rates)
    noisy = loop(problem, SOBA(inner_decay=0.0, outer_decay=0.0), **rates)
    run(reduced, 400)
    run(noisy, 400)
    assert problem.distance(reduced.hparams) < 1e-9
    assert problem.distance(noisy.hparams) > 1e-3


def test_saba_wants_batches_that_have_places_and_draws_them_itself():
    problem = Quadratic()
    loader = itertools.cycle(problem.inner_batches)
    with pytest.raises(hypergrad.UnsupportedOperation, match="inner_batches must be a sequence"):
        loop(problem, SABA(), batches=True, inner_batches=loader)
    bilevel = loop(problem, SABA(), batches=True)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"call step\(\)"):
        bilevel.step(problem.inner_batches[0], problem.outer_batches[0])


def saba(hand, method):
    inner, outer = {}, {}  # of each batch: what it was when it was last seen

    def seen(g, f):
        fz, fx = of_outer(f, hand.z, hand.x)
        return (by_z(g, hand.z, hand.x), g.H @ hand.u, g.C @ hand.u), (fz, fx)

    for _ in range(5):  # the longer of the two sequences
        g, f = next(hand.inner), next(hand.outer)
        inner[id(g)], outer[id(f)] = seen(g, f)
    for _ in range(STEPS):
        g, f = next(hand.inner), next(hand.outer)
        new = [*seen(g, f)[0], *seen(g, f)[1]]
        reduced = []
        for place, value in enumerate(new):
            table, key = (inner, id(g)) if place < 3 else (outer, id(f))
            column = place if place < 3 else place - 3
            mean = sum(row[column] for row in table.values()) / len(table)
            reduced.append(value - table[key][column] + mean)
        inner[id(g)], outer[id(f)] = tuple(new[:3]), tuple(new[3:])
        dz, Hu, Cu, fz, fx = reduced
        hand.z = hand.z - RHO * dz
        hand.u = hand.u - RHO * (Hu - fz)
        hand.x = hand.x - GAMMA * (fx - Cu)


def test_saba_takes_the_steps_of_its_paper():
    assert_steps_of_the_paper(SABA(), saba)


def test_the_means_of_saba_are_those_of_its_memory_after_many_steps():
    bilevel = stochastic(Quadratic(), SABA())
    for _ in range(103):
        bilevel.step()
        state = bilevel.state_dict()["state"]
        for name, table in state["memory"].items():
            torch.testing.assert_close(state["means"][name], table.mean(0), rtol=1e-12, atol=1e-13)
