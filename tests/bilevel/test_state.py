"""What a run remembers: copied, compared with what there is, and put back."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import MASOBA, SABA, SOBA
from tests.bilevel_quadratic import F64, Quadratic, adam, loop, run


def test_a_state_shares_no_memory_with_the_run():
    bilevel = loop(Quadratic(), SABA(), batches=True, outer_optimizer=adam(0.1))
    run(bilevel, 2)
    state = bilevel.state_dict()
    before = torch.utils._pytree.tree_map(
        lambda t: t.clone() if isinstance(t, torch.Tensor) else t, state
    )
    run(bilevel, 3)
    for a, b in zip(*map(torch.utils._pytree.tree_leaves, (before, state)), strict=True):
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b


def test_the_state_of_another_problem_or_method_is_refused_and_changes_nothing():
    bilevel = loop(Quadratic(), MASOBA())
    run(bilevel, 2)
    good = bilevel.state_dict()
    shorter = {**good, "hparams": [torch.zeros(2, dtype=F64)]}
    narrower = {**good, "state": {**good["state"], "u": torch.zeros(4)}}
    for state, text in (
        (loop(Quadratic(), SOBA()).state_dict(), "method SOBA"),
        (shorter, "hparams was saved with shape"),
        (narrower, r"state\['u'\] was saved with"),
        ({}, "no state of Bilevel"),
    ):
        with pytest.raises(hypergrad.StructureMismatch, match=text):
            bilevel.load_state_dict(state)
    for a, b in zip(
        *map(torch.utils._pytree.tree_leaves, (good, bilevel.state_dict())), strict=True
    ):
        assert a.equal(b) if isinstance(a, torch.Tensor) else a == b
