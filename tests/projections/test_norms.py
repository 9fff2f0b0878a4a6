"""Projections by the Euclidean norm: spheres and cones."""

from __future__ import annotations

import torch
from torch.func import jacrev

from hypergrad import projections
from tests.problems import F64


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
