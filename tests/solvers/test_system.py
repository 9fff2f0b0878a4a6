"""The unit system, the status ladder, and the figures of a `Solution` that are left out."""

from __future__ import annotations

import math

import pytest
import torch

from hypergrad import Status
from hypergrad.solvers import Solution
from hypergrad.solvers._system import Units, graded

F64 = torch.float64


def test_right_hand_sides_have_norm_one_whatever_their_scale() -> None:
    b = torch.tensor([[3e-200, 4e-200], [3e200, 4e200], [3.0, 4.0]], dtype=F64)
    torch.testing.assert_close(Units(b).b, torch.tensor([0.6, 0.8], dtype=F64).expand(3, 2))


def test_zero_and_nan_are_set_aside_and_put_back() -> None:
    b = torch.tensor([[3.0, 4.0], [0.0, 0.0], [math.nan, 1.0], [math.inf, 1.0]], dtype=F64)
    units = Units(b)
    assert units.present.tolist() == [True, False, False, False]
    x, status = torch.ones(4, 2, dtype=F64), torch.full((4,), int(Status.STAGNATED))
    x, status, size = units.settled(x * units.unit, status, torch.full((4,), 0.5, dtype=F64))
    assert x[0].tolist() == [5.0, 5.0]
    assert x[1].tolist() == [0.0, 0.0]
    assert x[2:].isnan().all()
    assert [Status(s).name for s in status] == [
        "STAGNATED",
        "CONVERGED",
        "NOT_FINITE",
        "NOT_FINITE",
    ]
    assert size[:2].tolist() == [0.5, 0.0]
    assert size[2:].isnan().all()


def test_a_task_that_is_set_aside_starts_at_zero() -> None:
    units = Units(torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=F64))
    assert units.start(torch.full((2, 2), 10.0)).tolist() == [[2.0, 2.0], [0.0, 0.0]]


def test_the_absolute_tolerance_is_taken_in_the_units() -> None:
    units = Units(torch.tensor([[3.0, 4.0], [30.0, 40.0]], dtype=F64))
    assert units.tolerance(1e-3, 0.1, F64).tolist() == pytest.approx([0.02, 0.002])
    assert units.tolerance(None, 0.0, F64).tolist() == [1e-6, 1e-6]


def test_of_several_ends_the_last_one_counts() -> None:
    yes, no = torch.tensor([True, True, False]), torch.tensor([False, True, False])
    status = graded({Status.MAX_ITERATIONS: yes, Status.SINGULAR: no})
    assert status.tolist() == [Status.MAX_ITERATIONS, Status.SINGULAR, Status.CONVERGED]
    again = graded({Status.NOT_FINITE: no}, status)
    assert again.tolist() == [Status.MAX_ITERATIONS, Status.NOT_FINITE, Status.CONVERGED]


def test_a_solution_needs_x_alone() -> None:
    solution = Solution(torch.tensor([[1.0, 2.0], [math.nan, 0.0]]))
    assert solution.status.tolist() == [Status.CONVERGED, Status.NOT_FINITE]
    assert solution.success.tolist() == [True, False]
    assert solution.iterations.tolist() == [0, 0]
    assert solution.negative_curvature.tolist() == [False, False]
    assert solution.residual_norm.isnan().all()
    assert solution.eigenvalues.shape == (2, 2)
    assert {"status", "residual_norm"} <= solution.unsaid
