"""Plans of transport: their sums, their form, and that they are the closest."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from hypergrad import projections
from tests.closest_points import gap
from tests.problems import F64

SCALES = pytest.mark.parametrize("scale", [1e-8, 1.0, 1e8])


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
