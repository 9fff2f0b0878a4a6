"""Plain alternation: the hypergradient of this step's batches, and what it leaves unsolved."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import Alternating, Exact
from tests.bilevel_quadratic import Quadratic, loop, run


def test_alternation_with_batches_gives_the_hypergradient_of_the_batches_of_this_step():
    problem = Quadratic()
    method = Alternating(inner_steps=2, solver=Exact(), inner_tol=None)
    bilevel = loop(problem, method, batches=True)
    for _ in range(4):
        problem.seen.clear()
        x = bilevel.hparams.clone()
        info = bilevel.step()
        # Two inner steps, then the outer loss and the inner one for the hypergradient.
        (*_, f, g), z = problem.seen, bilevel.params
        u = torch.linalg.solve(g.H, f.P @ z + f.p)
        expected = f.Q @ x + f.q - g.C @ u
        torch.testing.assert_close(info.grads, expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(bilevel.hparams, x - 0.3 * expected, rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(info.outer_value, problem.outer(z, x, f))
        assert len(problem.seen) == 5  # the one above included


def test_an_unsolved_inner_problem_is_said_unless_it_is_meant():
    problem = Quadratic()
    with pytest.warns(hypergrad.ConvergenceWarning, match="does not solve the inner problem"):
        loop(problem, Alternating(inner_steps=1)).step()
    with pytest.raises(hypergrad.NotConverged, match="inner_tol=None"):
        loop(problem, Alternating(inner_steps=1), on_failure="raise").step()
    loop(problem, Alternating(inner_steps=1, inner_tol=None)).step()
    loop(problem, Alternating(inner_steps=1), on_failure="ignore").step()
    run(loop(problem, Alternating(inner_steps=100)), 3)  # and silent where it is solved
