"""`check_hypergrad` on functions whose differences say little: edges, digits, sizes."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from tests.problems import F64, equilibrium, relative_error, ridge
from tests.spoilt_parts import (
    blamed,
    check,
    check_three,
    gradient_descent,
    inner_of_three,
    outer_of_three,
    solve_of_three,
)


def test_a_solve_that_is_not_smooth():
    problem = ridge()

    def solve(lam):
        return problem.solve(lam) + 1e-4 * torch.floor(1e5 * lam)

    report = check(problem, solve=solve, inner=problem.inner)
    assert not report.ok
    assert report.blame in ("solve not smooth", "inner problem not solved")


def test_a_jump_in_the_outer_loss_is_not_smooth():
    problem = ridge()
    report = check(problem, outer=lambda w, lam: problem.outer(w, lam) + torch.floor(1e5 * w).sum())
    assert blamed(report, "solve not smooth", "step sizes")


def test_numbers_that_are_not_finite():
    problem = ridge()
    report = check(problem, outer=lambda w, lam: (w - 100).log().sum())
    assert blamed(report, "not finite", "outer loss")


def test_many_hyperparameters_are_checked_along_random_directions():
    report = check(equilibrium())
    assert len(report.labels) == 6
    assert "hparams['W'], a random direction" in report.labels


def test_a_tolerance_of_ones_own():
    problem = ridge()
    w = torch.zeros(5, dtype=F64)
    solve = gradient_descent(problem, w, 100, 0.02)
    expected = problem.hypergradient(problem.hparams)
    params = solve(problem.hparams).detach()
    hypergradient = hypergrad.implicit_grad(problem.outer, problem.inner, params, problem.hparams)
    assert relative_error(hypergradient, expected) < 0.1
    assert check(problem, solve=solve, rtol=0.2).ok


@pytest.mark.parametrize("size", [1e-150, 1e-30, 1e-8, 1e8, 1e30])
def test_problems_of_any_size(size):
    assert check_three(outer=lambda w, h: size * outer_of_three(w, h)).ok
    assert check_three(inner=lambda w, h: size * inner_of_three(w, h)).ok
    assert check_three(
        2 / size,
        inner=lambda w, h: inner_of_three(w, size * h),
        solve=lambda h: solve_of_three(size * h),
    ).ok
    assert check_three(
        outer=lambda w, h: outer_of_three(w / size, h),
        inner=lambda w, h: inner_of_three(w / size, h),
        solve=lambda h: size * solve_of_three(h),
    ).ok


def test_the_edge_of_a_domain():
    report = check_three(solve=lambda h: solve_of_three(h) * torch.where(h > 2, torch.nan, 1.0))
    assert blamed(report, "not finite", "a step of", "logarithm")


def test_a_loss_whose_digits_are_lost_to_a_constant():
    report = check_three(outer=lambda w, h: outer_of_three(w, h) + 1e13)
    assert blamed(report, "lost in rounding", "Leave out of outer")
