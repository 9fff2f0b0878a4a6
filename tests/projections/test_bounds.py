"""Projections entry by entry: onto bounds."""

from __future__ import annotations

import torch
from torch.func import jacrev

from hypergrad import projections
from tests.problems import F64


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
