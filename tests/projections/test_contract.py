"""Projections: the closest point of the set, by what proves it, and its derivative."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacrev, vmap

import hypergrad
from hypergrad import inner_solvers, projections, prox
from tests.problems import F64, data

V, T = data(60, 5, dtype=F64), torch.tensor(0.7, dtype=F64)
A, G = data(61, 2, 5, dtype=F64), data(62, 6, 5, dtype=F64)
INSIDE = data(63, 5, dtype=F64)
LOWER, UPPER = INSIDE - 0.5, INSIDE + 0.4
M, SQUARE = data(64, 4, 3, dtype=F64), data(65, 4, 4, dtype=F64)

# Where some rows sum to what some columns do, the plan may fall apart: a kink.
ROWS = torch.tensor([0.13, 0.38, 0.29, 0.2], dtype=F64)
COLUMNS = torch.tensor([0.455, 0.235, 0.31], dtype=F64)
CASES = {
    "hypercube": (projections.hypercube, (V, T)),
    "linf_ball": (projections.linf_ball, (V, T)),
    "l1_ball": (projections.l1_ball, (V, T)),
    "l1_sphere": (projections.l1_sphere, (V, 9 * T)),
    "l2_sphere": (projections.l2_sphere, (V, T)),
    "sparse_simplex": (lambda v, t: projections.sparse_simplex(v, 3, t), (V, T)),
    "hyperplane": (projections.hyperplane, (V, INSIDE, T)),
    "halfspace": (projections.halfspace, (V, INSIDE, V @ INSIDE - 0.3)),
    "second_order_cone": (projections.second_order_cone, (V,)),
    "box_section": (projections.box_section, (V, LOWER, UPPER, A[0], A[0] @ INSIDE)),
    "polyhedron": (projections.polyhedron, (3 * V, A, A @ INSIDE, G, G @ INSIDE + 0.1)),
    "transport": (projections.transport, (M, ROWS, COLUMNS)),
    "birkhoff": (projections.birkhoff, (SQUARE,)),
    "kl_transport": (projections.kl_transport, (M, ROWS, COLUMNS)),
    "kl_birkhoff": (projections.kl_birkhoff, (SQUARE,)),
}
EVERY = pytest.mark.parametrize("name", CASES)


@EVERY
def test_first_and_second_derivatives_are_right_by_the_point_and_by_the_set(name):
    f, args = CASES[name]
    leaves = tuple(a.clone().requires_grad_() for a in args)
    assert gradcheck(f, leaves, check_forward_ad=True)
    assert gradgradcheck(lambda *a: f(*a) ** 3, leaves)


@EVERY
def test_a_batch_of_projections_is_its_rows(name):
    f, (v, *more) = CASES[name]
    rows = v + 0.3 * data(66, 3, *v.shape, dtype=F64)
    one = lambda v: f(v, *more)
    second = hessian(lambda v: (one(v) ** 3).sum())
    for g in (one, jacrev(one), second):
        torch.testing.assert_close(vmap(g)(rows), torch.stack([*map(g, rows)]))


@EVERY
def test_float32_and_nan(name):
    f, args = CASES[name]
    single = f(*(a.float() for a in args))
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), f(*args), rtol=1e-5, atol=1e-5)
    poisoned = args[0].clone()
    poisoned.view(-1)[0] = math.nan
    assert f(poisoned, *args[1:]).isnan().any()


# --- by hand -----------------------------------------------------------------------------------


def test_all_leaves_are_taken_together():
    tree = {"a": V[:2], "b": [V[2:], None]}
    normal = {"a": INSIDE[:2], "b": [INSIDE[2:], None]}
    for f, g in (
        (projections.l1_ball, projections.l1_ball),
        (projections.l1_sphere, projections.l1_sphere),
        (projections.l2_sphere, projections.l2_sphere),
        (projections.linf_ball, projections.linf_ball),
        (
            lambda v, t: projections.halfspace(v, normal, -t),
            lambda v, t: projections.halfspace(v, INSIDE, -t),
        ),
        (
            lambda v, t: projections.hyperplane(v, normal, t),
            lambda v, t: projections.hyperplane(v, INSIDE, t),
        ),
    ):
        found = f(tree, T)
        torch.testing.assert_close(torch.cat([found["a"], found["b"][0]]), g(V, T))
        assert found["b"][1] is None


# --- by what proves that a point is the closest ------------------------------------------------


def test_what_two_projections_have_in_common():
    v = data(67, 30, dtype=F64)
    on_simplex = projections.simplex(v)
    none = torch.zeros(30, dtype=F64)
    by_rows = projections.polyhedron(
        v, torch.ones(1, 30, dtype=F64), torch.ones(1, dtype=F64), -torch.eye(30, dtype=F64), none
    )
    torch.testing.assert_close(by_rows, on_simplex, rtol=0, atol=1e-14)
    section = projections.box_section(v, 0.0, math.inf, 1.0, 1.0)
    torch.testing.assert_close(section, on_simplex, rtol=0, atol=1e-15)
    plan = projections.transport(v[None], torch.ones(1, dtype=F64), section)
    torch.testing.assert_close(plan[0], section)


# --- inside a problem --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["polyhedron", "box_section", "second_order_cone", "l1_ball"])
def test_a_minimum_over_the_set_has_its_derivative(name):
    Q = data(69, 4, 4, dtype=F64)
    Q = Q @ Q.mT + torch.eye(4, dtype=F64)
    one, zero = torch.ones(4, dtype=F64), torch.zeros(4, dtype=F64)
    project = {
        "polyhedron": lambda v: projections.polyhedron(
            v, one[None], one[:1], -torch.eye(4, dtype=F64), zero
        ),
        "box_section": lambda v: projections.box_section(v, 0.0, 0.6, 1.0, 1.0),
        "second_order_cone": projections.second_order_cone,
        "l1_ball": lambda v: projections.l1_ball(v, 0.5),
    }[name]
    objective = lambda x, c: x @ Q @ x / 2 - c @ x
    condition = hypergrad.ProjectedGradient(objective, lambda v, c: project(v), step_size=0.1)
    solver = inner_solvers.FISTA(prox.from_projection(lambda v, c: project(v)), tol=1e-13)

    @hypergrad.custom_argmin(condition)
    def fit(init, c):
        return solver(objective, init, c)[0]

    cs = data(70, 2, 4, dtype=F64)
    jacobian = jacrev(lambda c: fit(zero, c))
    for c in cs:
        ends = [(fit(zero, c + e), fit(zero, c - e)) for e in 1e-5 * torch.eye(4, dtype=F64)]
        differences = torch.stack([(a - b) / 2e-5 for a, b in ends], dim=-1)
        torch.testing.assert_close(jacobian(c), differences, rtol=1e-4, atol=1e-6)
    both = torch.stack([*map(jacobian, cs)])
    torch.testing.assert_close(vmap(jacobian)(cs), both, rtol=1e-6, atol=1e-8)
