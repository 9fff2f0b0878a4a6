"""What every inner solver promises: right, stopped in time, honest, one status a task."""

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
from hypergrad import Status, implicit_grad, prox
from hypergrad.inner_solvers import FISTA, LBFGS, Anderson, GradientDescent, Nesterov, NewtonCG
from tests.problems import F64, STEEP, bowl, data, logistic, relative_error, ridge

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
SMOOTH = [GradientDescent(), Nesterov(), LBFGS(), NewtonCG()]
EVERY = [*SMOOTH, FISTA(lambda v, step, *args: v)]
OF_EVERY = pytest.mark.parametrize("solver", EVERY, ids=lambda s: type(s).__name__)
OF_SMOOTH = pytest.mark.parametrize("solver", SMOOTH, ids=lambda s: type(s).__name__)


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
        hypergradient, info = implicit_grad(
            problem.outer, problem.inner, x, problem.hparams, return_info=True
        )
    assert solved.success
    assert info.inner_residual < (1e-6 if dtype == F64 else 1e-3)
    expected = problem.hypergradient(problem.hparams)
    assert relative_error(hypergradient, expected) < (1e-6 if dtype == F64 else 2e-3)


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


def test_the_callers_tensors_stay_as_they_are_and_are_not_returned():
    starts = torch.ones(3, 2, dtype=F64)
    x, _ = vmap(lambda start: GradientDescent()(lambda x: ((x - 1) ** 2).sum(), start))(starts)
    x.zero_()
    assert torch.equal(starts, torch.ones(3, 2, dtype=F64))


@pytest.mark.parametrize("shape", [(3,), (1, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("solver", [GradientDescent, Nesterov], ids=lambda s: s.__name__)
def test_a_step_of_another_shape_is_refused(solver, shape):
    with pytest.raises(ValueError, match=r"step_size must be a number, or a tensor of shape .*got"):
        solver(step_size=torch.full(shape, 0.1))(lambda x: (x**2).sum(), torch.ones(2))


@OF_EVERY
def test_the_default_device_plays_no_part_in_an_inner_solver(solver):
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
