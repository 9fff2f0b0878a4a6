"""Estimators of a method, by a word or by a callable, and the start of their linear systems."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import CG, Alternating
from tests.bilevel_quadratic import Quadratic, loop, run


def test_any_callable_is_an_estimator_and_so_is_a_word():
    problem = Quadratic()

    def by_hand(outer, inner, z, x):
        assert not z.requires_grad
        assert not x.requires_grad
        return problem.hypergradient(x)

    called = loop(problem, by_hand)
    worded = loop(problem, "implicit")
    assert called.method == Alternating(estimator=by_hand)
    assert worded.method == Alternating()
    run(called, 40)
    assert problem.distance(called.hparams) < 1e-3
    assert called.step().outer_value.isnan()


def test_an_estimator_with_the_same_call_is_a_word():
    """The cross product by differences is exact here, where it is linear in the parameters."""
    problem = Quadratic()
    bilevel = loop(problem, "finite_difference", batches=True)
    x = bilevel.hparams.clone()
    problem.seen.clear()
    found = bilevel.step().grads
    f = next(batch for batch in problem.seen if hasattr(batch, "P"))
    g, z = problem.seen[-1], bilevel.params
    # The solution of the linear system is taken for its right-hand side.
    expected = f.Q @ x + f.q - g.C @ (f.P @ z + f.p)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-8)


def test_what_an_estimator_returns_is_checked():
    bilevel = loop(Quadratic(), lambda outer, inner, z, x: torch.zeros(2))
    with pytest.raises(hypergrad.StructureMismatch, match="What the estimator returned"):
        bilevel.step()


def test_the_linear_system_starts_from_the_last_solution():
    problem = Quadratic()
    method = Alternating(solver=CG(maxiter=1), inner_tol=None)
    bilevel = loop(problem, method, outer_lr=1e-8)
    residuals = [float(bilevel.step().info.residual_norm) for _ in range(40)]
    assert residuals[-1] < 1e-3 * residuals[0]


def test_a_stale_start_of_the_linear_system_is_dropped():
    problem = Quadratic()
    f = problem.whole_outer
    method = Alternating(solver=CG(maxiter=1), inner_tol=None)
    options = {"batches": True, "outer_lr": 1e-8}
    bilevel, fresh = loop(problem, method, **options), loop(problem, method, **options)
    far = type(f)(f.P, f.Q, -1e6 * f.p, f.q)
    bilevel.step(problem.whole_inner, far)  # u is a million times too long for what follows
    z, x = bilevel.params.clone(), bilevel.hparams.clone()
    fresh._levels.params.variables[0].data.copy_(z)
    fresh._levels.hparams.variables[0].data.copy_(x)
    stale = bilevel.step(problem.whole_inner, f)
    clean = fresh.step(problem.whole_inner, f)
    assert float(stale.info.residual_norm) < 1
    torch.testing.assert_close(stale.grads, clean.grads)
