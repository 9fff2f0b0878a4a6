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


@pytest.mark.parametrize("seed", range(5))
def test_a_loose_tolerance_in_one_unit_hides_nothing(seed: int):
    generator = torch.Generator().manual_seed(seed)
    n = 80
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    curvatures = torch.logspace(-1, 0, n, dtype=torch.float64)
    curvatures[:20] = 4e-3  # a weight decay alone, as flat directions of a network have it
    A = q @ torch.diag(curvatures) @ q.T
    h, c = torch.randn(2, n, generator=generator, dtype=torch.float64)
    w = torch.linalg.solve(A, h)
    inner = lambda w, h: w @ (A.float() @ w) / 2 - h @ w
    grad, info = hypergrad.implicit_grad(
        lambda w, h: c.float() @ w,
        inner,
        w.float(),
        h.float(),
        inner_tol=None,
        solver=hypergrad.CG(rtol=1e-2),
        return_info=True,
    )
    exact = torch.linalg.solve(A, c)
    assert (grad.double() - exact).norm() < 0.2 * exact.norm()
    assert info.residual_norm > 1e-3
    assert info.success
