"""Each function is recorded once, and nothing of a record stays alive."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch

import hypergrad
from hypergrad import CG, Neumann, implicit_grad
from tests.weighted_ridge import inner, outer, solution

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
D = torch.float64


@pytest.fixture
def h():
    return torch.tensor([0.3, 0.7, 1.1], dtype=D)


def test_each_loss_is_evaluated_once(h):
    calls = {"outer": 0, "inner": 0}

    def counted(name, fun):
        def call(*args):
            calls[name] += 1
            return fun(*args)

        return call

    for solver in (None, CG(rtol=1e-12), hypergrad.GMRES(), Neumann(terms=50)):
        calls.update(outer=0, inner=0)
        implicit_grad(
            counted("outer", outer), counted("inner", inner), solution(h), h, solver=solver
        )
        assert calls == {"outer": 1, "inner": 1}


@pytest.mark.parametrize("solver", [None, CG(), hypergrad.GMRES()])
def test_nothing_of_a_solve_stays_alive_after_it(h, solver):
    log = h.log().requires_grad_()
    w, t = solution(h), log.exp()
    seen = []

    def watched(w, t):
        value = inner(w, t)
        seen.extend([weakref.ref(w), weakref.ref(t), weakref.ref(value)])
        return value

    gc.disable()
    try:
        hypergradient, info = implicit_grad(outer, watched, w, t, solver=solver, return_info=True)
        seen += [weakref.ref(w), weakref.ref(t)]
        del w, t, watched
        alive = [ref() for ref in seen if ref() is not None]
    finally:
        gc.enable()
    assert alive == []
    assert torch.isfinite(hypergradient).all()
    assert info.success
