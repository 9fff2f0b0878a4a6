"""Nothing of the caller's is changed by a call, and no answer shares memory with it."""

from __future__ import annotations

import pytest
import torch
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, implicit_grad
from tests.weighted_ridge import inner, outer, solution

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


def test_the_answer_is_detached_and_nothing_of_the_callers_is_changed(h):
    h.requires_grad_()
    w = solution(h).detach().requires_grad_()
    kept = w.detach().clone(), h.detach().clone(), w._version, h._version
    hypergradient, info = implicit_grad(outer, inner, w, h, solver=CG(rtol=1e-12), return_info=True)
    assert not hypergradient.requires_grad
    for leaf in pytree.tree_leaves(info):
        assert not leaf.requires_grad
    assert w.grad is None
    assert h.grad is None
    assert torch.equal(w, kept[0])
    assert torch.equal(h, kept[1])
    assert (w._version, h._version) == kept[2:]


def test_the_answer_shares_no_memory_with_anything(h):
    both = {"a": torch.ones(3, dtype=D), "b": torch.ones(3, dtype=D), "h": h}
    hypergradient = implicit_grad(
        lambda w, t: outer(w, t["h"]) + (t["a"] + t["b"]).sum(),
        lambda w, t: inner(w, t["h"]),
        solution(h),
        both,
    )
    hypergradient["a"].mul_(2)  # as clipping by the norm does
    assert torch.equal(hypergradient["a"], torch.full((3,), 2.0, dtype=D))
    assert torch.equal(hypergradient["b"], torch.ones(3, dtype=D))


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_a_loss_that_changes_a_constant_leaf_in_place_is_an_error_or_leaves_it_alone(which, h):
    tree = {"h": h, "count": torch.tensor(3)}

    def counting(fun):
        def call(w, t):
            t["count"].add_(1)
            return fun(w, t["h"])

        return call

    losses = {"outer": lambda w, t: outer(w, t["h"]), "inner": lambda w, t: inner(w, t["h"])}
    losses[which] = counting({"outer": outer, "inner": inner}[which])
    try:
        implicit_grad(losses["outer"], losses["inner"], solution(h), tree)
    except hypergrad.HypergradError as error:
        named = str(error)
        assert "count" in named
    else:
        assert tree["count"] == 3
