"""Points of polyhedra: the closest, whatever the units of the rows."""

from __future__ import annotations

import pytest
import torch

from hypergrad import projections
from tests.closest_points import gap
from tests.problems import F64

SCALES = pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])


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
