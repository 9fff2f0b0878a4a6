"""HOAG: both systems are solved to a tolerance that tightens."""

from __future__ import annotations

import functools

import pytest
import torch

import hypergrad
from hypergrad import CG, HOAG, Bilevel
from tests.bilevel_quadratic import Quadratic, loop, run, sgd


@pytest.mark.parametrize(
    ("decrease", "expected"),
    [
        ("exponential", [0.1, 0.09, 0.081]),
        ("quadratic", [0.1, 0.025, 0.1 / 9]),
        ("cubic", [0.1, 0.0125, 0.1 / 27]),
    ],
)
def test_hoag_solves_both_systems_to_a_tolerance_that_tightens(decrease, expected):
    problem = Quadratic()
    bilevel = loop(problem, HOAG(decrease=decrease, solver=CG(), min_tol=1e-8))
    infos = [bilevel.step() for _ in range(60)]
    assert [info.tolerance for info in infos[:3]] == pytest.approx(expected)
    for info in infos:
        assert float(info.info.inner_residual) <= info.tolerance
        assert float(info.info.residual_norm) <= info.tolerance
    # Not solved further than was asked: the first steps are cheap.
    assert float(infos[0].info.inner_residual) > 1e-4
    assert infos[0].inner_steps < 30


def test_hoag_says_when_it_runs_out_of_inner_steps():
    with pytest.warns(hypergrad.ConvergenceWarning, match="max_inner_steps"):
        run(loop(Quadratic(), HOAG(max_inner_steps=1)), 5)
    with pytest.raises(hypergrad.NotConverged, match=r"At outer step \d"):
        run(loop(Quadratic(), HOAG(max_inner_steps=1), on_failure="raise"), 5)
    run(loop(Quadratic(), HOAG(max_inner_steps=1), on_failure="ignore"), 5)


def test_hoag_gives_up_on_an_optimiser_that_comes_no_closer():
    bilevel = loop(Quadratic(), HOAG(), inner_lr=0.0)
    with pytest.warns(hypergrad.ConvergenceWarning, match="did not solve the inner problem"):
        assert bilevel.step().inner_steps < 100


def test_hoag_with_lbfgs_inside():
    problem = Quadratic()
    lbfgs = functools.partial(torch.optim.LBFGS, max_iter=5, line_search_fn="strong_wolfe")
    bilevel = loop(problem, HOAG(), inner_optimizer=lbfgs)
    infos = [bilevel.step() for _ in range(60)]
    assert problem.distance(bilevel.hparams) < 1e-3
    assert sum(info.inner_steps for info in infos) < 180


def test_hoag_in_float32_is_silent_to_the_end():
    data = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    target = data.sum(1)
    bilevel = Bilevel(
        lambda w, h: (w - 0.9).square().sum(),
        lambda w, h: (data @ w - target).square().mean() + h.exp() * w.square().sum(),
        torch.zeros(4),
        torch.tensor(-1.0),
        inner_optimizer=sgd(0.2),
        outer_optimizer=sgd(1.0),
        method=HOAG(),
    )
    run(bilevel, 120)
    assert float(bilevel.step().grads.abs()) < 1e-3
