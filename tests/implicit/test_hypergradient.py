"""Hypergradients against closed forms: what the library computes is the true derivative."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, GMRES, Exact, Identity, Neumann, Status
from tests.problems import (
    EVERY,
    F64,
    TASKS,
    WELL_POSED,
    Problem,
    central_differences,
    ill_conditioned_ridge,
    imaml,
    imaml_matrices,
    kepler,
    relative_error,
    ridge,
)

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
Make = Callable[..., Problem]
SOLVERS = [
    pytest.param(Exact(), 1e-9, id="Exact"),
    pytest.param(CG(rtol=1e-10), 1e-6, id="CG"),
    pytest.param(GMRES(rtol=1e-10), 1e-6, id="GMRES"),
    pytest.param(Neumann(terms=5000, rtol=1e-10), 1e-6, id="Neumann"),
]
AT_DEFAULTS = [pytest.param(s, id=repr(s)) for s in (CG(), GMRES(), Neumann(terms=500))]


def every(problems: list[Make]) -> Any:
    return pytest.mark.parametrize("make", problems, ids=lambda make: make.__name__)


def hypergradient(problem: Problem, **options: Any) -> Any:
    params = problem.solve(problem.hparams)
    inner = problem.inner if problem.kind == "minimum" else problem.condition
    return hypergrad.implicit_grad(problem.outer, inner, params, problem.hparams, **options)


def suited(solvers: list[Any]) -> Any:
    """Every well-posed problem with every solver that is meant for its matrix."""
    pairs = []
    for make in WELL_POSED:
        for case in solvers:
            solver = case.values[0]
            if make().symmetric or not isinstance(solver, CG):
                pairs.append(pytest.param(make, *case.values, id=f"{make.__name__}-{case.id}"))
    return pairs


@every(EVERY)
def test_the_reference_agrees_with_central_differences(make):
    problem = make()
    expected = problem.hypergradient(problem.hparams)
    assert relative_error(central_differences(problem), expected) < 1e-6


@pytest.mark.parametrize(("make", "solver", "tolerance"), suited(SOLVERS))
def test_implicit_grad_gives_the_closed_form(make, solver, tolerance):
    problem = make()
    found, info = hypergradient(problem, solver=solver, return_info=True)
    assert relative_error(found, problem.hypergradient(problem.hparams)) < tolerance
    assert info.status == Status.CONVERGED
    assert info.success


@pytest.mark.parametrize(("make", "solver", "tolerance"), suited(SOLVERS))
@pytest.mark.parametrize("way", ["backward", "torch.func.grad"])
def test_the_decorators_give_the_closed_form(make, solver, tolerance, way):
    problem = make()
    fit = problem.decorated(solver=solver, on_failure="raise")

    def value(hparams):
        return problem.outer(fit(hparams), hparams)

    if way == "backward":
        leaf = pytree.tree_map(lambda t: t.clone().requires_grad_(), problem.hparams)
        value(leaf).backward()
        found = pytree.tree_map(lambda t: t.grad, leaf)
    else:
        found = torch.func.grad(value)(problem.hparams)
    assert relative_error(found, problem.hypergradient(problem.hparams)) < tolerance


@every(WELL_POSED)
def test_the_decorators_give_the_closed_form_in_forward_mode(make):
    problem = make()
    fit = problem.decorated(solver=Exact(), on_failure="raise")

    def value(hparams):
        return problem.outer(fit(hparams), hparams)

    found = torch.func.jacfwd(value)(problem.hparams)
    assert relative_error(found, problem.hypergradient(problem.hparams)) < 1e-9


@every(WELL_POSED)
def test_implicit_backward_accumulates_the_closed_form(make):
    problem = make()
    leaf = pytree.tree_map(lambda t: t.clone().requires_grad_(), problem.hparams)
    expected = problem.hypergradient(problem.hparams)
    for count in (1, 2):
        params = problem.solve(problem.hparams)
        loss = hypergrad.implicit_backward(
            problem.outer, problem.condition, params, leaf, solver=Exact()
        )
        assert loss == problem.outer(params, problem.hparams)
        assert not loss.requires_grad
        found = pytree.tree_map(lambda t, count=count: t.grad / count, leaf)
        assert relative_error(found, expected) < 1e-9


@every(WELL_POSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_defaults_are_silent_and_right_on_a_well_posed_problem(make, dtype):
    problem = make(dtype)  # a warning is an error here
    found, info = hypergradient(problem, return_info=True)
    expected = make(F64).hypergradient(make(F64).hparams)
    assert relative_error(found, expected) < (1e-9 if dtype == F64 else 2e-5)
    assert info.success
    assert all(leaf.dtype == dtype for leaf in pytree.tree_leaves(found))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("make", "solver"), suited(AT_DEFAULTS))
def test_each_solver_at_its_defaults_is_silent_on_a_well_posed_problem(make, dtype, solver):
    problem = make(dtype)
    found = hypergradient(problem, solver=solver)
    expected = make(F64).hypergradient(make(F64).hparams)
    assert relative_error(found, expected) < (1e-5 if dtype == F64 else 1e-3)


@every(WELL_POSED)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_decorators_are_silent_by_default_on_a_well_posed_problem(make, dtype):
    problem = make(dtype)
    fit = problem.decorated()
    found = torch.func.grad(lambda h: problem.outer(fit(h), h))(problem.hparams)
    expected = make(F64).hypergradient(make(F64).hparams)
    assert relative_error(found, expected) < (1e-9 if dtype == F64 else 2e-5)


def test_a_condition_number_of_nine_million_costs_exact_no_accuracy():
    problem = ill_conditioned_ridge()
    expected = problem.hypergradient(problem.hparams)
    for found in (hypergradient(problem), hypergradient(problem, solver=Exact())):
        assert relative_error(found, expected) < 1e-9


@pytest.mark.parametrize("solver", [CG(), GMRES()], ids=repr)
def test_an_iterative_answer_at_nine_million_is_right_or_says_that_it_is_not(solver):
    problem = ill_conditioned_ridge()
    found, info = hypergradient(problem, solver=solver, on_failure="ignore", return_info=True)
    expected = problem.hypergradient(problem.hparams)
    # The error of u is at most the condition number times the residual.
    bound = max(9e6 * float(info.residual_norm), 1e-6)
    assert torch.sign(found) == torch.sign(expected)
    assert relative_error(found, expected) < bound


def test_cg_solves_the_condition_number_of_nine_million_when_asked_to():
    problem = ill_conditioned_ridge()
    found, info = hypergradient(problem, solver=CG(rtol=1e-10), return_info=True)
    assert relative_error(found, problem.hypergradient(problem.hparams)) < 1e-6
    assert info.status == Status.CONVERGED


def test_each_task_of_a_batch_gets_its_own_closed_form():
    H, c, target, lam = imaml_matrices()
    problem = imaml()
    theta, phi = problem.hparams, problem.solve(problem.hparams)

    def task(H, c, target, phi):
        def inner(phi, theta):
            return phi @ H @ phi / 2 - c @ phi + lam / 2 * (phi - theta).square().sum()

        def outer(phi, theta):
            return (phi - target).square().sum() / 2

        return hypergrad.implicit_grad(outer, inner, phi, theta, return_info=True)

    found, info = torch.func.vmap(task)(H, c, target, phi)
    eye = torch.eye(4, dtype=F64)
    expected = torch.linalg.solve(eye + H / lam, (phi - target)[..., None])[..., 0]
    assert relative_error(found, expected) < 1e-9
    assert info.status.tolist() == [Status.CONVERGED] * TASKS


def test_the_identity_scaled_by_lambda_is_first_order_maml():
    problem = imaml()
    lam = imaml_matrices()[3]
    phi = problem.solve(problem.hparams)
    target = imaml_matrices()[2]
    found = hypergradient(problem, solver=Identity(scale=lam))
    assert relative_error(found, ((phi - target) / TASKS).sum(dim=0)) < 1e-12


def test_the_second_derivative_of_keplers_root_is_right():
    problem = kepler()
    fit = problem.decorated()
    e, M = problem.hparams
    E = problem.solve(problem.hparams)
    # dE/dM = 1 / (1 - e cos E), so d2E/dM2 = -e sin E / (1 - e cos E)^3.
    expected = -e * torch.sin(E) / (1 - e * torch.cos(E)) ** 3
    for transform in (torch.func.hessian, lambda f: torch.func.jacfwd(torch.func.jacfwd(f))):
        found = transform(lambda M: fit((e, M)))(M)
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


def test_the_second_derivative_of_ridge_is_right():
    problem = ridge()
    fit = problem.decorated()
    found = torch.func.hessian(lambda lam: problem.outer(fit(lam), lam))(problem.hparams)
    step = torch.tensor(1e-4, dtype=F64)
    up, down = problem.hparams + step, problem.hparams - step
    expected = (problem.hypergradient(up) - problem.hypergradient(down)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)
