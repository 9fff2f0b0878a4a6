"""`argmin`: an inner solver and the condition that belongs to it, in one line."""

from __future__ import annotations

import inspect
import warnings

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, ConvergenceWarning, StructureMismatch, argmin, prox
from hypergrad.inner_solvers import (
    FISTA,
    LBFGS,
    Anderson,
    Bisection,
    GradientDescent,
    InnerInfo,
    LevenbergMarquardt,
    Nesterov,
    NewtonCG,
)
from hypergrad.projections import box, non_negative
from tests.problems import F64, data

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")

X, Y = data(1, 12, 4, dtype=F64), data(2, 12, dtype=F64)
LAM = torch.tensor(0.7, dtype=F64)
START = torch.zeros(4, dtype=F64)


def ridge(w, X, y, lam):
    return ((X @ w - y) ** 2).sum() / 2 + lam * (w @ w) / 2


def ridge_solution(X, y, lam):
    return torch.linalg.solve(X.mT @ X + lam * torch.eye(4, dtype=X.dtype), X.mT @ y)


def ridge_residuals(w, X, y, lam):
    return {"data": X @ w - y, "penalty": lam.sqrt() * w}


def close(actual, expected, rtol=1e-6, atol=1e-8):
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=atol)


def differences(function, at, step=1e-5):
    """The Jacobian by central differences."""
    flat, columns = at.reshape(-1), []
    for i in range(flat.numel()):
        away = torch.zeros_like(flat)
        away[i] = step
        ends = [function((flat + sign * away).reshape(at.shape)) for sign in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * step))
    return torch.stack(columns, dim=-1).reshape(columns[0].shape + at.shape)


# Smooth problems: ridge regression, in closed form

SMOOTH = {
    "default": argmin(ridge),
    "LBFGS": argmin(ridge, solver=LBFGS(tol=1e-11)),
    "NewtonCG": argmin(ridge, solver=NewtonCG(tol=1e-11)),
    "GradientDescent": argmin(ridge, solver=GradientDescent(tol=1e-11)),
    "Nesterov": argmin(ridge, solver=Nesterov(tol=1e-11)),
    "LevenbergMarquardt": argmin(ridge_residuals, solver=LevenbergMarquardt(tol=1e-11)),
}
OF_SMOOTH = pytest.mark.parametrize("fit", SMOOTH.values(), ids=SMOOTH)


@OF_SMOOTH
def test_value_and_derivatives_are_those_of_the_closed_form(fit):
    close(fit(START, X, Y, LAM), ridge_solution(X, Y, LAM))
    of_fit = lambda *args: fit(START, *args)
    for take in (jacrev, jacfwd):
        every = take(of_fit, argnums=(0, 1, 2))(X, Y, LAM)
        close(every, take(ridge_solution, argnums=(0, 1, 2))(X, Y, LAM))
    second = hessian(lambda lam: of_fit(X, Y, lam).square().sum())(LAM)
    close(second, hessian(lambda lam: ridge_solution(X, Y, lam).square().sum())(LAM), rtol=1e-5)


def test_autograd_takes_first_and_second_derivatives():
    fit = argmin(ridge, solver=NewtonCG(tol=1e-13))
    leaves = tuple(t.clone().requires_grad_() for t in (X[:6], Y[:6], LAM))
    of_fit = lambda *args: fit(START, *args)
    assert gradcheck(of_fit, leaves)
    assert gradgradcheck(of_fit, leaves)


def test_a_problem_without_a_closed_form_agrees_with_differences():
    def logistic(p, lam):
        z = X @ p["w"] + p["b"]
        fits = torch.nn.functional.softplus(-z * Y.sign()).mean()
        return fits + (lam.exp() * p["w"] ** 2).sum() / 2 + p["b"] ** 2 / 20

    fit = argmin(logistic, solver=NewtonCG(tol=1e-13))
    init = {"w": START, "b": torch.zeros((), dtype=F64)}
    lam = torch.tensor([-1.0, -2.0, -1.5, -0.5], dtype=F64)
    value = lambda lam: torch.cat([fit(init, lam)["w"], fit(init, lam)["b"][None]])
    close(jacrev(value)(lam), differences(value, lam), rtol=1e-5)
    slope = lambda lam: grad(lambda lam: value(lam).square().sum())(lam)
    close(jacfwd(slope)(lam), differences(slope, lam), rtol=1e-5)


def test_a_small_network_in_single_precision():
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 1))
    inputs, targets = data(3, 20, 3, dtype=F64), data(4, 20, 1, dtype=F64)

    def loss(params, log_decay):
        inputs_, targets_ = inputs.to(log_decay), targets.to(log_decay)
        error = (functional_call(net, params, inputs_) - targets_).square().mean()
        return error + log_decay.exp() * sum((p**2).sum() for p in params.values())

    def validation(fit, init, log_decay):
        params = fit(init, log_decay)
        return (functional_call(net, params, inputs.to(log_decay) + 0.5)).square().mean()

    init = {name: p.detach() for name, p in net.named_parameters()}
    log_decay = torch.tensor(-2.0)
    fit = argmin(loss, solver=LBFGS(maxiter=5000))
    gradient = grad(lambda h: validation(fit, init, h))(log_decay)

    exact = argmin(loss, solver=NewtonCG(tol=1e-12))
    # From the solution, so that both ends are those of the same minimum.
    near = {k: p.double().detach() for k, p in fit(init, log_decay).items()}
    expected = differences(lambda h: validation(exact, near, h), log_decay.double())
    close(gradient.double(), expected, rtol=5e-3)


# Constraints and penalties

CURVED = X.T @ X / 12 + torch.diag(torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64))
POINT = torch.tensor([2.0, 0.4, -1.0, 0.3], dtype=F64)


def quadratic(x, c):
    return x @ CURVED @ x / 2 - c @ x


def on_the_active_set(x, low, high):
    """The Jacobian of the minimiser in c: the inverse of the curvature on what is free."""
    free = (x > low) & (x < high)
    jacobian = torch.zeros(4, 4, dtype=F64)
    jacobian[free.nonzero(), free.nonzero()[:, 0]] = torch.linalg.inv(CURVED[free][:, free])
    return jacobian, free


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_a_box_is_the_closed_form_of_its_active_set_in_any_units(scale):
    fit = argmin(
        lambda x, c: scale * quadratic(x, c),
        project=lambda v: box(v, -0.5, 1.0),
        solver=FISTA(tol=1e-11),
    )
    x = fit(START, POINT)
    expected, free = on_the_active_set(x, -0.5, 1.0)
    assert 0 < free.sum() < 4
    for take in (jacrev, jacfwd):
        close(take(lambda c: fit(START, c))(POINT), expected)


def test_the_bounds_of_a_box_may_be_arguments():
    fit = argmin(
        lambda x, c, high: quadratic(x, c),
        project=lambda v, c, high: box(v, -0.5, high),
        solver=FISTA(tol=1e-12),
    )
    high = torch.full((4,), 1.0, dtype=F64)
    for place, at in ((1, POINT), (2, high)):
        of_fit = lambda t, place=place: fit(START, *((t, high) if place == 1 else (POINT, t)))
        close(jacrev(of_fit)(at), differences(of_fit, at), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("step_size", [None, 0.05, torch.tensor(0.05, dtype=F64)])
def test_the_length_of_the_step_changes_nothing(step_size):
    fit = argmin(quadratic, project=non_negative, solver=FISTA(tol=1e-11, step_size=step_size))
    expected, _ = on_the_active_set(fit(START, POINT), 0.0, torch.inf)
    close(jacrev(lambda c: fit(START, c))(POINT), expected)


def lasso(w, X, y, lam):
    return ((X @ w - y) ** 2).sum() / 2


def lasso_solution(X, y, lam, on, signs):
    """On a known active set, with known signs."""
    part = X[:, on]
    values = torch.linalg.solve(part.T @ part, part.T @ y - lam * signs[on])
    return torch.eye(4, dtype=F64)[:, on] @ values


PENALTY = torch.tensor(3.0, dtype=F64)
LASSO = {
    "prox": argmin(lasso, prox=lambda v, s, X, y, lam: prox.l1(v, s, lam), solver=FISTA(tol=1e-12)),
    "solver's": argmin(lasso, solver=FISTA(lambda v, s, X, y, lam: prox.l1(v, s, lam), tol=1e-12)),
}


@pytest.mark.parametrize("fit", LASSO.values(), ids=LASSO)
def test_the_lasso_is_the_closed_form_on_its_active_set(fit):
    w = fit(START, X, Y, PENALTY)
    on, signs = w != 0, w.sign()
    assert 0 < on.sum() < 4
    closed = lambda *args: lasso_solution(*args, on, signs)
    close(w, closed(X, Y, PENALTY))
    of_fit = lambda *args: fit(START, *args)
    for take in (jacrev, jacfwd):
        every = take(of_fit, argnums=(0, 1, 2))(X, Y, PENALTY)
        close(every, take(closed, argnums=(0, 1, 2))(X, Y, PENALTY))
    of_both = [lambda lam, f=f: f(X * lam / 3, Y, lam).square().sum() for f in (of_fit, closed)]
    close(hessian(of_both[0])(PENALTY), hessian(of_both[1])(PENALTY), rtol=1e-5)


def test_second_derivatives_by_autograd_on_an_active_set():
    leaves = tuple(t.clone().requires_grad_() for t in (X[:6], Y[:6], PENALTY / 3))
    of_fit = lambda *args: LASSO["prox"](START, *args)
    assert 0 < (of_fit(*leaves) != 0).sum() < 4
    assert gradcheck(of_fit, leaves)
    assert gradgradcheck(of_fit, leaves, atol=1e-4)


def test_soft_thresholding_of_one_point():
    fit = argmin(lambda x, y: ((x - y) ** 2).sum() / 2, prox=lambda v, s: prox.l1(v, s, 1.0))
    y = torch.tensor([3.0, -0.5, -2.0, 0.2], dtype=F64)
    close(fit(START, y), torch.tensor([2.0, 0.0, -1.0, 0.0], dtype=F64))
    outside = torch.diag((y.abs() > 1).to(F64))
    close(jacrev(lambda y: fit(START, y))(y), outside)


def test_a_linear_objective_over_a_set_has_a_step_too():
    # Without curvature: x is the corner of the box, which does not move with c.
    fit = argmin(lambda x, c: c @ x + 0 * x.square().sum(), project=lambda v, c: box(v, 0.0, c))
    assert torch.equal(fit(START, POINT.abs()), START)
    high = argmin(lambda x, c: -c @ x + 0 * x.square().sum(), project=lambda v, c: box(v, 0.0, c))
    close(jacrev(lambda c: high(START, c))(POINT.abs()), torch.eye(4, dtype=F64))


# Batches of tasks

TASKS = {
    "smooth": (argmin(ridge), (data(5, 3, 12, 4, dtype=F64), data(6, 3, 12, dtype=F64))),
    "penalty": (LASSO["prox"], (data(5, 3, 12, 4, dtype=F64), data(6, 3, 12, dtype=F64))),
    "steep": (
        LASSO["prox"],
        (10.0 ** torch.arange(3.0, dtype=F64)[:, None, None] * X, Y[None].expand(3, -1)),
    ),
}


@pytest.mark.parametrize("batching", ["vmap", "loop"])
@pytest.mark.parametrize(("fit", "tasks"), TASKS.values(), ids=TASKS)
def test_tasks_under_vmap_are_those_of_a_loop(fit, tasks, batching):
    if batching == "loop":
        fit = argmin(ridge, solver=NewtonCG(tol=1e-11), batching="loop")
    value = lambda X, y, lam: fit(START, X, y, lam).square().sum()
    lams = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    for one in (
        value,
        grad(value, argnums=(0, 2)),
        jacfwd(lambda *args: fit(START, *args), argnums=2),
    ):
        mapped = vmap(one)(*tasks, lams)
        looped = [one(*task, lam) for *task, lam in zip(*tasks, lams, strict=True)]
        stacked = pytree.tree_map(lambda *leaves: torch.stack(leaves), *looped)
        close(mapped, stacked, rtol=1e-5, atol=1e-7)


def test_gradients_reach_through_a_vmap_of_tasks():
    tasks = TASKS["penalty"][1]
    fit, lam = LASSO["prox"], torch.tensor(1.0, dtype=F64, requires_grad=True)
    (gradient,) = torch.autograd.grad(vmap(fit, (None, 0, 0, None))(START, *tasks, lam).sum(), lam)
    total = lambda lam: sum(fit(START, *task, lam).sum() for task in zip(*tasks, strict=True))
    close(gradient, differences(total, lam.detach()), rtol=1e-5)


def test_a_condition_without_a_step_measures_one_for_each_task_of_a_vmap():
    def gradient(X, y, lam, step_size):
        f = lambda w, lam: ((X @ w - y) ** 2).sum() / 2
        w, _ = FISTA(prox.l1, tol=1e-12)(f, START, lam)
        condition = hypergrad.ProximalGradient(f, prox.l1, step_size)
        return hypergrad.implicit_grad(lambda w, lam: w.square().sum(), condition, w, lam)

    lams = torch.tensor([0.5, 1.0, 2.0], dtype=F64)
    tasks = TASKS["steep"][1]
    mapped = vmap(lambda *task: gradient(*task, None))(*tasks, lams)
    each = zip(*tasks, lams, strict=True)
    looped = [gradient(*task, 0.02 / 100.0**i) for i, task in enumerate(each)]
    close(mapped, torch.stack(looped), rtol=1e-5)


def test_one_argmin_may_lie_inside_of_another():
    # The lower x is z, inside of the box; the upper z is b / 1.2.
    lower = argmin(lambda x, z: ((x - z) ** 2).sum() / 2, project=lambda v: box(v, 0.0, 1.0))
    zero = torch.zeros(2, dtype=F64)
    upper = argmin(lambda z, b: (lower(zero, z) - b).square().sum() / 2 + 0.1 * (z**2).sum())
    b = torch.tensor([0.5, 0.3], dtype=F64)
    close(upper(zero + 0.2, b), b / 1.2)
    close(jacrev(lambda b: upper(zero + 0.2, b))(b), torch.eye(2, dtype=F64) / 1.2)


# What it takes


def test_arguments_may_be_passed_by_name():
    fit = argmin(ridge)
    expected = jacrev(ridge_solution, argnums=2)(X, Y, LAM)
    close(jacrev(lambda lam: fit(START, lam=lam, y=Y, X=X))(LAM), expected)
    close(jacrev(lambda lam: fit(init=START, lam=lam, y=Y, X=X))(LAM), expected)
    close(jacrev(lambda lam: fit(START, X, Y, lam=lam))(LAM), expected)
    assert list(inspect.signature(fit).parameters) == ["init", "X", "y", "lam"]
    with pytest.raises(TypeError, match=r"fit\(\) has no argument 'decay'.* init, X, y, lam"):
        fit(START, X, Y, LAM, decay=1.0)


def test_named_arguments_reach_a_projection_in_their_places():
    fit = argmin(lambda x, c, high: quadratic(x, c), project=lambda v, c, high: box(v, 0.0, high))
    close(
        fit(START, high=torch.tensor(0.1, dtype=F64), c=POINT).max(), torch.tensor(0.1, dtype=F64)
    )


def test_argnums_of_argmin_restricts_what_is_differentiated():
    fit = argmin(ridge, argnums=3)
    y, lam = Y.clone().requires_grad_(), LAM.clone().requires_grad_()
    gradients = torch.autograd.grad(fit(START, X, y, lam).sum(), (y, lam), allow_unused=True)
    assert gradients[0] is None or not gradients[0].any()
    close(gradients[1], jacrev(ridge_solution, argnums=2)(X, Y, LAM).sum())


def test_aux_is_the_evidence_of_the_inner_solver():
    fit = argmin(ridge, has_aux=True)
    w, info = fit(START, X, Y, LAM)
    assert isinstance(info, InnerInfo)
    assert info.success
    assert info.method == "LBFGS"
    close(w, ridge_solution(X, Y, LAM))
    lams = torch.tensor([0.1, 1.0], dtype=F64)
    slopes, info = vmap(grad(lambda lam: _summed(fit(START, X, Y, lam)), has_aux=True))(lams)
    assert slopes.shape == info.success.shape == (2,)


def _summed(solved):
    return solved[0].sum(), solved[1]


def test_the_linear_solver_and_the_callback_are_those_of_the_derivative():
    infos = []
    fit = argmin(ridge, linear_solver=CG(rtol=1e-12), callback=infos.append)
    grad(lambda lam: fit(START, X, Y, lam).sum())(LAM)
    assert [info.method for info in infos] == ["CG"]


def test_a_captured_tensor_is_differentiated():
    lam = LAM.clone().requires_grad_()
    fit = argmin(lambda w: ridge(w, X, Y, lam), solver=NewtonCG(tol=1e-12))
    fit(START).sum().backward()
    close(lam.grad, jacrev(ridge_solution, argnums=2)(X, Y, LAM).sum())
    bound = torch.tensor(0.1, dtype=F64, requires_grad=True)
    capped = argmin(quadratic, project=lambda v: box(v, 0.0, bound))
    capped(START, POINT).sum().backward()
    at = lambda bound: argmin(quadratic, project=lambda v: box(v, 0.0, bound))(START, POINT).sum()
    close(bound.grad, differences(at, bound.detach()), rtol=1e-5)


def test_a_jvp_of_a_single_number():
    fit = argmin(lambda x, a: (x - a) ** 2)
    value, slope = jvp(
        lambda a: fit(torch.zeros((), dtype=F64), a), (LAM,), (torch.ones_like(LAM),)
    )
    close(value, LAM)
    close(slope, torch.ones_like(LAM))


def test_an_unsolved_problem_is_said_when_it_is_differentiated():
    fit = argmin(ridge, solver=GradientDescent(step_size=1e-3, maxiter=2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        w = fit(START, X, Y, LAM.clone().requires_grad_())
    with pytest.warns(ConvergenceWarning):
        w.sum().backward()
    raising = argmin(ridge, solver=GradientDescent(step_size=1e-3, maxiter=2), on_failure="raise")
    with pytest.raises(hypergrad.NotConverged):
        grad(lambda lam: raising(START, X, Y, lam).sum())(LAM)


# Mistakes

MISTAKES = [
    (lambda: argmin(ridge, solver=LBFGS), TypeError, "solver=LBFGS()"),
    (lambda: argmin(ridge, solver=CG()), TypeError, "is passed as linear_solver"),
    (lambda: argmin(ridge, solver=CG), TypeError, "is passed as linear_solver"),
    (lambda: argmin(ridge, solver=ridge_solution), TypeError, "custom_argmin(objective)(solver)"),
    (lambda: argmin(ridge, solver="newton-cg"), TypeError, "inner_solvers.NewtonCG()"),
    (lambda: argmin(ridge, solver=torch.optim.SGD), TypeError, "custom_argmin decorates"),
    (lambda: argmin(ridge, solver=3), TypeError, "an object of type int"),
    (lambda: argmin(ridge, solver=Anderson()), TypeError, "custom_fixed_point(T)"),
    (lambda: argmin(ridge, solver=Bisection(0.0, 1.0)), TypeError, "custom_root(F)"),
    (lambda: argmin(ridge, solver=FISTA()), TypeError, "pass project=... or prox=..."),
    (lambda: argmin(ridge, solver=LBFGS(), project=non_negative), TypeError, "FISTA has"),
    (lambda: argmin(ridge, solver=NewtonCG(), prox=prox.l1), TypeError, "FISTA has"),
    (lambda: argmin(ridge, project=non_negative, prox=prox.l1), ValueError, "not both"),
    (lambda: argmin(ridge, solver=FISTA(prox.l1), prox=prox.ridge), ValueError, "Pass it once"),
    (lambda: argmin(ridge, solver=FISTA(prox.l1), project=box), ValueError, "Pass it once"),
    (lambda: argmin(ridge, project=1.0), TypeError, "project must be a function"),
    (lambda: argmin(None), TypeError, "objective must be a function"),
    (lambda: argmin(LBFGS()), TypeError, "objective must be a function"),
    (lambda: argmin(hypergrad.Minimum(ridge)), TypeError, "is for custom_argmin"),
    (lambda: argmin(ridge, linear_solver=CG), TypeError, "linear_solver=CG()"),
    (lambda: argmin(ridge, linear_solver=LBFGS()), TypeError, "is passed as solver"),
    (lambda: argmin(ridge, linear_solver=LBFGS), TypeError, "is passed as solver"),
    (lambda: argmin(ridge, linear_solver="cg"), TypeError, "linear_solver=hypergrad.CG()"),
    (lambda: argmin(ridge, linsolve=CG()), TypeError, "Did you mean 'linear_solver'"),
    (lambda: argmin(ridge, max_iter=3), TypeError, "inner_solvers.LBFGS(maxiter=...)"),
    (lambda: argmin(ridge, damping=3), TypeError, "linear_solver=hypergrad.CG(damping=...)"),
    (lambda: argmin(ridge, projection=box), TypeError, "Did you mean 'project'"),
    (lambda: argmin(ridge, batching="map"), ValueError, "batching must be"),
    (lambda: argmin(ridge, argnums=0), hypergrad.UnsupportedOperation, "argnums=0"),
    (lambda: argmin(ridge)(None, X, Y, LAM), StructureMismatch, "needs an initial guess"),
    (lambda: argmin(ridge)(START, X, Y), TypeError, "fit takes (init, X, y, lam)"),
    (lambda: argmin(ridge, solver=CG(), project=None, prox=None), TypeError, "as linear_solver"),
    (
        lambda: argmin(ridge, solver=LevenbergMarquardt())(START, X, Y, LAM),
        StructureMismatch,
        "of which it minimises half the sum of squares",
    ),
]


@pytest.mark.parametrize(("call", "error", "words"), MISTAKES, ids=[m[2] for m in MISTAKES])
def test_a_mistake_names_its_cure(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert words in str(caught.value)


@pytest.mark.parametrize(("given", "words"), [(0, "missing a required argument"), (2, "too many")])
def test_a_call_with_another_number_of_arguments_than_the_objective_is_named(given, words):
    fit = hypergrad.argmin(lambda w, t: ((w - t) ** 2).sum())
    w = torch.zeros(2)
    with pytest.raises(TypeError, match=rf"fit takes \(init, t\).*{words}"):
        fit(w, *[w + 1] * given)


def test_a_projection_of_another_shape_is_called_project():
    fit = hypergrad.argmin(lambda w, t: ((w - t) ** 2).sum(), project=lambda v: v[:1])
    with pytest.raises(hypergrad.StructureMismatch, match=r"project\(v, \.\.\.\)") as caught:
        fit(torch.zeros(2), torch.ones(2))
    assert caught.value.argument == "project"
