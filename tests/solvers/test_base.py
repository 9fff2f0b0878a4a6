"""The system that a solver is given: its structure, and what tasks may share."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import CG, GMRES, Exact, Neumann
from tests.problems import F64, data, relative_error
from tests.systems import definite

METHODS = [Exact, CG, GMRES, lambda **fields: Neumann(terms=600, **fields)]


METHOD_NAMES = ["Exact", "CG", "GMRES", "Neumann"]


ALL = pytest.mark.parametrize("method", METHODS, ids=METHOD_NAMES)


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


def test_nothing_of_the_callers_is_changed():
    A, b, x0 = definite(6), data(14, 6, dtype=F64), data(15, 6, dtype=F64)
    before = [t.clone() for t in (A, b, x0)]
    versions = [t._version for t in (A, b, x0)]
    for method in METHODS:
        method().solve(lambda v: A @ v, b, x0=x0)
    assert all(torch.equal(t, old) for t, old in zip((A, b, x0), before, strict=True))
    assert [t._version for t in (A, b, x0)] == versions


@ALL
def test_tasks_may_share_the_matrix_or_the_right_hand_side(method):
    A, b = torch.stack([definite(5, seed) for seed in range(3)]), data(38, 3, 5, dtype=F64)
    shared, _ = torch.func.vmap(lambda b: method().solve(lambda v: A[0] @ v, b))(b)
    assert relative_error(shared, torch.linalg.solve(A[0], b.T).T) < 1e-5
    same, _ = torch.func.vmap(lambda A: method().solve(lambda v: A @ v, b[0]))(A)
    assert relative_error(same, torch.linalg.solve(A, b[0].expand(3, 5))) < 1e-5
