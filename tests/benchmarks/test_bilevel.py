"""The benchmark of the loop: its truth, and that all sides solve the same problem."""

import functools

import pytest
import torch

pytest.importorskip("torchopt")
pytestmark = pytest.mark.filterwarnings("ignore:We've integrated functorch")

from benchmarks import bilevel, bilevel_problems, bilevel_sides  # noqa: E402


@pytest.fixture(scope="module")
def quadratic():
    return bilevel_problems.quadratic(samples=400, inner=6, outer=4)


def test_the_closed_form_of_the_quadratic_is_stationary(quadratic):
    start = quadratic.hypergradient(quadratic.hparams).norm()
    # One is a formula in matrices, the other differentiates the losses.
    assert quadratic.hypergradient(quadratic.optimum).norm() < 1e-10 * start
    nearby = quadratic.optimum + 0.1 * torch.eye(4, dtype=torch.float64)
    assert all(quadratic.value(h) > quadratic.least() for h in nearby)


@pytest.mark.parametrize(
    "make", [bilevel_problems.breast_cancer, bilevel_problems.cleaning], ids=["penalties", "labels"]
)
def test_the_true_gradient_is_that_of_the_value(make):
    problem = make()
    direction = torch.randn(
        problem.hparams.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    )
    up, down = (problem.value(problem.hparams + s * 1e-3 * direction) for s in (1, -1))
    expected = float(problem.hypergradient(problem.hparams) @ direction)
    assert (up - down) / 2e-3 == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("side", bilevel_sides.SIDES)
def test_every_side_lowers_the_outer_loss(quadratic, side):
    rates = bilevel_sides.Rates(0.5, 0.1, {side: 0.03})
    step = bilevel_sides.run(quadratic, side, rates)
    for _ in range(15):
        hparams = step()
    assert quadratic.least() <= quadratic.value(hparams) < quadratic.value(quadratic.hparams)


def test_alternation_takes_the_steps_of_torchopt(quadratic):
    """With ten steps of CG on six unknowns both hypergradients are exact for their matrix."""
    rates = bilevel_sides.Rates(0.5, 0.1, dict.fromkeys(bilevel_sides.SIDES, 0.1))
    ours, theirs = (
        bilevel_sides.run(quadratic, side, rates)
        for side in ("Alternating, 10 + 10", "torchopt, 10 + 10")
    )
    for _ in range(5):
        torch.testing.assert_close(ours(), theirs(), rtol=1e-6, atol=1e-8)


def test_a_target_is_reached_between_two_points_or_never():
    curve = [(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)]
    reached = functools.partial(bilevel.reached, curve)
    assert reached(3.0) == 0.5
    assert reached(1.5) == 1.5
    assert reached(0.5) == float("inf")
