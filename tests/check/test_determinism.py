"""`check_hypergrad` names the part that does not give the same answer twice."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.problems import F64, ridge
from tests.spoilt_parts import blamed, check, check_three, outer_of_three


@pytest.mark.parametrize("where", ["inner", "outer"])
def test_dropout_in_a_loss(where):
    problem = ridge()
    loss = getattr(problem, where)

    def with_dropout(w, lam):
        return loss(torch.nn.functional.dropout(w, 0.5), lam)

    report = check(problem, **{where: with_dropout})
    assert blamed(report, "loss not deterministic", where, "eval()")


def test_a_solve_that_is_not_deterministic():
    problem = ridge()
    generator = np.random.default_rng(0)

    def solve(lam):
        return problem.solve(lam) * (1 + 1e-3 * generator.standard_normal())

    assert blamed(check(problem, solve=solve), "solve not deterministic", "seed")


def test_a_solve_that_draws_from_torch_sees_one_draw():
    problem = ridge()

    def solve(lam):
        return problem.solve(lam) * (1 + 1e-13 * torch.randn((), dtype=F64))

    assert check(problem, solve=solve).ok


@pytest.mark.parametrize("seed", range(20))
def test_dropout_of_two_unknowns_whose_masks_may_be_equal_by_chance(seed):
    def drop(w):
        return torch.nn.functional.dropout(w, 0.5)

    given = {
        "solve": lambda h: h * torch.ones(2, dtype=F64),
        "inner": lambda w, h: (w - h) @ (w - h),
    }
    torch.manual_seed(seed)
    state = torch.get_rng_state()
    report = check_three(outer=lambda w, h: (drop(w) - 1).square().sum(), **given)
    assert blamed(report, "loss not deterministic", "outer")
    report = check_three(**given | {"inner": lambda w, h: (w - h) @ (drop(w) - h)})
    assert blamed(report, "loss not deterministic", "inner")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_dropout_that_is_switched_off_is_no_randomness():
    dropout = torch.nn.Dropout(0.5).eval()
    assert check_three(outer=lambda w, h: outer_of_three(dropout(w), h)).ok
