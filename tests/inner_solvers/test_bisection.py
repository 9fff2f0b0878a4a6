"""`Bisection`: roots entry by entry, brackets, and their derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import jacrev, vmap

import hypergrad
from hypergrad import Status
from hypergrad.inner_solvers import Bisection
from tests.problems import F64


def test_bisection_ends_at_neighbouring_numbers_entry_by_entry():
    F = lambda x, a: x**3 + x - a
    for dtype in (F64, torch.float32):
        a = torch.tensor([-2.0, 0.0, 2.0, 1e-8, 1e8], dtype=dtype)
        x, info = Bisection(-1e3, 1e3)(F, torch.zeros(5, dtype=dtype), a)
        assert x.dtype == dtype
        assert info.success
        eps = torch.finfo(dtype).eps
        wide = x.double()
        missed = (wide**3 + wide - a.double()).abs() / (3 * wide**2 + 1)
        assert (missed <= 2 * eps * wide.abs() + torch.finfo(dtype).tiny).all()
        falling, _ = Bisection(-1e3, 1e3)(lambda x, a: -F(x, a), torch.zeros_like(a), a)
        assert torch.equal(x, falling)


def test_brackets_may_be_tensors_or_functions_of_the_arguments():
    F = lambda x, a: x**2 - a
    a = torch.tensor([4.0, 9.0], dtype=F64)
    for lower, upper in ((0.0, a), (lambda a: 0 * a, lambda a: 1 + a), (0, 10)):
        x, info = Bisection(lower, upper)(F, torch.zeros_like(a), a)
        torch.testing.assert_close(x, a.sqrt())
        assert info.success
    with pytest.raises(hypergrad.StructureMismatch, match="upper has the shape"):
        Bisection(0.0, torch.ones(3))(F, torch.zeros_like(a), a)
    with pytest.raises(ValueError, match="upper must be given"):
        Bisection(0.0)


def test_a_bracket_without_a_root_is_said():
    F = lambda x, a: x - a
    a = torch.tensor([0.5, 2.0], dtype=F64)
    x, info = Bisection(0.0, 1.0)(F, torch.zeros_like(a), a)
    assert info.status == Status.BREAKDOWN
    assert not info.success
    assert torch.equal(x.isnan(), torch.tensor([False, True]))
    assert Bisection(0.0, 1.0)(F, a, a * math.nan)[1].status == Status.NOT_FINITE
    short = Bisection(0.0, 1.0, maxiter=3)(F, a[:1], a[:1] / 3)[1]
    assert short.status == Status.MAX_ITERATIONS
    loose, info = Bisection(0.0, 1.0, tol=1e-3)(F, a[:1], a[:1] / 3)
    assert info.success
    assert info.iterations < 15
    assert abs(loose / (a[:1] / 3) - 1) < 1e-3
    # An end that is the root.
    x, info = Bisection(0.0, 0.5)(F, a[:1], a[:1])
    assert info.success
    assert x == 0.5


def test_bisection_in_a_decorator_and_over_tasks():
    F = lambda x, a: x.exp() + x - a
    solver = Bisection(-50.0, 50.0)

    @hypergrad.custom_root(F)
    def solve(init, a):
        return solver(F, init, a)[0]

    a = torch.tensor([1.0, 3.0, 10.0], dtype=F64)
    x = solve(torch.zeros_like(a), a)
    slopes = torch.diag(jacrev(lambda a: solve(torch.zeros_like(a), a))(a))
    torch.testing.assert_close(slopes, 1 / (x.exp() + 1))
    one = lambda a: solver(F, torch.zeros((), dtype=F64), a)
    by_task, info = vmap(one)(a)
    torch.testing.assert_close(by_task, x)
    assert info.success.all()
