"""What comes back with an answer: the status and the figures of a linear solve."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

from hypergrad import CG, Status, implicit_grad
from tests.weighted_ridge import MATRIX, inner, outer, solution

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


def test_the_info_says_what_was_done(h):
    w = {"w": solution(h)}
    arguments = (lambda w, h: outer(w["w"], h), lambda w, h: inner(w["w"], h), w, h)
    _, info = implicit_grad(*arguments, solver=CG(rtol=1e-10), return_info=True)
    assert info.status == Status.CONVERGED
    assert Status(info.status) is Status.CONVERGED
    assert info.success
    assert info.method == "CG"
    assert info.residual_norm < 1e-10
    assert not info.negative_curvature
    A = MATRIX + torch.diag(h)
    u = torch.linalg.solve(A, solution(h) - 1)
    torch.testing.assert_close(info.solution["w"], u, rtol=1e-9, atol=0)
    torch.testing.assert_close(info.outer_value, outer(solution(h), h))
    assert info.aux is None
    assert "CG: CONVERGED" in str(info)
    for leaf in pytree.tree_leaves(info):
        assert isinstance(leaf, torch.Tensor)


def test_the_numbers_of_the_statuses_are_fixed():
    assert {s.name: int(s) for s in Status} == {
        "CONVERGED": 0,
        "MAX_ITERATIONS": 1,
        "NEGATIVE_CURVATURE": 2,
        "BREAKDOWN": 3,
        "STAGNATED": 4,
        "DIVERGED": 5,
        "SINGULAR": 6,
        "NOT_FINITE": 7,
    }
