"""What the Krylov methods share: preconditioners, budgets, and what is not read."""

from __future__ import annotations

import functools
import itertools
import sys
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, GMRES, LSMR, MINRES, BiCGSTAB, NormalCG, Status
from hypergrad._pytrees import Layout, Tree
from hypergrad.solvers import LinearSystem
from tests.problems import F64, data, relative_error
from tests.systems import (
    Counting,
    definite,
    hypergradient_with,
    residual,
    spread,
    suiting,
    with_spectrum,
)

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


def _system(A: Tensor, b: Tensor, **fields: Any) -> tuple[LinearSystem, Counting]:
    one, product = b[(0,) * (b.ndim - 1)], Counting(A)
    tree = Tree("b", one)
    layout = Layout(tree, [one])
    vectors = b.ndim == 1
    matvec = product if vectors else lambda v: product(v.mT).mT
    return LinearSystem(matvec, b, layout, tree, **fields), product


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("tasks", [(), (3,)], ids=["one", "three tasks"])
@pytest.mark.parametrize("scaled", [False, True], ids=["plain", "preconditioned"])
def test_a_residual_that_cost_no_product_is_the_true_one(dtype, tasks, scaled):
    """One of matrices up to a condition of 1e8, after few steps and many, from zero and x0."""
    skipped = asked = 0
    for condition, maxiter, begun in itertools.product(
        (10, 1e3, 1e8), (1, 3, 20, 150), (False, True)
    ):
        A = with_spectrum(spread(40, 1 / condition, 1.0), dtype=dtype)
        b = data(3, *tasks, 40, dtype=dtype)
        x0 = data(4, *tasks, 40, dtype=dtype) if begun else None
        M = functools.partial(torch.mul, 1 / A.diagonal()) if scaled else None
        system, product = _system(A, b, steady=True, x0=x0, symmetric=True)
        solution = CG(maxiter=maxiter, rtol=1e-5, preconditioner=M).run(system)
        assert solution.matvecs == product.count
        if product.count > int(solution.iterations.max()) + begun:
            asked += 1
            continue
        skipped += 1
        true = b.double() - solution.x.double() @ A.double()
        off = (solution.residual.double() - true).norm(dim=-1) / true.norm(dim=-1)
        assert off.max() < 0.01
        size = true.norm(dim=-1) / b.double().norm(dim=-1)
        torch.testing.assert_close(solution.residual_norm.double(), size, rtol=0.01, atol=0)
    assert skipped >= 8
    assert asked or dtype == F64


@pytest.mark.parametrize("tasks", [(), (2,)], ids=["one", "two tasks"])
def test_where_rounding_has_spoilt_the_recursion_the_residual_is_measured(tasks):
    """At the rounding floor of an ill-conditioned system the recursion goes on falling."""
    A = with_spectrum(spread(30, 1e-6, 1.0), dtype=torch.float32)
    b = data(3, *tasks, 30, dtype=torch.float32)
    system, _ = _system(A, b, steady=True)
    solution = CG(maxiter=500, rtol=1e-7).run(system)
    true = b.double() - solution.x.double() @ A.double()
    size = true.norm(dim=-1) / b.double().norm(dim=-1)
    torch.testing.assert_close(solution.residual_norm.double(), size, rtol=0.2, atol=0)
    assert not solution.success.any()


def test_products_that_differ_from_call_to_call_have_their_residual_measured():
    A, b = with_spectrum(spread(20, 1.0, 3.0)), data(3, 20, dtype=F64)
    generator = torch.Generator().manual_seed(0)

    def noisy(v: Tensor) -> Tensor:
        return A @ v * (1 + 0.1 * torch.rand(20, generator=generator, dtype=F64))

    _, info = CG(maxiter=4).solve(noisy, b)
    assert info.matvecs == 5
    asked = data(0, 20, dtype=F64)
    _, info = hypergradient_with(A, asked, CG(maxiter=4), return_info=True)
    expected = asked - A @ info.solution
    assert info.matvecs == 4
    torch.testing.assert_close(info.residual_norm, expected.norm() / asked.norm())


def test_the_residual_of_a_long_system_is_the_true_one_whoever_made_it():
    """Long vectors are changed in place; one system is cut short, two end at the rounding floor."""
    b = data(0, 20_000, dtype=torch.float32)
    tree = Tree("b", b)

    def product(v: Tensor) -> Tensor:
        return (2 + 2**-7) * v - v.roll(1) - v.roll(-1)

    for maxiter, rtol in ((5, None), (1000, 1e-5), (1000, 1e-6), (1000, 1e-7)):
        system = LinearSystem(product, b, Layout(tree, [b]), tree, steady=True, symmetric=True)
        solution = CG(maxiter=maxiter, rtol=rtol).run(system)
        true = b.double() - product(solution.x.double())
        off = (solution.residual.double() - true).norm() / b.double().norm()
        assert off < 3e-6
        assert solution.residual_norm < (1e-4 if rtol else 1)
        assert float(solution.residual_norm) == pytest.approx(
            float(true.norm() / b.double().norm()), abs=3e-6
        )
