"""SABA: batches that have places, and the means of its memory."""

from __future__ import annotations

import itertools

import pytest

import hypergrad
from hypergrad import SABA, SOBA
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
