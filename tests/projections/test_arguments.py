"""What projections ask of their arguments: sets with points, shapes that agree, numbers."""

from __future__ import annotations

import math

import pytest
import torch
from torch.func import vmap

import hypergrad
from hypergrad import projections
from tests.problems import F64, data

V, T = data(60, 5, dtype=F64), torch.tensor(0.7, dtype=F64)


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
