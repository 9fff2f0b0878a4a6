"""Projections: the closest point of the set, by what proves it, and its derivative."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.optimize import linprog
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacrev, vmap

import hypergrad
from hypergrad import inner_solvers, projections, prox
from tests.problems import F64, data

SCALES = pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])
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
def test_a_batch_is_its_rows(name):
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


def test_spheres_and_balls():
    v = torch.tensor([3.0, -4.0, 0.0], dtype=F64)
    near = lambda found, right: torch.testing.assert_close(found, torch.tensor(right, dtype=F64))
    near(projections.l1_ball(v, 3.0), [1.0, -2.0, 0.0])
    near(projections.l1_ball(v, 8.0), v.tolist())
    near(projections.l1_sphere(v, 10.0), [4.0, -5.0, 1.0])  # an entry of 0 may go either way
    near(projections.l2_sphere(v, 10.0), [6.0, -8.0, 0.0])
    near(projections.linf_ball(v, 3.5), [3.0, -3.5, 0.0])
    # From the centre all points are equally close.
    near(projections.l1_sphere(0 * v, 6.0), [2.0, 2.0, 2.0])
    near(projections.l2_sphere(0 * v, 3.0**0.5), [1.0, 1.0, 1.0])
    # A radius of 0 leaves the origin.
    for f in (projections.l1_ball, projections.l1_sphere, projections.l2_sphere):
        assert torch.equal(f(v, 0.0).abs(), torch.zeros(3, dtype=F64))


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


def test_the_second_order_cone_and_its_opposite():
    f = projections.second_order_cone
    inside = torch.tensor([6.0, 3.0, 4.0], dtype=F64)
    assert torch.equal(f(inside), inside)
    assert torch.equal(f(-inside), torch.zeros(3, dtype=F64))
    border = torch.tensor([5.0, 3.0, 4.0], dtype=F64)
    torch.testing.assert_close(f(border), border)
    # On the border the cone counts as met: a step out of it is undone.
    outward = torch.tensor([-5.0, 3.0, 4.0], dtype=F64)
    torch.testing.assert_close(jacrev(f)(border) @ outward, torch.zeros(3, dtype=F64))
    assert torch.equal(jacrev(f)(torch.zeros(3, dtype=F64)), torch.zeros(3, 3, dtype=F64))
    columns = torch.stack([border, -2 * outward], dim=1)
    torch.testing.assert_close(f(columns, dim=0)[:, 1], f(-2 * outward))


def test_sparse_points_of_the_simplex():
    v = torch.tensor([0.9, 0.6, 0.5], dtype=F64)
    right = torch.tensor([0.65, 0.35, 0.0], dtype=F64)
    torch.testing.assert_close(projections.sparse_simplex(v, 2), right)
    torch.testing.assert_close(projections.sparse_simplex(v, 7), projections.simplex(v))
    tied = torch.ones(4, dtype=F64)
    expected = torch.tensor([0.5, 0.5, 0.0, 0.0], dtype=F64)
    torch.testing.assert_close(projections.sparse_simplex(tied, 2), expected)


def test_a_bound_that_is_met_counts_as_active():
    v = torch.tensor([0.5, 0.5], dtype=F64)
    one, zeros = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    along = torch.tensor([[0.5, -0.5], [-0.5, 0.5]], dtype=F64)
    corner = torch.zeros(2, 2, dtype=F64)
    torch.testing.assert_close(jacrev(lambda v: projections.halfspace(v, one, 1.0))(v), along)
    torch.testing.assert_close(jacrev(projections.l1_ball)(v), along)
    none = (zeros[None, :][:0], zeros[:0])
    polyhedron = lambda v: projections.polyhedron(v, *none, one[None], one[:1])
    torch.testing.assert_close(jacrev(polyhedron)(v), along)
    section = lambda v: projections.box_section(v, 0.0, 1.0, 1.0, 1.0)
    torch.testing.assert_close(jacrev(section)(v), along)
    torch.testing.assert_close(jacrev(section)(torch.tensor([1.0, 0.0], dtype=F64)), corner)


# --- by what proves that a point is the closest ------------------------------------------------


def gap(v, x, scale, **constraints):
    """How much further than x a point of the set lies in the direction v - x: 0 for the closest."""
    away = ((v - x) / scale).reshape(-1)
    furthest = linprog(-away.numpy(), **constraints)
    assert furthest.status == 0
    return -furthest.fun - float(away @ x.reshape(-1) / scale)


@SCALES
def test_points_of_polyhedra_are_the_closest_whatever_the_units_of_the_rows(scale):
    generator = torch.Generator().manual_seed(5)
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=generator)
    for trial in range(40):
        n, p, q = 1 + trial % 6, trial % 3 if trial % 6 > 2 else 0, trial % 11
        A, G, inside, v = draw(p, n), draw(q, n), scale * draw(n), 3 * scale * draw(n)
        if q > 2:
            G[1], G[2] = 2 * G[0], -G[0]  # rows that depend on each other
        if p > 1:
            A[1] = 3 * A[0]
        b, h = A @ inside, G @ inside + scale * draw(q).clamp(min=0) * G.norm(dim=1)
        units = [10 ** (4 * draw(k, 1)).clamp(-8, 8) for k in (p, q)]
        x = projections.polyhedron(
            v, units[0] * A, units[0][:, 0] * b, units[1] * G, units[1][:, 0] * h
        )
        assert ((A @ x - b).abs() <= 1e-12 * scale * A.norm(dim=1)).all()
        assert (G @ x - h <= 1e-12 * scale * G.norm(dim=1)).all()
        rows = {
            "A_ub": G.numpy() if q else None,
            "b_ub": (h / scale).numpy() if q else None,
            "A_eq": A[:1].numpy() if p else None,
            "b_eq": (b[:1] / scale).numpy() if p else None,
        }
        if p > 1:
            rows["A_eq"], rows["b_eq"] = A.numpy(), (b / scale).numpy()
        assert gap(v, x, scale, bounds=[(None, None)] * n, **rows) < 1e-9


@SCALES
@pytest.mark.parametrize("weight", [1e-8, 1.0, 1e8])
def test_points_of_sections_of_boxes_are_the_closest(scale, weight):
    generator = torch.Generator().manual_seed(6)
    draw = lambda *shape: torch.randn(*shape, dtype=F64, generator=generator)
    for trial in range(40):
        n = 1 + trial % 7
        lower, w, v = scale * draw(n), weight * draw(n), 2 * scale * draw(n)
        upper = lower + scale * draw(n).abs()
        if trial % 3 == 0:  # ties, and a level that the corner alone reaches
            lower, upper, w = 0 * v, scale + 0 * v, weight + 0 * v
            v = (v / scale).round() * scale
        if trial % 5 == 1:
            w[0] = 0
        share = torch.rand(n, generator=generator, dtype=F64)
        share = share.round() if trial % 4 == 0 else share
        level = w @ (lower + share * (upper - lower))
        if trial % 5 == 2:
            upper[0] = math.inf
        x = projections.box_section(v, lower, upper, w, level)
        assert (x >= lower).all()
        assert (x <= upper).all()
        assert (w @ x - level).abs() <= 1e-13 * scale * weight
        bounds = [(float(a), float(b)) for a, b in zip(lower / scale, upper / scale, strict=True)]
        equation = {"A_eq": (w / weight)[None].numpy(), "b_eq": [float(level / scale / weight)]}
        assert gap(v, x, scale, bounds=bounds, **equation) < 1e-9


def sums_of(m, n):
    over = np.zeros((m + n - 1, m, n))
    for i in range(m):
        over[i, i] = 1
    for j in range(n - 1):  # the last follows from the others
        over[m + j, :, j] = 1
    return over.reshape(m + n - 1, m * n)


@SCALES
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e3])
def test_plans_of_transport_are_the_closest(scale, spread):
    generator = torch.Generator().manual_seed(7)
    for trial in range(15):
        m, n = 1 + trial % 5, 1 + trial % 4
        v = scale * spread * torch.randn(m, n, dtype=F64, generator=generator)
        v = v.sign() * scale * spread if trial % 3 == 0 else v
        rows, columns = (torch.rand(k, dtype=F64, generator=generator) for k in (m, n))
        if m > 1 and trial % 2:
            rows[0] = 0
        rows, columns = scale * rows / rows.sum(), scale * columns / columns.sum()
        x = projections.transport(v, rows, columns)
        assert (x >= 0).all()
        tight = {"rtol": 0, "atol": 1e-12 * scale * max(spread, 1)}
        torch.testing.assert_close(x.sum(dim=1), rows, **tight)
        torch.testing.assert_close(x.sum(dim=0), columns, **tight)
        target = torch.cat([rows, columns[:-1]]) / scale
        worst = gap(v, x, scale, A_eq=sums_of(m, n), b_eq=target.numpy())
        assert worst < 1e-9 * max(spread, 1)


@pytest.mark.parametrize("spread", [0.1, 10.0, 200.0])
@SCALES
def test_entropic_plans_have_their_sums_and_their_form(spread, scale):
    generator = torch.Generator().manual_seed(8)
    for trial in range(10):
        m, n = 2 + trial % 4, 2 + trial % 3
        v = spread * torch.randn(m, n, dtype=F64, generator=generator)
        rows, columns = (torch.rand(k, dtype=F64, generator=generator) for k in (m, n))
        if trial % 3 == 0:
            rows[0] = 0
        rows, columns = scale * rows / rows.sum(), scale * columns / columns.sum()
        x = projections.kl_transport(v, rows, columns)
        tight = {"rtol": 0, "atol": 1e-12 * scale * max(spread, 1)}
        torch.testing.assert_close(x.sum(dim=1), rows, **tight)
        torch.testing.assert_close(x.sum(dim=0), columns, **tight)
        x, v = x[rows > 0], v[rows > 0]
        if (x > 0).all():  # log x - v is a sum of a part of the row and a part of the column
            shift = x.log() - v
            mixed = shift - shift[:1] - shift[:, :1] + shift[:1, :1]
            assert mixed.abs().max() < 1e-11 * max(spread, 1)


def test_plans_between_equal_distributions():
    eye = torch.eye(3, dtype=F64)
    torch.testing.assert_close(projections.birkhoff(5 * eye), eye)
    torch.testing.assert_close(projections.birkhoff(0 * eye), torch.full_like(eye, 1 / 3))
    forbidden = torch.where(eye > 0, 0.0, -math.inf)
    assert torch.equal(projections.kl_birkhoff(forbidden), eye)


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


# --- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize("mapped", [False, True], ids=["one", "vmap"])
def test_a_set_without_points_is_an_error_that_names_the_argument(mapped):
    over = (lambda f: vmap(f)) if mapped else (lambda f: lambda v: f(v[0]))
    one, zero = torch.ones(2, dtype=F64), torch.zeros(2, dtype=F64)
    A, eye = one[None], torch.eye(2, dtype=F64)
    empty = {
        "radius must not be negative": lambda v: projections.l1_ball(v, -T),
        "a is zero": lambda v: projections.halfspace(v, zero, -1.0),
        "a is zero and b is not met": lambda v: projections.hyperplane(v, zero, 1.0),
        "c is out of reach": lambda v: projections.box_section(v, 0.0, 1.0, 1.0, 3.0),
        "lower must not exceed upper": lambda v: projections.box_section(v, 1.0, 0.0, 1.0, 0.5),
        "no common point": lambda v: projections.polyhedron(v, A, -one[:1], -eye, zero),
        "A x = b has no solution": lambda v: projections.polyhedron(
            v, torch.cat([A, A]), torch.tensor([1.0, 2.0], dtype=F64), -eye, zero
        ),
        "rows sum to 2 and columns to 4": lambda v: projections.transport(
            torch.outer(v, v), one, 2 * one
        ),
        "columns must not be negative": lambda v: projections.kl_transport(
            torch.outer(v, v), one, torch.tensor([3.0, -1.0], dtype=F64)
        ),
        "minus infinity throughout": lambda v: projections.kl_birkhoff(
            torch.outer(v, one) + torch.tensor([[0.0, 0.0], [-math.inf, -math.inf]], dtype=F64)
        ),
    }
    for message, f in empty.items():
        with pytest.raises(ValueError, match=message):
            over(f)(data(68, 3, 2, dtype=F64))


def test_shapes_that_do_not_go_together_are_named():
    v, eye = torch.ones(3), torch.eye(3)
    for message, f in {
        "w must have the shape": lambda: projections.box_section(v, 0.0, 1.0, v[:2], 1.0),
        "c must be one number": lambda: projections.box_section(v, 0.0, 1.0, v, v),
        "v must be a vector": lambda: projections.box_section(eye, 0.0, 1.0, v, 1.0),
        "A must have the shape": lambda: projections.polyhedron(v, eye[:, :2], v, eye, v),
        "h must have the shape": lambda: projections.polyhedron(v, eye, v, eye, v[:2]),
        "a must be shaped like v": lambda: projections.hyperplane(v, v[:2], 1.0),
        "b must be one number": lambda: projections.halfspace(v, v, v),
        "radius must be one number": lambda: projections.l2_sphere(v, v),
        "rows must have the shape": lambda: projections.transport(eye, v[:2], v),
        "v must be a square matrix": lambda: projections.birkhoff(eye[:2]),
        "v must be a matrix": lambda: projections.kl_transport(v, v, v),
        "takes vectors": lambda: projections.second_order_cone(torch.tensor(1.0)),
    }.items():
        with pytest.raises(hypergrad.StructureMismatch, match=message):
            f()
    for count in (0, 1.5, True):
        with pytest.raises(ValueError, match="max_nz must be an integer"):
            projections.sparse_simplex(v, count)


def test_numbers_and_integers_are_projected_or_refused():
    number, tensor = projections.non_negative((-1.0, torch.tensor(-1.0)))
    assert float(number) == float(tensor) == 0
    assert projections.non_negative(torch.tensor([-1, 2])).tolist() == [0, 2]
    assert projections.box({"n": torch.tensor([-1, 5])}, 0, 1)["n"].tolist() == [0, 1]
    assert projections.l1_ball(torch.tensor([3, 0])).tolist() == [1, 0]
    eye = torch.eye(2)
    assert projections.simplex(torch.tensor([3, 0])).tolist() == [1, 0]
    assert projections.affine_set(torch.tensor([3, 0]), eye, torch.ones(2)).tolist() == [1, 1]
    for f in (projections.l1_ball, projections.l2_ball, projections.l1_sphere):
        with pytest.raises(hypergrad.StructureMismatch, match=r"v\[1\] is a tensor of torch.int64"):
            f((torch.ones(2), torch.tensor([1, 2])))
    for f in (projections.non_negative, projections.box, projections.linf_ball):
        with pytest.raises(hypergrad.StructureMismatch, match=r"v\['a'\] is of type str"):
            f({"a": "text"})
        with pytest.raises(hypergrad.StructureMismatch, match="complex64"):
            f(torch.ones(2) * 1j)


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
