"""The system that a solver is given: its structure."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import CG
from tests.problems import F64


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda v: {"a": v["a"]}, "structure"),
        (lambda v: {**v, "b": v["b"][None]}, "shape"),
        (lambda v: {**v, "b": v["b"].float()}, "dtype"),
    ],
    ids=["structure", "shape", "dtype"],
)
def test_a_product_or_x0_of_another_structure_is_refused(change, what):
    b = {"a": torch.ones(2, dtype=F64), "b": torch.tensor(1.0, dtype=F64)}
    with pytest.raises(hypergrad.StructureMismatch, match=what):
        CG().solve(change, b)
    with pytest.raises(hypergrad.StructureMismatch, match=f"x0.*{what}"):
        CG().solve(lambda v: v, b, x0=change(b))
