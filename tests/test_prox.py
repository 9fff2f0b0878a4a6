"""Proximal maps and projections: what they minimise, and their derivatives."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.optimize import minimize
from torch.autograd import gradcheck, gradgradcheck
from torch.func import hessian, jacrev, vmap

import hypergrad
from hypergrad import projections, prox
from tests.problems import F64, data

V = torch.tensor([1.3, -0.2, 0.4, -2.0, 0.05, 0.6], dtype=F64)


T = torch.tensor(0.35, dtype=F64)


GROUPS = torch.tensor([0, 0, 1, 1, 1, 2])


A, B = data(80, 2, 6, dtype=F64), data(81, 2, dtype=F64)


WEIGHTS = torch.tensor([0.5, 1.0, 2.0], dtype=F64)


# The maps with their arguments, and what they are the prox of: g(x), or a set's constraints.
MAPS = {
    "l1": (lambda v, t: prox.l1(v, 0.5, t), (V, T), lambda x: 0.5 * T * x.abs().sum()),
    "elastic net": (
        lambda v, t: prox.elastic_net(v, 0.5, t, 2 * t),
        (V, T),
        lambda x: 0.5 * (T * x.abs().sum() + T * x.square().sum()),
    ),
    "one group": (lambda v, t: prox.group_lasso(v, 0.5, t), (V, T), lambda x: 0.5 * T * x.norm()),
    "non-negative l1": (
        lambda v, t: prox.non_negative_l1(v, 0.5, t),
        (V, T),
        lambda x: 0.5 * T * x.sum() if (x >= 0).all() else math.inf,
    ),
    "ridge": (lambda v, t: prox.ridge(v, 0.5, t), (V, T), lambda x: 0.25 * T * x.square().sum()),
    "non-negative ridge": (
        lambda v, t: prox.non_negative_ridge(v, 0.5, t),
        (V, T),
        lambda x: 0.25 * T * x.square().sum() if (x >= 0).all() else math.inf,
    ),
    "nuclear": (
        lambda v, t: prox.nuclear(v.reshape(3, 2), 0.5, t).reshape(6),
        (V, T),
        lambda x: 0.5 * T * torch.linalg.matrix_norm(x.reshape(3, 2), "nuc"),
    ),
    "groups": (
        lambda v, t: prox.group_lasso(v, 0.5, t * WEIGHTS, groups=GROUPS),
        (V, T),
        lambda x: 0.5 * T * sum(w * x[k == GROUPS].norm() for k, w in enumerate(WEIGHTS)),
    ),
}


SETS = {
    "non-negative": (projections.non_negative, (V,)),
    "box": (lambda v, t: projections.box(v, -t, 2 * t), (V, T)),
    "simplex": (projections.simplex, (V, T)),
    "ball": (projections.l2_ball, (V, T)),
    "affine": (projections.affine_set, (V, A, B)),
}


EVERY = {**{k: (f, a) for k, (f, a, _) in MAPS.items()}, **SETS}


CASES = pytest.mark.parametrize("name", EVERY)


@pytest.mark.parametrize("name", MAPS)
def test_a_proximal_map_minimises_what_it_says(name):
    f, args, g = MAPS[name]
    x = f(*args)
    value = lambda x: (x - V).square().sum() / 2 + g(x)
    best = value(x)
    for scale in (1e-1, 1e-3, 1e-5):
        for k in range(40):
            assert value(x + scale * data(90 + k, 6, dtype=F64)) > best
    # Also along the coordinates that it has made zero.
    for i in range(6):
        for sign in (1e-6, -1e-6):
            assert value(x + sign * torch.eye(6, dtype=F64)[i]) > best


@pytest.mark.parametrize("name", SETS)
def test_a_projection_is_the_closest_point_of_its_set(name):
    f, args = SETS[name]
    x = f(*args)
    torch.testing.assert_close(f(x, *args[1:]), x)  # it is in the set
    bounds = {"non-negative": [(0, None)] * 6, "simplex": [(0, None)] * 6}
    bounds["box"] = [(-0.35, 0.7)] * 6
    constraints = {
        "simplex": [{"type": "eq", "fun": lambda x: x.sum() - 0.35}],
        "ball": [{"type": "ineq", "fun": lambda x: 0.35**2 - x @ x}],
        "affine": [{"type": "eq", "fun": lambda x: A.numpy() @ x - B.numpy()}],
    }
    found = minimize(
        lambda x: ((x - V.numpy()) ** 2).sum() / 2,
        x.numpy() + 0.1,
        jac=lambda x: x - V.numpy(),
        bounds=bounds.get(name),
        constraints=constraints.get(name, ()),
        method="SLSQP",
        options={"ftol": 1e-14, "maxiter": 500},
    )
    torch.testing.assert_close(x, torch.from_numpy(found.x), rtol=0, atol=1e-6)


@CASES
def test_first_and_second_derivatives_are_right(name):
    f, args = EVERY[name]
    leaves = tuple(a.clone().requires_grad_() for a in args)
    assert gradcheck(f, leaves, check_forward_ad=True)
    # Second derivatives of linear pieces are zero; those of what is made of them are not.
    assert gradgradcheck(lambda *a: f(*a) ** 3, leaves)


@CASES
def test_a_batch_of_proximal_maps_is_its_rows(name):
    f, (_, *more) = EVERY[name]
    rows = data(82, 5, 6, dtype=F64)
    one = lambda v: f(v, *more)
    torch.testing.assert_close(vmap(one)(rows), torch.stack([*map(one, rows)]))
    second = hessian(lambda v: (one(v) ** 3).sum())
    torch.testing.assert_close(vmap(second)(rows), torch.stack([*map(second, rows)]))


@CASES
def test_nothing_is_nan_at_zero_and_nan_stays_nan(name):
    f, (_, *more) = EVERY[name]
    zero = torch.zeros(6, dtype=F64)
    for derive in (lambda f: f, jacrev, lambda f: jacrev(jacrev(f))):
        assert torch.isfinite(derive(lambda v: f(v, *more))(zero)).all()
    poisoned = V.clone()
    poisoned[2] = math.nan
    assert torch.isnan(f(poisoned, *more)[2])


def test_derivatives_at_zero_are_those_of_the_piece_that_it_is_in():
    zero, none, eye = torch.zeros(6, dtype=F64), torch.zeros(6, 6, dtype=F64), torch.eye(6)
    for f in (
        lambda v: prox.l1(v, 0.5, T),
        lambda v: prox.group_lasso(v, 0.5, T),
        lambda v: prox.group_lasso(v, 0.5, T * WEIGHTS, groups=GROUPS),
    ):
        assert torch.equal(jacrev(f)(zero), none)  # inside the threshold
    torch.testing.assert_close(jacrev(lambda v: projections.l2_ball(v, T))(zero), eye.to(F64))
    # One group at zero beside others that are not.
    v = torch.cat([torch.zeros(2), torch.ones(4)]).to(F64)
    found = jacrev(lambda v: prox.group_lasso(v, 0.5, T, groups=GROUPS))(v)
    assert torch.equal(found[:2], none[:2])
    assert torch.equal(found[:, :2], none[:, :2])
    torch.testing.assert_close(found[5, 5], torch.ones((), dtype=F64))  # a group of one entry


@CASES
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_tiny_and_huge_entries_keep_their_digits(name, scale):
    # A map of sets and penalties that scale with the point scales with it.
    f, (v, *more) = EVERY[name]
    scaled = [a * scale if a.ndim < 2 else a for a in more]
    single = [a.float() for a in (v * scale, *scaled)]
    found = f(*single).double() / scale
    if name in {"elastic net", "ridge", "non-negative ridge"}:
        # Their second penalty is no length: against the formula.
        t = more[0] * scale
        if name != "elastic net":
            kept = v if name == "ridge" else torch.relu(v)
            torch.testing.assert_close(found, kept / (1 + 0.5 * t), rtol=1e-5, atol=1e-6)
            return
        shrunk = torch.sign(v) * torch.relu(v.abs() - 0.5 * more[0])
        torch.testing.assert_close(found, shrunk / (1 + t), rtol=1e-5, atol=1e-6)
        return
    torch.testing.assert_close(found, f(v, *more), rtol=1e-5, atol=1e-6)


def test_at_a_kink_what_is_held_counts_as_held():
    one = torch.ones((), dtype=F64)
    slope = lambda f, at: float(jacrev(f)(torch.tensor(at, dtype=F64)))
    assert slope(lambda v: prox.l1(v, one, one), 1.0) == 0
    assert slope(lambda v: prox.l1(v, one, one), -1.0) == 0
    assert slope(projections.non_negative, 0.0) == 0
    assert slope(lambda v: projections.box(v, 0.0, 1.0), 0.0) == 0
    assert slope(lambda v: projections.box(v, 0.0, 1.0), 1.0) == 0
    assert slope(lambda upper: projections.box(one, 0.0, upper), 1.0) == 1
    v = torch.tensor([3.0, 4.0], dtype=F64)
    assert torch.equal(jacrev(lambda v: prox.group_lasso(v, 1.0, 5.0))(v), torch.zeros(2, 2))
    radial = jacrev(projections.l2_ball)(v / 5) @ v
    torch.testing.assert_close(radial, torch.zeros(2, dtype=F64), rtol=0, atol=1e-12)


def test_pytrees_go_leaf_by_leaf_and_the_ball_takes_them_together():
    tree = {"a": V[:2], "b": [V[2:], None], "n": torch.tensor([1, -2])}
    thresholds = {"a": T, "b": [2 * T, None], "n": None}
    found = prox.soft_threshold(tree, thresholds)
    torch.testing.assert_close(found["b"][0], prox.soft_threshold(V[2:], 2 * T))
    assert found["b"][1] is None
    assert torch.equal(found["n"], tree["n"])
    torch.testing.assert_close(prox.l1(tree, 0.5, T)["a"], prox.soft_threshold(V[:2], T / 2))
    groups = prox.group_lasso(tree, 0.5, T)
    torch.testing.assert_close(groups["a"], prox.group_lasso(V[:2], 0.5, T))
    # Of what the ball takes together nobody can tell whether integers are coordinates.
    with pytest.raises(hypergrad.StructureMismatch, match=r"v\['n'\] is a tensor of torch.int64"):
        projections.l2_ball(tree, T)
    ball = projections.l2_ball({"a": tree["a"], "b": tree["b"]}, T)
    torch.testing.assert_close(torch.cat([ball["a"], ball["b"][0]]), projections.l2_ball(V, T))
    box = projections.box(tree, upper={"a": 0.0, "b": [0.3, None], "n": None})
    torch.testing.assert_close(box["b"][0], V[2:].clamp(max=0.3))
    with pytest.raises(hypergrad.StructureMismatch, match="must be one number"):
        prox.l1(tree, 0.5, {"a": T})
    with pytest.raises(hypergrad.StructureMismatch, match="must be one number"):
        projections.box(tree, lower=[0.0])


def test_what_is_no_map_is_refused_or_nan():
    for f in (
        lambda t: prox.l1(V, 1.0, t),
        lambda t: prox.elastic_net(V, 1.0, 0.1, t),
        lambda t: prox.group_lasso(V, 1.0, t),
    ):
        with pytest.raises(ValueError, match="must not be negative"):
            f(-0.5)
        assert torch.isnan(f(torch.tensor(-0.5, dtype=F64))).all()
    for f in (projections.simplex, projections.l2_ball):
        with pytest.raises(hypergrad.StructureMismatch, match="radius must be one number"):
            f(V, V)
    with pytest.raises(hypergrad.StructureMismatch, match="affine_set needs"):
        projections.affine_set(V, A.T, B)
    with pytest.raises(ValueError, match="groups must be shaped like v"):
        prox.group_lasso(V, 1.0, T, groups=GROUPS[:3])


def test_integers_and_numbers_are_mapped_too():
    threshold = torch.tensor(0.5)
    mapped = prox.l1({"n": torch.tensor([-1, 3]), "x": 2.0, "none": None}, threshold, 1.0)
    assert torch.equal(mapped["n"], torch.tensor([-0.5, 2.5]))
    assert torch.equal(mapped["x"], torch.tensor(1.5))
    assert mapped["none"] is None
    assert torch.equal(prox.ridge(4, 1.0, 1.0), torch.tensor(2.0))
    for f in (prox.l1, prox.ridge, prox.group_lasso, prox.non_negative_l1):
        with pytest.raises(hypergrad.StructureMismatch, match=r"v\[1\] is of type str"):
            f((torch.ones(2), "text"), 1.0, 0.5)


def test_a_projection_is_a_proximal_map_with_a_step_that_it_has_no_use_for():
    bounded = prox.from_projection(projections.box)
    assert torch.equal(bounded(V, 0.1, -T, T), projections.box(V, -T, T))
    assert torch.equal(bounded(V, 7.0, upper=T), projections.box(V, upper=T))
