"""What a loop keeps of a linear system: who may read it, when it is forgotten, how it is saved."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import CG
from hypergrad.solvers._recycle import Memory, recycling
from tests.problems import F64, data
from tests.systems import definite, hypergradient_with

RECYCLING = CG(rtol=1e-8, recycle=True)


def _inner(w, t):
    return ((w - t) ** 2).sum()


CALLS = {
    "solve": lambda one: RECYCLING.solve(lambda v: v, one),
    "implicit_grad": lambda one: hypergrad.implicit_grad(
        _inner, _inner, one, one, solver=RECYCLING
    ),
    "root_vjp": lambda one: hypergrad.root_vjp(
        hypergrad.Minimum(_inner), one, (one,), one, solver=RECYCLING
    ),
    "custom_argmin": lambda one: hypergrad.custom_argmin(_inner, solver=RECYCLING)(
        lambda init, t: t.detach()
    )(one, one.clone().requires_grad_()),
    "jacobian": lambda one: hypergrad.jacobian(lambda w, t: w, _inner, one, one, solver=RECYCLING),
}


@pytest.mark.parametrize("name", CALLS)
def test_recycling_without_a_next_step_is_an_error_that_names_what_has_one(name):
    text = r"(?s)Bilevel.*hypergrad\.compile"
    with pytest.raises(hypergrad.UnsupportedOperation, match=text) as refused:
        CALLS[name](torch.ones(3, dtype=F64))
    assert refused.value.argument == "solver"


def test_recycle_is_a_field_like_the_others():
    assert not CG().recycle
    with pytest.raises(TypeError, match="recycle must be True or False"):
        CG(recycle=1)


def test_a_memory_is_claimed_by_one_hypergradient_and_not_by_what_its_losses_solve():
    nested = hypergrad.custom_argmin(_inner, solver=RECYCLING)(lambda init, t: t.detach())

    def outer(w, t):
        return nested(torch.zeros_like(t), t.requires_grad_()).sum() + w.sum()

    memory, one = Memory(), torch.ones(3, dtype=F64)
    with recycling(memory):
        with pytest.raises(hypergrad.UnsupportedOperation, match="Bilevel"):
            hypergrad.implicit_grad(outer, _inner, one, one.clone(), solver=RECYCLING)
        hypergradient_with(definite(6), data(0, 6, dtype=F64), RECYCLING)
    assert memory.solution is not None
    assert memory.solution.shape == (6,)


def test_what_is_exported_goes_on_as_it_was_and_shares_no_memory():
    A, b = definite(40, condition=1e3), data(0, 40, dtype=F64)
    first, second = Memory(), Memory()
    with recycling(first):
        for k in range(8):
            hypergradient_with(A + k * torch.eye(40, dtype=F64), b, CG(maxiter=9, recycle=True))
    state = first.export()
    second.load(state)
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            tensor.zero_()
    found = []
    for memory in (first, second):
        with recycling(memory):
            found.append(hypergradient_with(A, b, CG(maxiter=9, recycle=True), return_info=True)[1])
    assert found[0].solution.equal(found[1].solution)
    assert found[0].matvecs == found[1].matvecs
    second.load({})
    assert second.export() == Memory().export()


@pytest.mark.parametrize("change", ["unknowns", "dtype", "tasks"])
def test_of_a_system_of_another_shape_nothing_is_kept(change):
    memory, fresh = Memory(), Memory()
    with recycling(memory):
        for _ in range(3):
            hypergradient_with(definite(6), data(0, 6, dtype=F64), RECYCLING)
    n, dtype = (7 if change == "unknowns" else 6), torch.float32 if change == "dtype" else F64
    A, b = definite(n, dtype=dtype), data(0, 2, n, dtype=dtype)

    def solution(b):
        return hypergradient_with(A, b, CG(recycle=True), return_info=True)[1]

    found = []
    for each in (memory, fresh):
        with recycling(each):
            found.append(torch.func.vmap(solution)(b) if change == "tasks" else solution(b[0]))
    assert found[0].solution.equal(found[1].solution)
    assert found[0].matvecs.equal(found[1].matvecs)


def test_a_preconditioner_of_the_callers_is_mapped_without_a_memory():
    """It may hold tensors of one task, so that the tasks are solved inside of the vmap."""
    A, b, memory = definite(6), data(0, 2, 6, dtype=F64), Memory()
    solver = CG(rtol=1e-8, recycle=True, preconditioner=lambda v: v / A.diagonal())

    def solution(b):
        return hypergradient_with(A, b, solver, return_info=True)[1].solution

    for _ in range(2):
        with recycling(memory):
            found = torch.func.vmap(solution)(b)
        torch.testing.assert_close(found, torch.linalg.solve(A, b.T).T)
    assert memory.export() == Memory().export()
    with recycling(memory):  # and with one where it is called by itself
        solution(b[0])
    assert memory.solution is not None
