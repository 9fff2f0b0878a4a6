"""The loop for the outer problem: what it holds, what it leaves alone, and how it resumes."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import (
    F2SA,
    FSLA,
    HOAG,
    MASOBA,
    SABA,
    SOBA,
    SRBA,
    Alternating,
    AmIGO,
    StocBiO,
)
from tests.bilevel_quadratic import Quadratic, loop, run

# --- the losses are deterministic: every method reaches the optimum --------------------------


EXACT = {
    "alternating": (Alternating(inner_steps=5, inner_tol=None), 0.3, 50),
    "HOAG": (HOAG(), 0.4, 110),
    "SOBA": (SOBA(inner_decay=0.0, outer_decay=0.0), 0.2, 150),
    "MASOBA": (MASOBA(theta=0.5), 0.1, 200),
    "SABA": (SABA(), 0.2, 150),
    "AmIGO": (AmIGO(inner_steps=5, linear_steps=5), 0.3, 60),
    "StocBiO": (StocBiO(inner_steps=5, terms=40), 0.3, 50),
}


def test_a_projection_that_is_none_is_refused():
    problem = Quadratic()
    with pytest.raises(TypeError, match="hparams_projection must be a function"):
        loop(problem, hparams_projection=1.0)
    with pytest.raises(
        hypergrad.StructureMismatch, match=r"hparams_projection\(hparams\) has shape"
    ):
        loop(problem, EXACT["alternating"][0], hparams_projection=lambda x: x[:1]).step()
    with pytest.raises(hypergrad.NotFinite, match="hparams_projection returned NaN"):
        loop(problem, EXACT["alternating"][0], hparams_projection=lambda x: x / 0 - x / 0).step()


# --- rates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: SOBA(linear_lr=0.0),
        lambda: SABA(outer_decay=-1.0),
        lambda: MASOBA(theta=1.5),
        lambda: SRBA(period=0),
        lambda: SRBA(radius=-1.0),
        lambda: FSLA(eta=0.0),
        lambda: AmIGO(inner_steps=0),
        lambda: StocBiO(terms=-1),
        lambda: F2SA(penalty=float("nan")),
        lambda: HOAG(tol=0.0),
        lambda: HOAG(decrease="slowly"),
        lambda: Alternating(inner_steps=0),
        lambda: Alternating(estimator="magic"),
        lambda: Alternating(estimator="unrolled"),
    ],
)
def test_fields_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValueError, match=r"must|finite|no estimator"):
        wrong()


# --- estimators and the linear system --------------------------------------------------------


@pytest.mark.parametrize(
    "method",
    [Alternating(inner_tol=None), SOBA(), AmIGO(), StocBiO(), SABA(), SRBA(), FSLA()],
)
def test_rates_that_are_too_large_end_in_an_error_before_the_hyperparameters_are_lost(method):
    bilevel = loop(Quadratic(), method, inner_lr=1e30)
    with pytest.raises(hypergrad.NotFinite):
        run(bilevel, 50)
    assert bilevel.hparams.isfinite().all()


# --- in company ------------------------------------------------------------------------------


def test_the_callback_is_given_every_record():
    infos = []
    bilevel = loop(Quadratic(), SOBA(), callback=infos.append)
    returned = [bilevel.step() for _ in range(3)]
    assert infos == returned
    assert [info.step for info in infos] == [1, 2, 3]
    assert bilevel.steps == 3


def test_a_step_inside_a_transform_is_refused():
    bilevel = loop(Quadratic(), SOBA())

    def inside(t):
        bilevel.step()
        return t

    with pytest.raises(hypergrad.UnsupportedOperation, match=r"torch\.func"):
        torch.func.vmap(inside)(torch.zeros(2))
