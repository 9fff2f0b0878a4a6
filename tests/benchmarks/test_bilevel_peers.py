"""The methods in jax and those of `Bilevel` take the same steps where nothing is drawn."""

import time

import pytest
import torch

pytest.importorskip("jax")

from benchmarks import bilevel_grid as grid
from benchmarks import bilevel_jax, bilevel_peers


@pytest.mark.parametrize("name", grid.PROBLEMS)
@pytest.mark.parametrize("side", grid.METHODS)
def test_both_sides_take_the_same_steps_on_whole_data(monkeypatch, name, side):
    monkeypatch.setattr(grid, "WHOLE", grid.METHODS)
    monkeypatch.setitem(grid.EPOCH, True, 5)
    problem = grid.PROBLEMS[name]()
    rates = grid.Rates(0.1, 0.1 if name == "quadratic" else 5.0)
    ours = bilevel_peers.epochs(problem, side, rates)
    setting = bilevel_jax.setting(name, problem, rates, whole=True)
    theirs = bilevel_jax.epochs(setting, side, problem, 5)
    for _ in range(3):
        a, b = ours(), bilevel_jax.tensor(theirs())
    moved = (a - problem.hparams.float()).norm()
    assert moved > 0.1
    assert (a - b).norm() < 1e-5 * moved


def test_a_curve_is_timed_to_the_target_between_its_points():
    points = [(0.0, 4.0), (1.0, 2.0), (2.0, 1.0)]
    assert grid.reached(points, 3.0) == 0.5
    assert grid.reached(points, 0.5) == float("inf")
    runs = [("a", 1.0, points), ("a", 2.0, [(0.0, 4.0), (0.5, 1.0)]), ("b", 1.0, points)]
    assert bilevel_peers.best(runs, 1.0) == {"a": (0.5, 2.0), "b": (2.0, 1.0)}


def test_the_clock_of_a_curve_leaves_out_the_values():
    class Slow:
        hparams = torch.zeros(1)

        def value(self, hparams):
            until = time.process_time() + 0.05
            while time.process_time() < until:
                pass
            return 1.0

    advance = lambda: torch.zeros(1)
    points = grid.curve(Slow(), advance, 0.02, torch.clone)
    assert len(points) > 5
    assert points[0] == (0.0, 1.0)
    assert [t for t, _ in points] == sorted(t for t, _ in points)
    assert points[-1][0] < 0.05 * (len(points) - 1)
