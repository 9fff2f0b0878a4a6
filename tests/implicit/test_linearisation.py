"""The inner problem linearised: its leaves must be connected, and its value a scalar."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import implicit_grad
from tests.weighted_ridge import inner, outer, solution

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


def test_an_inner_problem_without_one_leaf_is_not_connected_and_names_it(h):
    params = {"used": solution(h), "idle": torch.ones(2, dtype=D)}
    with pytest.raises(hypergrad.NotConnected, match=r"params\['idle'\]"):
        implicit_grad(
            lambda p, h: outer(p["used"], h) + p["idle"].sum(),
            lambda p, h: inner(p["used"], h),
            params,
            h,
        )


def test_a_root_or_fixed_point_without_one_leaf_is_not_connected(h):
    params = {"used": solution(h), "idle": torch.ones(2, dtype=D)}
    for condition in (hypergrad.Root, hypergrad.FixedPoint):
        fun = condition(lambda p, h: {"used": p["used"] * h, "idle": torch.zeros(2, dtype=D)})
        if condition is hypergrad.FixedPoint:  # A is the identity there: connected
            implicit_grad(lambda p, h: p["used"].sum(), fun, params, h, on_failure="ignore")
        else:
            with pytest.raises(hypergrad.NotConnected, match=r"params\['idle'\]"):
                implicit_grad(lambda p, h: p["used"].sum(), fun, params, h)


def test_the_inner_problem_must_return_a_scalar(h):
    with pytest.raises(hypergrad.StructureMismatch, match=r"inner must return a scalar.*\(3,\)"):
        implicit_grad(outer, lambda w, h: w * h, solution(h), h)
    with pytest.raises(hypergrad.StructureMismatch, match=r"outer must return a scalar.*\(3,\)"):
        implicit_grad(lambda w, h: w * h, inner, solution(h), h)
    with pytest.raises(hypergrad.StructureMismatch, match=r"outer must return a scalar.*float"):
        implicit_grad(lambda w, h: 1.0, inner, solution(h), h)
