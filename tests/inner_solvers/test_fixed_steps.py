"""So many steps, at which nothing looks: those written by hand, and what is said of them."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import hypergrad
from hypergrad import Status, prox
from hypergrad.inner_solvers import FISTA, GradientDescent, Nesterov
from tests.problems import F64, data, relative_error

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")
STEEP = torch.tensor([1.0, 2.0, 5.0], dtype=F64)
LENGTH, STEPS = 0.15, 16
OPTIONS = {"step_size": LENGTH, "maxiter": STEPS, "tol": 0}
SOLVERS = [GradientDescent(**OPTIONS), Nesterov(**OPTIONS), FISTA(prox.l1, **OPTIONS)]
OF_EVERY = pytest.mark.parametrize("solver", SOLVERS, ids=lambda s: type(s).__name__)


def rough(x, centre):
    return (STEEP * (x - centre) ** 2).sum() / 2 + torch.cos(x).sum() / 3


def by_hand(method, f, x, soften=lambda v: v):
    """Write out gradient descent, and Nesterov's method with its restarts."""
    y = z = x
    momentum = 1.0
    for _ in range(STEPS):
        before, z = z, soften(y - LENGTH * grad(f)(y))
        if method is GradientDescent:
            y = z
            continue
        uphill = (y - z) @ (z - before) > 0
        following = (1 + math.sqrt(1 + 4 * momentum**2)) / 2
        y = z if uphill else z + (momentum - 1) / following * (z - before)
        momentum = 1.0 if uphill else following
    return z


def solve(solver, f, start):
    """Solve with the penalty 0.5 where there is a proximal map."""
    if isinstance(solver, FISTA):
        return solver(lambda x, lam: f(x), start, 0.5)
    return solver(f, start)


@OF_EVERY
def test_the_steps_are_those_by_hand_alone_and_in_a_batch(solver):
    centres = data(190, 5, 3, dtype=F64)
    start = torch.full((3,), 2.0, dtype=F64)
    soften = lambda v: v
    if isinstance(solver, FISTA):
        soften = lambda v: v.sign() * (v.abs() - 0.5 * LENGTH).clamp(min=0)
    one = lambda c: solve(solver, lambda x: rough(x, c), start)
    together, infos = vmap(one)(centres)
    for k, centre in enumerate(centres):
        expected = by_hand(type(solver), lambda x, c=centre: rough(x, c), start, soften)
        x, info = one(centre)
        assert relative_error(x, expected) < 1e-13
        assert relative_error(together[k], expected) < 1e-13
        assert info.iterations == infos.iterations[k] == STEPS
        assert info.evaluations == infos.evaluations[k] == STEPS
        assert info.status == infos.status[k] == Status.MAX_ITERATIONS
        assert not info.success


def test_the_figures_are_those_of_the_last_gradient():
    c = data(191, 3, dtype=F64)
    f = lambda x: rough(x, c)
    _, info = GradientDescent(**OPTIONS)(f, torch.zeros(3, dtype=F64))
    last, _ = GradientDescent(**{**OPTIONS, "maxiter": STEPS - 1})(f, torch.zeros(3, dtype=F64))
    torch.testing.assert_close(info.value, f(last))
    torch.testing.assert_close(info.residual_norm, grad(f)(last).norm())
    solution, _ = GradientDescent(step_size=LENGTH)(f, torch.zeros(3, dtype=F64))
    distance = relative_error(last, solution)
    assert distance / 10 < info.inner_residual < 10 * distance


class Reads(TorchDispatchMode):
    """Counts the numbers that the host reads, and the gradients by their first operation."""

    def __init__(self):
        super().__init__()
        self.reads, self.operations = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operations += 1
        name = func.name()
        self.reads += any(word in name for word in ("_local_scalar_dense", "is_nonzero", "equal"))
        return func(*args, **(kwargs or {}))


@OF_EVERY
@pytest.mark.parametrize("batched", [False, True], ids=["alone", "vmap"])
def test_nothing_is_read_by_the_host(solver, batched):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1))
    start = {name: leaf.detach() for name, leaf in network.named_parameters()}
    x, y = data(192, 4, 10, 1, dtype=torch.float32), data(193, 4, 10, 1, dtype=torch.float32)

    def one(x, y):
        def f(p):
            return ((functional_call(network, p, (x,)) - y) ** 2).mean()

        if isinstance(solver, FISTA):
            return FISTA(lambda v, step: v, **OPTIONS)(f, start)
        return solver(f, start)

    def reads(solve):
        with Reads() as seen:
            solve()
        return seen

    seen = reads(lambda: vmap(one)(x, y) if batched else one(x[0], y[0]))
    assert seen.reads == 0
    # The count sees what a solver that looks reads.
    assert reads(lambda: GradientDescent(step_size=0.1, maxiter=2)(torch.sum, x)).reads > 0


@OF_EVERY
def test_a_task_that_meets_nan_stays_where_it_was_finite_and_says_so(solver):
    def one(c):
        # NaN below zero, which the second task reaches after some steps, and the third at once.
        f = lambda x: rough(x, c) + 0 * x.sqrt().sum()
        return solve(solver, f, 2 + torch.where(c > 50, math.nan, 0.0).expand(3))

    centres = torch.tensor([1.0, -9.0, 100.0], dtype=F64)
    x, info = vmap(one)(centres)
    assert info.status[1:].tolist() == [Status.NOT_FINITE] * 2
    assert info.status[0] != Status.NOT_FINITE
    assert not info.success.any()
    assert 0 < info.iterations[1] < STEPS
    assert info.iterations[2] == 0
    assert torch.isfinite(x[:2]).all()
    alone, _ = one(centres[0])
    torch.testing.assert_close(x[0], alone)
    assert info.residual_norm[1].isnan()
    assert info.inner_residual[1].isnan()


def test_gradient_descent_ends_at_the_last_point_with_a_finite_gradient():
    f = lambda x: (x + 0 * x.sqrt()).sum()  # which goes down by 0.15 a step
    x, info = GradientDescent(**OPTIONS)(f, torch.full((2,), 0.5, dtype=F64))
    torch.testing.assert_close(x, torch.full((2,), 0.05, dtype=F64))
    assert info.status == Status.NOT_FINITE


@OF_EVERY
@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
def test_steps_that_are_too_long_diverge_and_end_at_a_finite_point(solver, dtype):
    f = lambda x: (x**4).sum()
    x, info = solve(solver, f, torch.full((2,), 5.0, dtype=dtype))
    assert info.status == Status.DIVERGED
    assert torch.isfinite(x).all()
    assert not info.success
    # Also one that does not get so far as to overflow.
    _, info = GradientDescent(step_size=1.0, maxiter=STEPS, tol=0)(
        lambda x: 5 * (x**2).sum(), torch.ones(2, dtype=dtype)
    )
    assert info.status == Status.DIVERGED


@OF_EVERY
def test_values_of_infinity_beside_finite_gradients_are_seen(solver):
    f = lambda x: (x**2).sum() + torch.where(x.detach().sum() < 1, math.inf, 0.0)
    x, info = solve(solver, f, torch.full((2,), 2.0, dtype=F64))
    assert info.status == Status.DIVERGED
    assert torch.isfinite(x).all()
    assert not torch.isfinite(info.residual_norm)  # that of a point with such a value is unknown


@OF_EVERY
def test_an_objective_that_takes_derivatives_itself_is_the_same_in_a_batch_of_fixed_steps(solver):
    def one(c):
        f = lambda x: (grad(lambda x: rough(x, c))(x) ** 2).sum() / 20
        return solve(solver, f, torch.ones(3, dtype=F64))

    centres = data(196, 3, 3, dtype=F64)
    x, info = vmap(one)(centres)
    for k, centre in enumerate(centres):
        alone, figures = one(centre)
        torch.testing.assert_close(x[k], alone)
        torch.testing.assert_close(info.inner_residual[k], figures.inner_residual)
        assert info.status[k] == figures.status
        assert info.evaluations[k] == figures.evaluations


def test_fixed_steps_in_nested_vmaps_have_a_length_for_each_task():
    c, d, lengths = data(197, 2, 3, dtype=F64), data(198, 4, dtype=F64), torch.tensor([0.05, 0.1])

    def one(c, d, length):
        solver = GradientDescent(length, maxiter=5, tol=0)
        return solver(lambda x: rough(x, c * d), torch.zeros(3, dtype=F64))

    x, info = vmap(lambda c, s: vmap(lambda d: one(c, d, s))(d))(c, lengths.double())
    assert info.status.shape == (2, 4)
    for i in range(2):
        for j in range(4):
            alone, figures = one(c[i], d[j], lengths.double()[i])
            torch.testing.assert_close(x[i, j], alone)
            torch.testing.assert_close(info.residual_norm[i, j], figures.residual_norm)


@OF_EVERY
def test_fixed_steps_of_nothing_are_nothing(solver):
    x, info = solve(solver, lambda x: x.sum(), torch.zeros(0, dtype=F64))
    assert x.shape == (0,)
    assert info.status == Status.CONVERGED


@OF_EVERY
def test_a_start_at_the_solution_stays_there(solver):
    f = lambda x: (x**2).sum()
    x, info = solve(solver, f, torch.zeros(2, dtype=F64))
    assert info.status == Status.CONVERGED
    assert info.success
    assert info.inner_residual == 0
    assert not x.any()


def test_one_step_is_a_step():
    x, info = GradientDescent(step_size=0.5, maxiter=1, tol=0)(torch.sum, torch.ones(2, dtype=F64))
    torch.testing.assert_close(x, torch.full((2,), 0.5, dtype=F64))
    assert info.inner_residual.isnan()  # no curvature has been seen


def test_without_a_step_size_a_tolerance_of_zero_looks_as_before():
    _, info = GradientDescent(tol=0, maxiter=500)(
        lambda x: rough(x, 1.0), torch.zeros(3, dtype=F64)
    )
    assert info.status in (Status.STAGNATED, Status.CONVERGED)
    assert info.iterations < 500


def test_a_meta_gradient_of_fixed_steps_is_that_by_hand():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(1, 6), nn.Tanh(), nn.Linear(6, 1)).double()
    meta = {name: leaf.detach() for name, leaf in network.named_parameters()}
    x, y = data(194, 3, 10, 1, dtype=F64), data(195, 3, 10, 1, dtype=F64)

    def inner(params, meta, x, y):
        fit = ((functional_call(network, params, (x,)) - y) ** 2).mean()
        return fit + sum(((params[n] - meta[n]) ** 2).sum() for n in params)

    def outer(params, x, y):
        return ((functional_call(network, params, (x + 1,)) - y) ** 2).mean()

    def one(x, y):
        f = lambda params, meta: inner(params, meta, x, y)
        params, _ = GradientDescent(step_size=0.05, maxiter=STEPS, tol=0)(f, meta, meta)
        return hypergrad.implicit_grad(
            lambda params, meta: outer(params, x, y), f, params, meta, inner_tol=None
        )

    found = vmap(one)(x, y)
    for k in range(3):
        params = {n: leaf.clone().requires_grad_() for n, leaf in meta.items()}
        for _ in range(STEPS):
            slopes = torch.autograd.grad(inner(params, meta, x[k], y[k]), list(params.values()))
            params = {
                n: (leaf - 0.05 * slope).detach().requires_grad_()
                for (n, leaf), slope in zip(params.items(), slopes, strict=True)
            }
        leaves = list(params.values())
        flat = lambda parts: torch.cat([p.reshape(-1) for p in parts])
        b = flat(torch.autograd.grad(outer(params, x[k], y[k]), leaves))
        slope = torch.autograd.grad(inner(params, meta, x[k], y[k]), leaves, create_graph=True)
        slope = flat(slope)
        rows = [flat(torch.autograd.grad(s, leaves, retain_graph=True)) for s in slope]
        expected = 2 * torch.linalg.solve(torch.stack(rows), b)  # the cross derivative is -2 I
        assert relative_error(flat([found[n][k] for n in meta]), expected) < 1e-6
