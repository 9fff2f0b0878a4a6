"""The inner solvers: right, stopped in time, honest about how they ended, one status a task."""

from __future__ import annotations

import dataclasses
import math
import warnings

import numpy as np
import pytest
import torch
from scipy.optimize import minimize
from torch.func import grad, vmap
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import Status, implicit_grad, inner_solvers, projections, prox
from hypergrad.inner_solvers import FISTA, LBFGS, Anderson, GradientDescent, Nesterov, NewtonCG
from hypergrad.inner_solvers._lbfgs import _two_loops
from tests.constrained import box_qp, elastic_net, lasso
from tests.problems import F64, data, equilibrium, logistic, relative_error, ridge

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
SMOOTH = [GradientDescent(), Nesterov(), LBFGS(), NewtonCG()]
EVERY = [*SMOOTH, FISTA(lambda v, step, *args: v)]
OF_EVERY = pytest.mark.parametrize("solver", EVERY, ids=lambda s: type(s).__name__)
OF_SMOOTH = pytest.mark.parametrize("solver", SMOOTH, ids=lambda s: type(s).__name__)

STEEP = torch.logspace(0, 2, 12, dtype=F64)


def bowl(x, centre):
    """A quadratic of condition number 100."""
    return (STEEP.to(x) * (x - centre) ** 2).sum() / 2


# The answer


@DTYPES
@OF_EVERY
def test_the_minimum_of_a_quadratic_is_found(solver, dtype):
    centre = data(100, 12, dtype=dtype)
    x, info = solver(bowl, torch.zeros(12, dtype=dtype), centre)
    error = relative_error(x, centre)
    assert info.success
    assert x.dtype == dtype
    assert error < (1e-6 if dtype == F64 else 1e-3)
    # The estimate is that of the error.
    assert error / 30 < info.inner_residual < 30 * error + 1e-8


@DTYPES
@OF_SMOOTH
@pytest.mark.parametrize("make", [ridge, logistic], ids=lambda make: make.__name__)
def test_a_solved_problem_is_silent_and_right_in_implicit_grad(solver, make, dtype):
    problem = make(dtype)
    reference = problem.solve(problem.hparams)
    x, solved = solver(problem.inner, torch.zeros_like(reference), problem.hparams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found, info = implicit_grad(
            problem.outer, problem.inner, x, problem.hparams, return_info=True
        )
    assert solved.success
    assert info.inner_residual < (1e-6 if dtype == F64 else 1e-3)
    expected = problem.hypergradient(problem.hparams)
    assert relative_error(found, expected) < (1e-6 if dtype == F64 else 2e-3)


@OF_EVERY
def test_a_curved_valley_is_followed(solver):
    flatter = lambda x: (1 - x[0]) ** 2 + 5 * (x[1] - x[0] ** 2) ** 2
    x, info = solver(flatter, torch.tensor([-1.2, 1.0], dtype=F64))
    assert info.success
    torch.testing.assert_close(x, torch.ones(2, dtype=F64), rtol=1e-5, atol=0)


@pytest.mark.parametrize("seed", range(3))
def test_the_minimum_is_that_of_scipy(seed):
    X, y = data(110 + seed, 30, 6, dtype=F64), data(120 + seed, 30, dtype=F64)
    f = lambda w: torch.log(torch.cosh(X @ w - y)).sum() + w.square().sum() / 10

    def with_gradient(w):
        w = torch.from_numpy(w)
        return float(f(w)), grad(f)(w).numpy()

    expected = minimize(with_gradient, np.zeros(6), jac=True, method="BFGS", tol=1e-10).x
    for solver in SMOOTH:
        x, info = solver(f, torch.zeros(6, dtype=F64))
        assert info.success
        torch.testing.assert_close(x, torch.from_numpy(expected), rtol=1e-6, atol=1e-7)


def test_lbfgs_needs_about_as_many_evaluations_as_scipys():
    def with_gradient(x):
        with_gradient.calls += 1
        x = torch.from_numpy(x)
        return float(bowl(x, 1.0)), grad(bowl)(x, 1.0).numpy()

    with_gradient.calls = 0
    options = {"ftol": 0.0, "gtol": 1e-6, "maxfun": 10_000}
    minimize(with_gradient, np.zeros(12), jac=True, method="L-BFGS-B", options=options)
    _, info = LBFGS()(bowl, torch.zeros(12, dtype=F64), 1.0)
    assert info.evaluations < 2 * with_gradient.calls


def test_acceleration_pays_where_the_condition_number_is_large():
    step = 1 / float(STEEP.max())
    counts = {}
    for solver in (GradientDescent, Nesterov):
        _, info = solver(step_size=step, tol=1e-5)(bowl, torch.zeros(12, dtype=F64), 1.0)
        assert info.success
        counts[solver] = int(info.iterations)
    assert counts[Nesterov] < counts[GradientDescent] / 4  # sqrt(100) is 10


@DTYPES
@pytest.mark.parametrize("make", [lasso, elastic_net, box_qp], ids=lambda make: make.__name__)
def test_fista_solves_what_its_condition_says(make, dtype):
    problem = make(dtype)
    condition = problem.condition
    _, outer_map = condition.outer_map
    expected = problem.solve(problem.hparams)
    x, solved = FISTA(outer_map)(condition.f, torch.zeros_like(expected), problem.hparams)
    assert solved.success
    assert relative_error(x, expected) < (1e-6 if dtype == F64 else 1e-3)
    assert torch.equal(x == 0, expected == 0)  # exact zeros
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = implicit_grad(problem.outer, condition, x, problem.hparams)
    assert relative_error(found, problem.hypergradient(problem.hparams)) < (
        1e-5 if dtype == F64 else 1e-3
    )


@pytest.mark.parametrize("history", [0, 1, 5])
@DTYPES
def test_anderson_finds_a_deep_equilibrium(history, dtype):
    problem = equilibrium(dtype)
    z, info = Anderson(history)(problem.inner, torch.zeros(3, 4, dtype=dtype), problem.hparams)
    assert info.success
    expected = problem.solve(problem.hparams)
    assert relative_error(z, expected) < (1e-7 if dtype == F64 else 1e-4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = implicit_grad(problem.outer, problem.condition, z, problem.hparams)
    expected = problem.hypergradient(problem.hparams)
    assert relative_error(found, expected) < (1e-6 if dtype == F64 else 1e-3)


def test_anderson_needs_no_contraction_and_fewer_evaluations():
    M = data(130, 8, 8, dtype=F64)
    M = 0.99 * (M + M.T) / 2 / torch.linalg.matrix_norm((M + M.T) / 2, 2)
    b = data(131, 8, dtype=F64)
    expected = torch.linalg.solve(torch.eye(8, dtype=F64) - M, b)
    affine = lambda x: M @ x + b
    x, info = Anderson()(affine, torch.zeros(8, dtype=F64))
    _, plain = Anderson(history=0)(affine, torch.zeros(8, dtype=F64))
    assert relative_error(x, expected) < 1e-7
    assert info.evaluations < plain.evaluations / 10
    x, info = Anderson(8)(lambda x: 3 * M @ x + b, torch.zeros(8, dtype=F64))
    assert info.success
    expected = torch.linalg.solve(torch.eye(8, dtype=F64) - 3 * M, b)
    assert relative_error(x, expected) < 1e-6


def test_the_equilibrium_is_differentiated_as_its_iteration_is():
    problem = equilibrium()
    x = data(20, 3, 2, dtype=F64)

    def layer(z, W, U, b):
        return torch.tanh(z @ W.T + x @ U.T + b)

    fit = hypergrad.custom_fixed_point(layer)(lambda z, *args: Anderson()(layer, z, *args)[0])
    start, args = torch.zeros(3, 4, dtype=F64), tuple(problem.hparams.values())

    def unrolled(*args):
        z = start
        for _ in range(150):
            z = layer(z, *args)
        return z

    value = lambda solve: lambda *args: problem.outer(solve(*args), problem.hparams)
    places = (0, 1, 2)
    found = grad(value(lambda *args: fit(start, *args)), places)(*args)
    assert relative_error(found, grad(value(unrolled), places)(*args)) < 1e-6


# Structures and compositions


@OF_EVERY
def test_a_pytree_keeps_its_structure_dtypes_and_constants(solver):
    init = {"a": torch.zeros(2, dtype=F64), "b": [torch.zeros(()), None], "n": torch.tensor([3])}
    before = pytree.tree_map(lambda t: None if t is None else t.clone(), init)

    def f(p, c):
        return ((p["a"] - c) ** 2).sum() + (p["b"][0] - p["n"][0]) ** 2

    x, info = solver(f, init, torch.ones(2, dtype=F64))
    assert info.success
    assert pytree.tree_structure(x) == pytree.tree_structure(init)
    assert x["b"][0].dtype == torch.float32
    torch.testing.assert_close(x["a"], torch.ones(2, dtype=F64), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x["b"][0], torch.tensor(3.0), rtol=1e-4, atol=0)
    assert x["b"][1] is None
    assert torch.equal(init["a"], before["a"])
    assert not x["a"].requires_grad


@OF_EVERY
def test_every_task_of_a_batch_stops_by_itself(solver):
    # From the solution itself to a task that is steeper and farther away than the others.
    steep = torch.tensor([[1.0, 1, 1], [1, 2, 3], [1, 7, 20]], dtype=F64)
    centres = torch.stack([torch.zeros(3), torch.ones(3), 100 * data(101, 3, dtype=F64)])

    def one(centre, steep):
        f = lambda x, steep: (steep * (x - centre) ** 2).sum() / 2
        return solver(f, torch.zeros(3, dtype=F64), steep)

    centres = centres.to(F64)
    x, info = vmap(one)(centres, steep)
    alone = [one(c, s) for c, s in zip(centres, steep, strict=True)]
    assert info.success.tolist() == [True] * 3
    assert info.iterations[0] == 0
    for k, (params, figures) in enumerate(alone):
        assert info.status[k] == figures.status
        # A rounding may decide on the last step.
        assert abs(int(info.iterations[k]) - int(figures.iterations)) <= 2
        assert abs(int(info.evaluations[k]) - int(figures.evaluations)) <= 8
        torch.testing.assert_close(x[k], params, rtol=1e-6, atol=1e-7)
    assert info.iterations[1] <= info.iterations[2]


@OF_EVERY
def test_a_task_that_has_stopped_stays_where_it_is(solver):
    # Far from its minimum, so that any further step would be seen.
    rough = dataclasses.replace(solver, tol=0.03)
    steep = torch.tensor([[1.0, 1.5, 2], [1, 7, 20]], dtype=F64)
    starts = torch.tensor([[0.9, 1.05, 1.0], [30.0, -20.0, 5.0]], dtype=F64)

    def one(start, steep):
        return rough(lambda x: (steep * (x - 1) ** 2).sum() / 2 + ((x - 1) ** 4).sum(), start)

    x, info = vmap(one)(starts, steep)
    alone, figures = one(starts[0], steep[0])
    assert info.iterations[0] == figures.iterations < info.iterations[1]
    torch.testing.assert_close(x[0], alone, rtol=1e-12, atol=0)
    torch.testing.assert_close(info.residual_norm[0], figures.residual_norm, rtol=1e-9, atol=0)


def test_the_two_loops_are_the_bfgs_update():
    H = 0.7 * torch.eye(5, dtype=F64)
    memory = []
    for k in range(4):
        s, y = data(150 + k, 5, dtype=F64), data(160 + k, 5, dtype=F64)
        y = y * torch.sign(s @ y)
        weight = 1 / (s @ y)
        V = torch.eye(5, dtype=F64) - weight * torch.outer(y, s)
        H = V.T @ H @ V + weight * torch.outer(s, s)
        memory.append((s, y, weight))
    g = data(170, 5, dtype=F64)
    found = _two_loops(memory, torch.tensor(0.7, dtype=F64), g)
    torch.testing.assert_close(found, H @ g, rtol=1e-12, atol=1e-12)


def test_anderson_in_a_batch_is_anderson_one_by_one():
    problem = equilibrium()
    starts = data(132, 4, 3, 4, dtype=F64)
    scales = torch.tensor([0.0, 0.5, 1.0, 1.2], dtype=F64)

    def one(z, scale):
        T = lambda z, h: problem.inner(z, {**h, "W": scale * h["W"]})
        return Anderson()(T, z, problem.hparams)

    z, info = vmap(one)(starts, scales)
    for k in range(4):
        alone, alone_info = one(starts[k], scales[k])
        torch.testing.assert_close(z[k], alone, rtol=1e-7, atol=1e-9)
        assert info.iterations[k] == alone_info.iterations


@OF_SMOOTH
def test_one_bad_task_does_not_disturb_the_others(solver):
    def one(c):
        f = lambda x: bowl(x, c) + torch.where(c > 1.5, math.nan, 0.0)
        return solver(f, torch.zeros(12, dtype=F64))

    x, info = vmap(one)(torch.tensor([1.0, 2.0, 0.5], dtype=F64))
    assert info.status.tolist() == [Status.CONVERGED, Status.NOT_FINITE, Status.CONVERGED]
    assert info.success.tolist() == [True, False, True]
    torch.testing.assert_close(x[0], torch.ones(12, dtype=F64), rtol=1e-5, atol=0)
    assert torch.isfinite(x).all()


@OF_SMOOTH
@pytest.mark.parametrize("batching", ["vmap", "loop"])
def test_inside_a_decorated_function_under_vmap_and_grad(solver, batching):
    problem = ridge()

    @hypergrad.custom_argmin(problem.inner, batching=batching, has_aux=True)
    def fit(init, lam):
        return solver(problem.inner, init, lam)

    lams = torch.tensor([1.0, 2.0, 5.0], dtype=F64)
    start = torch.zeros(5, dtype=F64)

    def value(lam):
        w, info = fit(start, lam)
        return problem.outer(w, lam), info

    found, info = vmap(grad(value, has_aux=True))(lams)
    assert info.success.tolist() == [True] * 3
    expected = torch.stack([problem.hypergradient(lam) for lam in lams])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("captured", [True, False])
@pytest.mark.parametrize("solver", [*EVERY, Anderson()], ids=lambda s: type(s).__name__)
def test_the_derivative_of_the_iterations_is_refused(solver, captured):
    def fun(x, c):
        return x / 2 + c if isinstance(solver, Anderson) else ((x - c) ** 2).sum()

    def value(c):
        f = (lambda x: fun(x, c)) if captured else fun
        x, _ = solver(f, torch.zeros(2, dtype=F64), *(() if captured else (c,)))
        return x.sum()

    one = torch.ones((), dtype=F64)
    with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
        grad(value)(one)
    with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
        torch.func.jvp(value, (one,), (one,))
    # Under plain autograd the answer is detached, as it says itself.
    assert not value(one.clone().requires_grad_()).requires_grad


def test_a_derivative_by_the_step_or_by_what_a_prox_captures_is_refused():
    f, start, one = lambda x: (x - 3).square().sum(), torch.zeros(2, dtype=F64), torch.ones(())
    by_step = lambda s: GradientDescent(step_size=s)(f, start)[0].sum()
    by_penalty = lambda t: FISTA(lambda v, s: prox.l1(v, s, t))(f, start)[0].sum()
    for value in (by_step, by_penalty):
        with pytest.raises(hypergrad.UnsupportedOperation, match="custom_argmin"):
            grad(value)(0.1 * one)
        assert not value((0.1 * one).requires_grad_()).requires_grad


# How it ended


@OF_EVERY
def test_a_start_at_the_solution_costs_one_evaluation(solver):
    x, info = solver(bowl, torch.ones(12, dtype=F64), 1.0)
    assert torch.equal(x, torch.ones(12, dtype=F64))
    assert info.iterations == 0
    assert info.inner_residual == 0
    assert info.status == Status.CONVERGED


@OF_EVERY
@DTYPES
def test_a_warm_start_ends_at_once(solver, dtype):
    centre = data(102, 12, dtype=dtype)
    first, cold = solver(bowl, torch.zeros(12, dtype=dtype), centre)
    _, warm = solver(bowl, first, centre)
    assert warm.success
    assert warm.evaluations < 0.7 * cold.evaluations


@OF_EVERY
def test_iterations_that_run_out_are_said(solver):
    short = dataclasses.replace(solver, maxiter=2)
    _, info = short(lambda x: bowl(x, 1.0) + (x**4).sum(), torch.zeros(12, dtype=F64))
    assert info.status == Status.MAX_ITERATIONS
    assert not info.success
    assert info.iterations == 2


@OF_EVERY
def test_an_objective_without_a_minimum_is_no_success(solver):
    quick = dataclasses.replace(solver, maxiter=200)
    for f in (lambda x: x.sum(), lambda x: -(x**4).sum() + x.sum()):
        x, info = quick(f, torch.zeros(3, dtype=F64))
        assert not info.success
        assert info.status in (Status.DIVERGED, Status.MAX_ITERATIONS)
        assert torch.isfinite(x).all()


@pytest.mark.parametrize("solver", [GradientDescent, Nesterov])
def test_a_step_that_is_too_long_diverges_and_says_so(solver):
    _, info = solver(step_size=0.1)(bowl, torch.zeros(12, dtype=F64), 1.0)
    assert info.status == Status.DIVERGED
    assert not info.success


def test_a_map_that_does_not_contract_diverges_and_says_so():
    x, info = Anderson(history=0)(lambda x: 2 * x + 1, torch.zeros(2, dtype=F64))
    assert info.status == Status.DIVERGED
    assert torch.isfinite(x).all()


@OF_EVERY
def test_nan_at_the_start_and_on_the_way_is_said(solver):
    start = torch.ones(2, dtype=F64)
    _, info = solver(lambda x: x.sum() * math.nan, start)
    assert info.status == Status.NOT_FINITE
    # -log x, which is NaN below zero, on the way to its minimum at 1 from far to the right.
    f = lambda x: (x - torch.log(x)).sum()
    x, info = solver(f, 50 * start)
    assert info.success or info.status == Status.NOT_FINITE
    if info.success:
        torch.testing.assert_close(x, start, rtol=1e-6, atol=0)


def test_anderson_says_nan():
    _, info = Anderson()(lambda x: x / 0, torch.zeros(2, dtype=F64))
    assert info.status == Status.NOT_FINITE
    assert not info.success


@pytest.mark.parametrize("solver", SMOOTH, ids=lambda s: type(s).__name__)
def test_a_tolerance_below_rounding_stagnates_and_is_no_success(solver):
    # A full matrix, so that the gradient never is exactly zero.
    Q = torch.linalg.qr(data(103, 12, 12, dtype=F64)).Q
    H, c = ((Q * STEEP) @ Q.T).float(), data(104, 12, dtype=torch.float32)
    f = lambda x: x @ H @ x / 2 - c @ x
    _, info = dataclasses.replace(solver, tol=1e-12)(f, torch.zeros(12))
    assert info.status in (Status.STAGNATED, Status.MAX_ITERATIONS)
    assert not info.success
    _, info = solver(f, torch.zeros(12))  # at the default the floor is good enough
    assert info.success


def test_a_leaf_that_the_objective_does_not_use_is_named():
    init = {"used": torch.zeros(2), "spare": torch.zeros(2)}
    for solver in SMOOTH:
        with pytest.raises(hypergrad.NotConnected, match=r"init\['spare'\]"):
            solver(lambda p: (p["used"] - 1).square().sum(), init)
        with pytest.raises(hypergrad.NotConnected, match="does not depend on"):
            solver(lambda p: p["used"].detach().sum() * 0, {"used": torch.zeros(2)})


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: GradientDescent(step_size=0.0), "step_size must be positive"),
        (lambda: Nesterov(maxiter=0), "maxiter must be at least 1"),
        (lambda: LBFGS(history=0), "history must be at least 1"),
        (lambda: NewtonCG(cg_rtol=-1.0), "cg_rtol must be at least 0"),
        (lambda: Anderson(mixing=0.0), "mixing must be above 0"),
        (lambda: FISTA(prox.l1, tol=-1.0), "tol must be at least 0"),
    ],
)
def test_values_that_mean_nothing_are_refused(make, words):
    with pytest.raises(ValueError, match=words):
        make()


@pytest.mark.parametrize("solver", [*EVERY, Anderson()], ids=lambda s: type(s).__name__)
def test_what_is_no_objective_is_refused(solver):
    with pytest.raises(hypergrad.StructureMismatch):
        solver(lambda x: x[:1] if isinstance(solver, Anderson) else x, torch.zeros(2))


def test_the_info_is_a_pytree_and_reads_well():
    _, info = LBFGS()(bowl, torch.zeros(12, dtype=F64), 1.0)
    assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(info))
    assert str(info).startswith("LBFGS: CONVERGED after")
    _, info = vmap(lambda c: LBFGS()(bowl, torch.zeros(12, dtype=F64), c))(torch.arange(3.0))
    assert str(info).startswith("LBFGS, 3 tasks: 3 CONVERGED; at most")
    assert isinstance(info, inner_solvers.InnerInfo)


def test_a_projection_makes_fista_projected_gradient_descent():
    target = torch.tensor([0.9, 0.6, 0.3, -0.4], dtype=F64)
    project = lambda v, step, *args: projections.simplex(v)
    x, info = FISTA(project)(lambda x: (x - target).square().sum(), torch.zeros(4, dtype=F64))
    assert info.success
    torch.testing.assert_close(x, projections.simplex(target), rtol=1e-7, atol=1e-9)


# Under the caller's vmaps, which a solver leaves to work on plain batches


@pytest.mark.parametrize("solver", [*EVERY, Anderson()], ids=lambda s: type(s).__name__)
def test_nested_vmaps_at_other_places_with_functions_that_close_over_batches(solver):
    c, d = data(180, 4, 2, dtype=F64), data(181, 5, 3, dtype=F64)
    init = {"a": torch.zeros(4, dtype=F64), "b": torch.zeros((), dtype=F64)}

    def one(c, d):  # whose answer is c and the mean of d
        def objective(x, scale):
            return (scale * (x["a"] - c) ** 2).sum() + 3 * (x["b"] - d.mean()) ** 2

        def gradient_step(x, scale):
            return {
                "a": x["a"] - scale / 4 * (x["a"] - c),
                "b": x["b"] - (x["b"] - d.mean()) / 2,
            }

        fun = gradient_step if isinstance(solver, Anderson) else objective
        return solver(fun, init, torch.ones(4, dtype=F64))

    x, info = vmap(lambda c: vmap(lambda d: one(c, d), in_dims=1)(d), in_dims=1)(c)
    assert info.status.shape == info.value.shape == (2, 3)
    assert info.success.all()
    torch.testing.assert_close(x["a"], c.T[:, None].expand(2, 3, 4), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(x["b"], d.mean(0).expand(2, 3), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("solver", [GradientDescent, Nesterov, FISTA], ids=lambda s: s.__name__)
def test_every_task_may_have_a_step_size_of_its_own(solver):
    seen = []

    def shrink(v, step, centre):
        seen.append((v.shape, step.shape))
        return v / (1 + step)

    def one(step, centre):
        f = lambda x, centre: ((x - centre) ** 2).sum() / 2
        options = {"prox": shrink} if solver is FISTA else {}
        return solver(step_size=step, maxiter=3, **options)(f, torch.zeros(2, dtype=F64), centre)

    steps, centres = torch.tensor([0.1, 0.5, 0.9], dtype=F64), data(182, 3, 2, dtype=F64)
    x, info = vmap(one)(steps, centres)
    assert set(seen) <= {((2,), ())}  # of one task
    for k in range(3):
        alone, figures = one(steps[k], centres[k])
        torch.testing.assert_close(x[k], alone, rtol=1e-12, atol=0)
        torch.testing.assert_close(info.residual_norm[k], figures.residual_norm)
    assert not torch.allclose(x[0] / centres[0], x[2] / centres[2])


@OF_SMOOTH
def test_an_objective_that_takes_derivatives_itself_is_right_in_a_batch(solver):
    # Through an affine norm layer, where PyTorch's derivative of a mapped derivative is wrong.
    weight = torch.tensor([1.0, 0.5, 2.0], dtype=F64)

    def one(c):
        def height(x):
            y = torch.nn.functional.layer_norm(x, (3,), weight)
            return ((x - c) ** 2).sum() / 2 + 0.05 * (y * c).sum()

        def objective(x):
            return (grad(height)(x) ** 2).sum() / 2 + ((x - c) ** 2).sum() / 2

        return solver(objective, torch.tensor([1.0, 0.0, -1.0], dtype=F64))

    centres = torch.tensor([[1.0, -0.5, 0.3], [0.2, 1.5, -1.0]], dtype=F64)
    x, info = vmap(one)(centres)
    assert info.success.all()
    for k in range(2):
        torch.testing.assert_close(x[k], one(centres[k])[0], rtol=1e-5, atol=1e-6)


def test_the_callers_tensors_stay_as_they_are_and_are_not_returned():
    starts = torch.ones(3, 2, dtype=F64)
    x, _ = vmap(lambda start: GradientDescent()(lambda x: ((x - 1) ** 2).sum(), start))(starts)
    x.zero_()
    assert torch.equal(starts, torch.ones(3, 2, dtype=F64))


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
@pytest.mark.parametrize(
    "step", [0.1, torch.tensor(0.1), np.float32(0.1)], ids=["float", "0-d", "np"]
)
def test_a_prox_is_given_the_step_that_the_caller_gave(step, batched):
    y = data(183, 3, 2, dtype=F64)
    seen = []

    def soft(v, step, lam):
        seen.append(float(step))
        return prox.l1(v, step, lam)

    solver = FISTA(soft, step_size=step)
    one = lambda y: solver(lambda w, lam: ((w - y) ** 2).sum() / 2, torch.zeros_like(y), 0.2)[0]
    found = vmap(one)(y) if batched else torch.stack([one(row) for row in y])
    torch.testing.assert_close(found, prox.l1(y, 1.0, 0.2), rtol=1e-6, atol=1e-7)
    assert seen == pytest.approx([0.1] * len(seen))


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
def test_every_unknown_may_have_a_step_of_its_own(batched):
    steep, y = torch.tensor([1.0, 10.0], dtype=F64), torch.tensor([[3.0, 2.0]], dtype=F64)
    steps = 0.5 / steep
    options = {"step_size": steps, "tol": 1e-10}
    f = lambda w, y: (steep * (w - y) ** 2).sum() / 2

    def one(y):
        lasso, _ = FISTA(lambda v, s, y: prox.l1(v, s, 1.0), **options)(f, torch.zeros_like(y), y)
        plain = [s(**options)(f, torch.zeros_like(y), y)[0] for s in (GradientDescent, Nesterov)]
        return lasso, *plain

    lasso, *plain = vmap(one)(y) if batched else (part[None] for part in one(y[0]))
    torch.testing.assert_close(lasso, y - 1 / steep, rtol=1e-8, atol=0)
    for found in plain:
        torch.testing.assert_close(found, y, rtol=1e-8, atol=0)


@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("solver", [GradientDescent, Nesterov], ids=lambda s: s.__name__)
def test_a_step_of_another_shape_is_refused(solver, shape):
    with pytest.raises(ValueError, match=r"step_size must be a number, or a tensor of shape .*got"):
        solver(step_size=torch.full(shape, 0.1))(lambda x: (x**2).sum(), torch.ones(2))


def _masked_by_a_hook(x, c):
    if x.requires_grad:
        x.register_hook(lambda g: g * torch.tensor([1.0, 0.0], dtype=F64))
    return ((x - c) ** 2).sum()


def _other_where_it_is_differentiated(x, c):
    return ((x - c) ** 2).sum() + ((x**2).sum() if x.requires_grad else 0.0)


def _of_its_own_gradient(x, c):
    height = ((x - c) ** 2).sum() / 2 + (x**4).sum() / 4
    return (torch.autograd.grad(height, x, create_graph=True)[0] ** 2).sum() / 2


def _of_a_tangent(x, c):
    with torch.autograd.forward_ad.dual_level():
        y = torch.autograd.forward_ad.make_dual(x, c) ** 2
        return torch.autograd.forward_ad.unpack_dual(y).tangent.sum() ** 2 + ((x - c) ** 2).sum()


@pytest.mark.parametrize(
    "objective",
    [_masked_by_a_hook, _other_where_it_is_differentiated, _of_its_own_gradient, _of_a_tangent],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("solver", [GradientDescent(), LBFGS()], ids=lambda s: type(s).__name__)
def test_an_objective_that_asks_autograd_is_the_same_in_a_batch(solver, objective):
    c = torch.tensor([[0.5, -1.0], [1.5, 0.3], [-0.2, 0.9]], dtype=F64)
    one = lambda c: solver(objective, torch.full((2,), 0.1, dtype=F64), c)[0]
    torch.testing.assert_close(
        vmap(one)(c), torch.stack([one(row) for row in c]), rtol=1e-5, atol=1e-6
    )


def test_an_error_of_the_objective_comes_out_of_a_batch_as_it_is():
    def objective(x, c):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        vmap(lambda c: LBFGS()(objective, torch.zeros(2), c)[0])(torch.ones(3, 2))


@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
def test_a_function_that_changes_its_arguments_in_place_is_refused(batched):
    call = (lambda one, t: vmap(one)(t[None])) if batched else (lambda one, t: one(t))
    init = torch.zeros(2, dtype=F64)
    with pytest.raises(hypergrad.UnsupportedOperation, match=r"T\(params, \.\.\.\) changes one"):
        call(lambda c: Anderson()(lambda x: x.mul_(0.5).add_(1.0), init + c)[0], init)
    with pytest.raises(hypergrad.UnsupportedOperation, match="The objective changes one"):
        call(lambda c: LBFGS()(lambda x, c: (x - c.add_(1)).square().sum(), init, c)[0], init + 1)
    with pytest.raises(hypergrad.UnsupportedOperation, match="in place"):
        call(lambda c: LBFGS()(lambda x: x.add_(1).square().sum(), init + c)[0], init)
    assert not init.any()


@OF_EVERY
def test_the_default_device_plays_no_part(solver):
    centre = torch.ones(3, dtype=F64)
    with torch.device("meta"):
        x, info = solver(bowl_of_three, torch.zeros(3, dtype=F64, device="cpu"), centre)
    assert info.success
    torch.testing.assert_close(x, centre, rtol=1e-5, atol=1e-6)


def bowl_of_three(x, centre):
    return ((x - centre) ** 2).sum() / 2


# Objectives that are steep over the distance at which a curvature is measured


@OF_SMOOTH
@pytest.mark.parametrize("scale", [1.0, 1e3, 5e4, 1e6])
def test_a_large_feature_does_not_end_the_iteration_at_its_start(solver, scale):
    # exp(a w) - 0.3 a w, as of counts: the minimum is at a w = log 0.3.
    def loss(w, a):
        return (torch.exp(a * w) - 0.3 * a * w).sum()

    w, info = solver(loss, torch.zeros(1), torch.tensor(scale))
    assert info.success
    assert abs(scale * w.item() - math.log(0.3)) < 5e-3


@OF_SMOOTH
def test_steep_and_flat_tasks_share_a_batch(solver):
    scales = torch.tensor([1.0, 100.0, 5e4])

    def loss(w, a):
        return (torch.exp(a * w) - 0.3 * a * w).sum()

    w, info = vmap(lambda a: solver(loss, torch.zeros(1), a))(scales)
    assert info.success.all()
    torch.testing.assert_close(scales * w[:, 0], torch.full((3,), math.log(0.3)), rtol=0, atol=5e-3)


@OF_SMOOTH
def test_where_nothing_is_steep_a_curvature_costs_one_gradient(solver):
    # Also beside a large constant, whose rounding hides how the value changes.
    def evaluations(offset):
        loss = lambda w: ((w - 1) ** 2).sum() + 1e-2 * w.square().sum() + offset
        return solver(loss, torch.full((3,), 1.5, dtype=F64))[1].evaluations

    assert evaluations(1e4) == evaluations(0.0) < 25
