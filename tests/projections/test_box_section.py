"""Points of a plane within bounds: the closest."""

from __future__ import annotations

import math

import pytest
import torch

from hypergrad import projections
from tests.closest_points import gap
from tests.problems import F64

SCALES = pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])


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
