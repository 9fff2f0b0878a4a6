"""Where a solution has no single derivative: the choice, and that it is said."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch.func import grad, jacfwd, vmap
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import (
    GMRES,
    KKT,
    ProjectedGradient,
    ProximalGradient,
    implicit_grad,
    projections,
    prox,
)
from tests.constrained import EVERY, inequality_qp, quadratic, regression
from tests.problems import F64, data, relative_error

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def at_kink(kind):
    """A problem at a kink in its one hyperparameter: its slope that is chosen, and the other."""
    half = lambda x, t: ((x - t * torch.tensor([1.0, 2.0], dtype=F64)) ** 2).sum() / 2
    one = torch.ones((), dtype=F64)
    total = lambda x, t: x.sum()
    if kind == "lasso":  # t = 1 is the penalty at which the first entry becomes zero
        condition = ProximalGradient(half, lambda v, s, t: prox.l1(v, s, 1.0), 0.5)
        return total, condition, torch.tensor([0.0, 1.0], dtype=F64), one, (2.0, 3.0)
    if kind == "box":
        condition = ProjectedGradient(half, lambda v, t: projections.box(v, 0.0, 1.0), 0.5)
        return total, condition, torch.tensor([1.0, 1.0], dtype=F64), one, (0.0, 1.0)
    if kind == "simplex":  # (t, 2 t): the first entry joins the support below t = 1
        condition = ProjectedGradient(half, lambda v, t: projections.simplex(v), 1.0)
        pick = lambda x, t: x[1] - x[0]
        return pick, condition, torch.tensor([0.0, 1.0], dtype=F64), one, (0.0, 1.0)
    if kind == "ball":  # of the radius sqrt(5), which t = 1 touches from inside
        condition = ProjectedGradient(half, lambda v, t: projections.l2_ball(v, 5**0.5), 0.5)
        return total, condition, torch.tensor([1.0, 2.0], dtype=F64), one, (0.0, 3.0)
    if kind == "group lasso":
        shrink = lambda v, s, t: prox.group_lasso(v, s, 5**0.5)
        condition = ProximalGradient(half, shrink, 0.5)
        return total, condition, torch.zeros(2, dtype=F64), one, (0.0, 3.0)
    condition = KKT(half, inequalities=lambda x, t: x[0] - 1)
    params = torch.tensor([1.0, 2.0], dtype=F64), None, torch.zeros((), dtype=F64)
    return lambda p, t: p[0].sum(), condition, params, one, (3.0, 2.0)


KINKS = ["lasso", "box", "simplex", "ball", "group lasso", "kkt"]


@pytest.mark.parametrize("kind", KINKS[:-1])
def test_the_solution_has_these_slopes_on_its_sides(kind):
    outer, condition, params, t, slopes = at_kink(kind)
    _, outer_map = condition.outer_map

    def value(t):
        x, info = hypergrad.inner_solvers.FISTA(outer_map, tol=1e-12)(condition.f, params, t)
        assert info.success
        return outer(x, t)

    step = 1e-4
    left = float(value(t) - value(t - step)) / step
    right = float(value(t + step) - value(t)) / step
    assert sorted([left, right]) == pytest.approx(sorted(slopes), abs=1e-3)


@pytest.mark.parametrize("kind", KINKS)
def test_at_a_kink_the_answer_is_that_of_one_side_and_it_is_said(kind):
    outer, condition, params, t, (chosen, _) = at_kink(kind)
    with pytest.warns(hypergrad.ConvergenceWarning, match="sits at a kink") as caught:
        hypergradient, info = implicit_grad(outer, condition, params, t, return_info=True)
    assert len(caught) == 1
    assert info.degeneracy > 0.1
    assert not info.success
    torch.testing.assert_close(hypergradient, torch.tensor(chosen, dtype=F64), rtol=1e-9, atol=1e-9)
    with pytest.raises(hypergrad.NotDifferentiable, match=re.escape("info.degeneracy")):
        implicit_grad(outer, condition, params, t, on_failure="raise")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        implicit_grad(outer, condition, params, t, on_failure="ignore")


def test_a_kink_is_named_where_the_linear_solve_had_a_budget():
    _, condition, params, t, _ = at_kink("lasso")
    mixed = lambda x, t: (x * torch.tensor([1.0, 0.3], dtype=F64)).sum()
    with pytest.warns(hypergrad.ConvergenceWarning, match="sits at a kink"):
        implicit_grad(mixed, condition, params, t, solver=GMRES(maxiter=1))


@pytest.mark.parametrize("kind", KINKS)
def test_a_kink_is_seen_in_the_decorators_in_both_directions(kind):
    outer, condition, params, t, _ = at_kink(kind)

    @hypergrad.custom_argmin(condition)
    def fit(init, t):
        return params

    for derive in (grad, jacfwd):
        with pytest.warns(hypergrad.ConvergenceWarning, match="sits at a kink"):
            derive(lambda t: outer(fit(None, t), t))(t)


@pytest.mark.parametrize("make", EVERY, ids=lambda make: make.__name__)
def test_a_kink_within_the_error_of_the_solver_is_seen(make):
    # Next to a solution whose last digits are missing, nothing is said of kinks that are far.
    problem = make()
    shift = lambda leaf: None if leaf is None else leaf * (1 + 1e-7)
    params = pytree.tree_map(shift, problem.solve(problem.hparams))
    _, info = implicit_grad(
        problem.outer, problem.condition, params, problem.hparams, return_info=True
    )
    assert info.degeneracy < 1e-4
    # At a kink that the same error has moved a little, it is.
    outer, condition, params, t, _ = at_kink("lasso")
    for sign in (1, -1):
        moved = params + sign * torch.tensor([1e-8, 1e-7], dtype=F64)
        with pytest.warns(hypergrad.ConvergenceWarning, match="kink"):
            implicit_grad(outer, condition, moved, t)


def test_a_kink_that_does_not_matter_is_not_warned_of():
    # A feature that is zero in all samples leaves its weight at the bound, without any force.
    X = data(70, 20, 3, dtype=F64)
    X[:, 2] = 0
    y = X.sum(dim=1)
    f = lambda w, lam: (X @ w - y).square().sum() / 2 + lam * w[:2].square().sum()
    condition = ProjectedGradient(f, lambda v, lam: projections.non_negative(v), 0.02)
    lam = torch.tensor(0.5, dtype=F64)
    A = X[:, :2].T @ X[:, :2] + 2 * lam * torch.eye(2)
    w = torch.cat([torch.linalg.solve(A, X[:, :2].T @ y), torch.zeros(1, dtype=F64)])
    hypergradient = implicit_grad(lambda w, lam: (X @ w).square().sum(), condition, w, lam)
    g = 2 * X[:, :2].T @ X[:, :2] @ w[:2]
    torch.testing.assert_close(
        hypergradient, -g @ torch.linalg.solve(A, 2 * w[:2]), rtol=1e-9, atol=0
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_sees_no_kinks_that_are_far(dtype):
    y = torch.tensor([2.0, -1.5, 0.25], dtype=dtype)
    lam = torch.tensor(1.0, dtype=dtype)
    condition = ProximalGradient(lambda w, lam: ((w - y) ** 2).sum() / 2, prox.l1, 0.5)
    w = torch.tensor([1.0, -0.5, 0.0], dtype=dtype)
    hypergradient, info = implicit_grad(
        lambda w, lam: w[0] + 3 * w[1], condition, w, lam, return_info=True
    )
    assert info.degeneracy == 0
    assert hypergradient.dtype == dtype
    torch.testing.assert_close(hypergradient, torch.tensor(2.0, dtype=dtype))


def test_one_task_at_a_kink_does_not_disturb_the_others():
    outer, condition, params, t, _ = at_kink("lasso")
    ts = torch.stack([t, 2 * t, 3 * t])
    points = torch.stack([params, torch.tensor([1.0, 3.0]), torch.tensor([2.0, 5.0])])

    def one(x, t):
        return implicit_grad(outer, condition, x, t, return_info=True)

    with pytest.warns(hypergrad.ConvergenceWarning, match="1 of 3 tasks: params sits at a kink"):
        found, info = vmap(one)(points.to(F64), ts)
    torch.testing.assert_close(found, torch.tensor([2.0, 3.0, 3.0], dtype=F64))
    assert info.success.tolist() == [False, True, True]


def test_smooth_conditions_know_nothing_of_kinks():
    half = torch.tensor(0.5)
    _, info = implicit_grad(lambda w, h: w, lambda w, h: (w - h) ** 2, half, half, return_info=True)
    assert torch.isnan(info.degeneracy)
    assert info.success


def test_dependent_constraints_are_said():
    H, c, _ = regression()
    row = data(71, 6, dtype=F64)
    twice = torch.stack([row, 2 * row])
    condition = KKT(
        lambda x, t: quadratic(H, c)(x),
        equalities=lambda x, t: twice @ x - t * torch.tensor([1.0, 2.0]),
    )
    t = torch.ones((), dtype=F64)
    K = torch.cat([torch.cat([H, row[:, None]], 1), torch.cat([row, torch.zeros(1)])[None]])
    z = torch.linalg.solve(K, torch.cat([c, t[None]]))
    params = z[:6], torch.stack([z[6], torch.zeros((), dtype=F64)]), None
    outer = lambda p, t: p[0].sum()
    with pytest.warns(hypergrad.ConvergenceWarning, match="LICQ"):
        hypergradient, info = implicit_grad(outer, condition, params, t, return_info=True)
    assert torch.isinf(info.degeneracy)
    # These say the same wherever t goes, so the derivative of x is right all the same.
    u = torch.linalg.solve(K, torch.cat([torch.ones(6, dtype=F64), torch.zeros(1)]))
    torch.testing.assert_close(hypergradient, u[6], rtol=1e-6, atol=0)
    with pytest.raises(hypergrad.SingularHessian, match="linearly dependent"):
        implicit_grad(outer, condition, params, t, on_failure="raise")


def test_dependent_constraints_that_are_not_active_are_no_fault():
    problem = inequality_qp()
    x, nu, lam = problem.solve(problem.hparams)
    idle = int((lam == 0).nonzero()[0])
    g = problem.condition.inequalities
    condition = KKT(
        problem.condition.f,
        problem.condition.equalities,
        lambda x, h: torch.cat([g(x, h), g(x, h)[idle : idle + 1]]),
    )
    params = x, nu, torch.cat([lam, torch.zeros(1, dtype=F64)])
    hypergradient = implicit_grad(problem.outer, condition, params, problem.hparams)
    assert relative_error(hypergradient, problem.hypergradient(problem.hparams)) < 1e-9


def test_a_kink_where_all_parameters_are_zero_is_said():
    """Non-negative least squares of a signal that is zero: the solution moves to one side alone."""
    A = torch.rand(8, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fit = hypergrad.argmin(
        lambda w, y: ((A @ w - y) ** 2).sum() / 2,
        project=lambda v: hypergrad.projections.non_negative(v),
        on_failure="raise",
    )
    y = torch.zeros(8, dtype=torch.float64)
    with pytest.raises(hypergrad.NotDifferentiable):
        torch.func.grad(lambda y: fit(torch.zeros(3, dtype=y.dtype), y).sum())(y)
