"""Which arguments of a projection or proximal map the hyperparameters fill."""

from __future__ import annotations

import functools

import pytest
import torch
from scipy.optimize import brentq
from torch import nn

import hypergrad
from hypergrad import ProjectedGradient, ProximalGradient, argmin, implicit_grad, projections, prox
from hypergrad.inner_solvers import FISTA
from tests.problems import F64

C = torch.tensor([0.9, 0.5, -0.2], dtype=F64)
START = torch.full((3,), 1 / 3, dtype=F64)
LAM = torch.tensor(0.05, dtype=F64)
TIGHT = FISTA(tol=1e-12)


def regularised(w, lam):
    return ((w - C.to(w.dtype)) ** 2).sum() / 2 + lam * (w @ w) / 2


def plain(w, lam):
    return ((w - C) ** 2).sum() / 2


def mixture(lam, radius=1.0):
    """The minimiser of `regularised` on the simplex: by bisection, which knows of no sorting."""
    v = C / (1 + lam)
    t = brentq(lambda t: float((v - t).clamp(min=0).sum()) - radius, -10, 10, xtol=1e-15)
    return (v - t).clamp(min=0)


def slope_of(solution, at, h=1e-6):
    """The central difference."""
    return (solution(at + h) - solution(at - h)) / (2 * h)


RADII = [
    projections.simplex,
    projections.l1_ball,
    projections.l2_ball,
    projections.linf_ball,
    projections.l2_sphere,
    projections.hypercube,
    projections.box,
]
# Every way in, with the hyperparameter that both the objective and the optional argument can take.
WAYS = {
    "argmin": lambda project, lam: argmin(regularised, project=project)(START, lam),
    "argmin, prox": lambda project, lam: argmin(regularised, prox=prox.from_projection(project))(
        START, lam
    ),
    "FISTA": lambda project, lam: FISTA(prox.from_projection(project))(regularised, START, lam),
    "ProjectedGradient": lambda project, lam: implicit_grad(
        lambda w, lam: w.sum(), ProjectedGradient(regularised, project), START, lam
    ),
    "ProximalGradient": lambda project, lam: implicit_grad(
        lambda w, lam: w.sum(),
        ProximalGradient(regularised, prox.from_projection(project), 0.5),
        START,
        lam,
    ),
    "custom_argmin": lambda project, lam: (
        hypergrad
        .custom_argmin(ProjectedGradient(regularised, project))(
            lambda init, lam: mixture(lam.detach())
        )(START, lam.clone().requires_grad_())
        .sum()
        .backward()
    ),
    "vmap": lambda project, lam: torch.func.vmap(argmin(regularised, project=project), (None, 0))(
        START, torch.stack([lam, 2 * lam])
    ),
    "grad": lambda project, lam: torch.func.grad(
        lambda lam: argmin(regularised, project=project)(START, lam).sum()
    )(lam),
    "vmap of grad": lambda project, lam: torch.func.vmap(
        torch.func.grad(lambda lam: argmin(regularised, project=project)(START, lam).sum())
    )(torch.stack([lam, 2 * lam])),
    "number": lambda project, lam: argmin(regularised, project=project)(START, 0.05),
    "whole number": lambda project, lam: argmin(regularised, project=project)(START, 2),
    "integer tensor": lambda project, lam: argmin(regularised, project=project)(
        START, torch.tensor(2)
    ),
    "float32": lambda project, lam: argmin(regularised, project=project)(
        START.float(), lam.float()
    ),
}


@pytest.mark.parametrize("project", RADII, ids=lambda project: project.__name__)
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
def test_a_hyperparameter_of_the_objective_is_no_radius_in_silence(way, project):
    name = project.__name__
    with pytest.raises(hypergrad.StructureMismatch) as caught:
        way(project, LAM)
    assert caught.value.argument == "project"
    assert f"lambda v: {name}(v), with the default of" in str(caught.value)
    assert f"lambda v, lam: {name}(v, lam)." in str(caught.value)


def test_both_cures_do_what_the_message_says():
    for cure, right in (
        (lambda v: projections.simplex(v), mixture),
        (lambda v, lam: projections.simplex(v, lam), lambda lam: mixture(lam, float(lam))),
    ):
        fit = argmin(regularised, project=cure, solver=TIGHT)
        torch.testing.assert_close(fit(START, LAM), right(LAM), rtol=1e-8, atol=1e-10)
        slope = torch.func.jacrev(fit, argnums=1)(START, LAM)
        torch.testing.assert_close(slope, slope_of(right, LAM), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("shrink", [prox.l1, prox.ridge, prox.non_negative_l1, prox.group_lasso])
def test_a_proximal_map_s_penalty_is_asked_for_too(shrink):
    name = shrink.__name__
    calls = (
        lambda: FISTA(shrink)(regularised, START, LAM),
        lambda: argmin(regularised, prox=shrink)(START, LAM),
        lambda: implicit_grad(
            lambda w, lam: w.sum(), ProximalGradient(regularised, shrink, 0.5), START, LAM
        ),
    )
    for call in calls:
        with pytest.raises(hypergrad.StructureMismatch) as caught:
            call()
        assert f"lambda v, step_size: {name}(v, step_size), with" in str(caught.value)
        assert f"lambda v, step_size, lam: {name}(v, step_size, lam)." in str(caught.value)
    # Where the objective leaves it alone, it is the penalty: w = soft threshold of C at 0.3.
    lam = torch.tensor(0.3, dtype=F64)
    fit = argmin(plain, prox=prox.l1, solver=TIGHT)
    expected = torch.tensor([0.6, 0.2, 0.0], dtype=F64)
    torch.testing.assert_close(fit(START, lam), expected)
    slope = torch.func.jacrev(fit, argnums=1)(START, lam)
    torch.testing.assert_close(slope, torch.tensor([-1.0, -1.0, 0.0], dtype=F64))


def test_a_name_that_both_have_is_the_radius():
    # The objective uses it too, and says by its name that it is the projection's.
    def objective(w, radius):
        return regularised(w, radius)

    right = lambda radius: mixture(radius, float(radius))
    radius = torch.tensor(0.6, dtype=F64)
    fit = argmin(objective, project=projections.simplex, solver=TIGHT)
    torch.testing.assert_close(fit(START, radius), right(radius), rtol=1e-8, atol=1e-10)
    x, _ = FISTA(prox.from_projection(projections.simplex), tol=1e-12)(objective, START, radius)
    torch.testing.assert_close(x, right(radius), rtol=1e-8, atol=1e-10)
    weights = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    for slope in (
        torch.func.grad(lambda radius: fit(START, radius) @ weights)(radius),
        implicit_grad(
            lambda w, radius: w @ weights,
            ProjectedGradient(objective, projections.simplex),
            right(radius),
            radius,
        ),
    ):
        torch.testing.assert_close(slope, slope_of(right, radius) @ weights, rtol=1e-6, atol=0)


def test_a_radius_that_the_objective_leaves_alone_is_passed():
    radius = torch.tensor(0.6, dtype=F64)
    fit = argmin(plain, project=projections.simplex, solver=TIGHT)
    right = lambda radius: mixture(torch.tensor(0.0, dtype=F64), float(radius))
    for given in (radius, 0.6):
        torch.testing.assert_close(fit(START, given), right(radius), rtol=1e-8, atol=1e-10)
    slope = torch.func.jacrev(fit, argnums=1)(START, radius)
    torch.testing.assert_close(slope, slope_of(right, radius), rtol=1e-6, atol=1e-9)
    mapped = torch.func.vmap(fit, (None, 0))(START, torch.stack([radius, 2 * radius]))
    torch.testing.assert_close(mapped[0], right(radius), rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(mapped[1], right(2 * radius), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "project",
    [
        lambda *args: projections.simplex(args[0]),
        lambda v, lam: projections.simplex(v),
        lambda v, lam=None: projections.simplex(v),  # the objective's own name
        lambda v, *, radius=1.0: projections.simplex(v, radius),
        functools.partial(projections.simplex, radius=1.0),
        projections.birkhoff,
    ],
    ids=["all", "required", "named alike", "by keyword", "partial", "no option"],
)
def test_what_is_clear_is_not_asked_for(project):
    if project is projections.birkhoff:  # of a matrix of one row: a one
        one = torch.ones(1, 1, dtype=F64)
        fit = argmin(lambda w, lam: (w**2).sum() * (1 + lam), project=project)
        torch.testing.assert_close(fit(one, LAM), one)
        return
    fit = argmin(regularised, project=project, solver=TIGHT)
    torch.testing.assert_close(fit(START, LAM), mixture(LAM), rtol=1e-8, atol=1e-10)


def test_the_default_of_a_loop_is_not_overwritten_in_silence():
    fits = [
        argmin(regularised, project=lambda v, r=r: projections.simplex(v, r)) for r in (1.0, 2.0)
    ]
    for fit in fits:
        with pytest.raises(hypergrad.StructureMismatch, match="lam as its optional argument 'r'"):
            fit(START, LAM)


def test_an_optional_argument_after_a_required_one():
    def objective(w, k, lam):
        return regularised(w, lam)

    fit = argmin(objective, project=projections.sparse_simplex)
    with pytest.raises(hypergrad.StructureMismatch) as caught:
        fit(START, 2, LAM)
    assert "lambda v, k, lam: sparse_simplex(v, k), with" in str(caught.value)
    assert "lambda v, k, lam: sparse_simplex(v, k, lam)." in str(caught.value)
    fit = argmin(objective, project=lambda v, k, lam: projections.sparse_simplex(v, k))
    # The two largest entries of C / 1.05, moved alike to the sum of one.
    first = 0.5 + 0.4 / 1.05 / 2
    expected = torch.tensor([first, 1 - first, 0.0], dtype=F64)
    torch.testing.assert_close(fit(START, 2, LAM), expected, rtol=1e-6, atol=1e-8)


def test_a_wrapper_and_a_tree_of_hyperparameters_are_looked_into():
    @functools.wraps(projections.simplex)
    def wrapped(*args):
        return projections.simplex(*args)

    with pytest.raises(hypergrad.StructureMismatch, match="lam as its optional argument 'radius'"):
        argmin(regularised, project=wrapped)(START, LAM)
    of_tree = lambda w, hparams: regularised(w, hparams["lam"])
    with pytest.raises(hypergrad.StructureMismatch, match="hparams as its optional argument"):
        argmin(of_tree, project=projections.simplex)(START, {"lam": LAM})


def test_a_number_that_an_objective_counts_with_is_used():
    def powers(w, n):
        return sum(((w - C) ** (2 * k)).sum() for k in range(1, n + 1))

    with pytest.raises(hypergrad.StructureMismatch, match="n as its optional argument 'radius'"):
        argmin(powers, project=projections.simplex)(START, 2)


def test_an_error_of_the_objective_is_its_own():
    def broken(w, lam):
        raise ZeroDivisionError("of the caller")

    with pytest.raises(ZeroDivisionError, match="of the caller"):
        argmin(broken, project=projections.simplex)(START, LAM)
    batched = torch.func.vmap(argmin(broken, project=projections.simplex), (None, 0))
    with pytest.raises(ZeroDivisionError, match="of the caller"):
        batched(START, torch.stack([LAM, LAM]))


def test_it_takes_one_evaluation_and_only_where_it_is_asked_for():
    counts = []
    for project in (
        projections.simplex,
        lambda v, lam: projections.simplex(v, lam),
        lambda v: projections.simplex(v, 0.6),
    ):
        seen = []

        def objective(w, lam, seen=seen):
            seen.append(1)
            return plain(w, lam)

        FISTA(prox.from_projection(project))(objective, START, torch.tensor(0.6, dtype=F64))
        counts.append(len(seen))
    assert counts[0] - 1 == counts[1] == counts[2]


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_a_network_in_a_ball(dtype):
    net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).to(dtype)
    start = {name: p.detach() for name, p in net.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(20, 2, generator=generator, dtype=dtype)
    y = X[:, :1].sin()

    def loss(params, decay):
        squares = sum((p**2).sum() for p in params.values())
        outputs = torch.func.functional_call(net, params, X)
        return ((outputs - y) ** 2).mean() + decay.exp() * squares / 2

    decay = torch.tensor(-3.0, dtype=dtype)
    with pytest.raises(hypergrad.StructureMismatch, match=r"lambda v: l2_ball\(v\), with"):
        argmin(loss, project=projections.l2_ball)(start, decay)
    fit = argmin(loss, project=lambda v: projections.l2_ball(v))
    size = sum((p**2).sum() for p in fit(start, decay).values()).sqrt()
    torch.testing.assert_close(size, torch.ones((), dtype=dtype), rtol=1e-5, atol=0)


def test_a_projection_is_not_passed_the_step_for_its_radius():
    for call in (
        lambda: argmin(regularised, prox=projections.simplex)(START, LAM),
        lambda: FISTA(projections.l2_ball)(regularised, START, LAM),
        lambda: FISTA(projections.simplex)(lambda w: regularised(w, LAM), START),
        lambda: implicit_grad(
            lambda w, lam: w.sum(), ProximalGradient(plain, projections.simplex), START, LAM
        ),
    ):
        with pytest.raises(hypergrad.StructureMismatch, match="take the length of the step"):
            call()
    w, _ = FISTA(projections.non_negative)(plain, START, LAM)
    torch.testing.assert_close(w, C.clamp(min=0), rtol=1e-6, atol=1e-8)
