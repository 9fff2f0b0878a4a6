"""The matrix taken as a multiple of the identity."""

from __future__ import annotations

import torch

from hypergrad import Identity
from tests.problems import F64, data
from tests.systems import Counting, definite


def test_the_identity_solver_divides_and_measures_nothing():
    product = Counting(definite(4))
    b = data(10, 4, dtype=F64)
    x, info = Identity(scale=4.0).solve(product, b)
    torch.testing.assert_close(x, b / 4, rtol=0, atol=0)
    assert product.count == 0
    assert info.success
    assert info.residual_norm.isnan()
