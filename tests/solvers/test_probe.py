"""The probe of the evidence, by which rows of a matrix are measured."""

import pytest
import torch

import hypergrad
from hypergrad.solvers._probe import signs


@pytest.mark.parametrize("seed", range(3))
def test_a_row_whose_image_cancels_by_chance_hides_nothing(seed: int):
    generator = torch.Generator().manual_seed(seed)
    n, k = 64, 5
    z = signs(torch.ones(n, dtype=torch.float64))
    A = torch.diag(torch.linspace(1, 4, n, dtype=torch.float64))
    A[k, k + 1] = A[k + 1, k] = -A[k, k] * z[k] / z[k + 1]  # the probe's image of row k is zero
    A[k + 1, k + 1] = 4.0
    h, away, c = torch.randn(3, n, generator=generator, dtype=torch.float64)
    w = torch.linalg.solve(A, h)
    near = w + 1e-5 * w.norm() * away / away.norm()
    inner = lambda w, h: w @ (A.float() @ w) / 2 - h @ w
    outer = lambda w, h: c.float() @ w + w @ w
    _, info = hypergrad.implicit_grad(
        outer, inner, near.float(), h.float(), solver=hypergrad.CG(rtol=1e-4), return_info=True
    )
    assert info.success
    assert 0.9e-5 < info.inner_residual < 2e-5
