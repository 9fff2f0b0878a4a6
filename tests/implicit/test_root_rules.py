"""`root_vjp` and `root_jvp`: the two rules by themselves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.func import grad, jacrev, jvp, vjp, vmap
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, GMRES, Exact, Root, custom_root, root_jvp, root_vjp
from tests.problems import F64, equilibrium, kepler, logistic, relative_error, ridge
from tests.quartic import LAM, LAMS, ONES, XS, C, D, X, Y, close, newton, reference, skewed, solve

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
A, B = torch.tensor([1.0, 2.0], dtype=D), torch.tensor([1.0, 3.0], dtype=D)


def test_a_symmetric_solver_is_refused_for_a_root():
    fit = custom_root(lambda w, a: w - a, solver=CG())(lambda init, a: a.clone())
    with pytest.raises(hypergrad.UnsupportedOperation, match="symmetric"):
        fit(None, A)
    fit = custom_root(hypergrad.Root(lambda w, a: w - a, symmetric=True), solver=CG())(
        lambda init, a: a.clone()
    )
    close(grad(lambda a: fit(None, a).sum())(A), torch.ones(2, dtype=D))


def test_the_rules_equal_the_derivatives_of_the_decorated_solver():
    params = newton(X, Y, LAM, 12)
    cotangent = {"w": C[:3], "b": C[3]}
    want_x, want_lam = vjp(lambda X, lam: reference(None, X, Y, lam), X, LAM)[1](cotangent)
    for solver in (None, Exact(), GMRES(rtol=1e-13)):
        found = root_vjp(skewed, params, (X, Y, LAM), cotangent, solver=solver)
        close((found[0], found[2]), (want_x, want_lam))
        close(root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=3, solver=solver), want_lam)
        found = root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=(3, 1), solver=solver)
        close(found, (want_lam, want_x))
        found = root_jvp(skewed, params, (X, Y, LAM), (ONES,), argnums=(3,), solver=solver)
        want = jvp(lambda lam: reference(None, X, Y, lam), (LAM,), (ONES,))[1]
        close(found, want)
        found, info = root_jvp(
            skewed, params, (X, Y, LAM), ONES, argnums=3, solver=solver, return_info=True
        )
        close(found, want)
        assert info.success
    for argnums in (0, 4, -1):
        with pytest.raises(ValueError, match="argnums"):
            root_vjp(skewed, params, (X, Y, LAM), cotangent, argnums=argnums)
    with pytest.raises(hypergrad.StructureMismatch, match="cotangent"):
        root_vjp(skewed, params, (X, Y, LAM), C)


def test_the_rules_may_be_mapped_and_differentiated():
    fit = custom_root(skewed)(solve)

    def by_rule(X, lam):
        params = fit(None, X, Y, lam)
        return root_vjp(skewed, params, (X, Y, lam), {"w": C[:3], "b": C[3]}, argnums=3)

    def by_reference(X, lam):
        return vjp(lambda lam: reference(None, X, Y, lam), lam)[1]({"w": C[:3], "b": C[3]})[0]

    close(vmap(by_rule)(XS, LAMS), torch.stack([by_reference(X, s) for X, s in zip(XS, LAMS)]))  # noqa: B905
    close(jacrev(by_rule, argnums=1)(X, LAM), jacrev(by_reference, argnums=1)(X, LAM))


def test_the_gradient_as_a_root_gives_what_the_objective_gives():
    for make in (ridge, logistic):
        problem = make()
        condition = Root(torch.func.grad(problem.inner), symmetric=True)
        params = problem.solve(problem.hparams)
        hypergradient = hypergrad.implicit_grad(
            problem.outer, condition, params, problem.hparams, solver=CG(rtol=1e-10)
        )
        assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-6


@pytest.mark.parametrize("make", [kepler, equilibrium])
def test_root_vjp_is_the_derivative_of_the_solution(make):
    problem = make()
    params = problem.solve(problem.hparams)
    (direct,) = torch.func.grad(lambda h: problem.outer(params, h[0]))((problem.hparams,))
    cotangent = torch.func.grad(problem.outer)(params, problem.hparams)
    (indirect,) = hypergrad.root_vjp(problem.condition, params, (problem.hparams,), cotangent)
    assert not any(leaf.requires_grad for leaf in pytree.tree_leaves(indirect))
    found = pytree.tree_map(torch.add, direct, indirect)
    assert relative_error(found, problem.hypergradient(problem.hparams)) < 1e-9


def test_root_jvp_gives_keplers_derivatives():
    problem = kepler()
    E = problem.solve(problem.hparams)
    e = problem.hparams[0]
    one, zero = torch.ones((), dtype=F64), torch.zeros((), dtype=F64)
    slope = 1 / (1 - e * torch.cos(E))
    for tangent, expected in (((zero, one), slope), ((one, zero), slope * torch.sin(E))):
        found = hypergrad.root_jvp(problem.condition, E, (problem.hparams,), (tangent,))
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("given", ["tensors", "leaves"])
def test_root_vjp_evaluates_the_condition_as_often_as_it_must(given):
    """Once to solve; once more to see what F captures, and once for a derivative of the answer."""
    calls = 0

    def F(x: Tensor, a: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return x**2 - a

    x, a = torch.full((3,), 2.0, dtype=F64), torch.full((3,), 4.0, dtype=F64)
    if given == "leaves":
        a.requires_grad_()
    (found,) = hypergrad.root_vjp(F, x, (a,), torch.ones(3, dtype=F64))
    torch.testing.assert_close(found.detach(), torch.full((3,), 0.25, dtype=F64))
    assert found.requires_grad == (given == "leaves")
    assert calls == (2 if given == "tensors" else 3)
    with torch.no_grad():
        hypergrad.root_vjp(F, x, (a,), torch.ones(3, dtype=F64))
    assert calls == (3 if given == "tensors" else 4)
