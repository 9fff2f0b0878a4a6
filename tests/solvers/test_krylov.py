"""What the Krylov methods share: preconditioners, budgets, and what is not read."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, GMRES, LSMR, MINRES, BiCGSTAB, NormalCG, Status
from tests.problems import F64, data, relative_error
from tests.systems import definite, hypergradient_with, residual, suiting

KRYLOV = [CG, GMRES]


@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_works_on_pytrees(method):
    d = {"a": torch.logspace(0, 5, 6, dtype=F64), "b": torch.tensor(1e3, dtype=F64)}
    b = pytree.tree_map(torch.ones_like, d)

    def product(v: dict[str, Tensor]) -> dict[str, Tensor]:
        return pytree.tree_map(torch.mul, d, v)

    def inverse(v: dict[str, Tensor]) -> dict[str, Tensor]:
        assert v["b"].shape == ()
        return pytree.tree_map(lambda v, d: v / d, v, d)

    plain = method(rtol=1e-8).solve(product, b)[1]
    x, info = method(rtol=1e-8, preconditioner=inverse).solve(product, b)
    torch.testing.assert_close(x, pytree.tree_map(torch.reciprocal, d), rtol=1e-7, atol=0)
    assert info.iterations == 1
    assert plain.iterations > 1


@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_of_another_structure_is_refused(method):
    b = {"a": torch.ones(2, dtype=F64)}
    solver = method(preconditioner=lambda v: v["a"])
    with pytest.raises(hypergrad.StructureMismatch, match="preconditioner"):
        solver.solve(lambda v: v, b)


@pytest.mark.parametrize("method", KRYLOV)
@pytest.mark.parametrize("condition", [1e7, 1e8, 1e9])
def test_success_is_never_claimed_for_an_answer_that_is_no_better_than_none(method, condition):
    A, b = definite(50, condition=condition, dtype=torch.float32), data(19, 50, dtype=torch.float32)
    x, info = method().solve(lambda v: A @ v, b)
    true = residual(A.to(F64), x.to(F64), b.to(F64))
    assert not info.success or true < 0.1
    if info.status == Status.STAGNATED:  # the best iterate: zero has a residual of one
        assert true < 1 + 1e-5


@pytest.mark.parametrize("method", KRYLOV)
def test_a_preconditioner_is_mapped_over_the_tasks_of_a_hypergradient(method):
    d = torch.stack([torch.logspace(0, k, 6, dtype=F64) for k in (1, 3, 5)])
    solver = method(rtol=1e-8, preconditioner=lambda v: v / d[1])

    def task(d: Tensor) -> Any:
        return hypergradient_with(d.diag(), torch.ones(6, dtype=F64), solver, return_info=True)

    found, info = torch.func.vmap(task)(d)
    torch.testing.assert_close(found, torch.ones(3, 6, dtype=F64), rtol=1e-4, atol=0)
    assert info.iterations[1] == 1


NEW = [MINRES, BiCGSTAB, NormalCG, LSMR]
ITERATIVE = [CG, GMRES, *NEW]
each_new = pytest.mark.parametrize("method", NEW, ids=lambda m: m.__name__)
each = pytest.mark.parametrize("method", ITERATIVE, ids=lambda m: m.__name__)


@each_new
def test_without_looks_nothing_is_read_from_the_device(method, monkeypatch):
    A, b = suiting(CG, 12), data(5, 12, dtype=F64)

    def refuse(flag: Tensor) -> bool:
        raise AssertionError("the host looked")

    theta = torch.ones_like(b)
    expected = A @ torch.linalg.solve(A, b)
    for name, module in list(sys.modules.items()):
        if name.startswith("hypergrad.solvers.") and hasattr(module, "any_task"):
            monkeypatch.setattr(module, "any_task", refuse)
    hypergradient = hypergrad.implicit_grad(
        lambda w, t: b @ w,
        lambda w, t: (w - t) @ A @ (w - t) / 2,
        theta.clone(),
        theta,
        solver=method(maxiter=30, rtol=0.0),
        on_failure="ignore",
    )
    assert relative_error(hypergradient, expected) < 1e-6


@each
def test_right_hand_sides_that_share_a_matrix_share_the_products_of_a_step(method):
    n, calls = 20, []
    A, t = suiting(CG, n), data(43, n, dtype=F64)

    @hypergrad.custom_argmin(
        lambda w, t: (w - t) @ A @ (w - t) / 2, solver=method(rtol=1e-10), callback=calls.append
    )
    def fit(init: None, t: Tensor) -> Tensor:
        return t.clone()

    found = torch.func.jacrev(lambda t: fit(None, t))(t)
    torch.testing.assert_close(found, torch.eye(n, dtype=F64), rtol=0, atol=1e-8)
    (info,) = calls
    assert info.iterations.shape == (n,)
    products = 2 if method in (BiCGSTAB, NormalCG, LSMR) else 1
    around = 13  # products that look for negative curvature, which these methods do not see
    assert info.matvecs[0] <= products * (info.iterations.max() + 3) + 2 + around
