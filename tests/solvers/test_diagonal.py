"""Equations that do not know of each other: `Auto` notices, and is never deceived."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap

import hypergrad
from hypergrad import Auto, Status
from tests.problems import F64, data

N = 700  # above what is factorised at once
DIAGONAL = torch.linspace(0.5, 4.0, N, dtype=F64)


class Counting:
    def __init__(self, product):
        self.product, self.count = product, 0

    def __call__(self, v):
        self.count += 1
        return self.product(v)


@pytest.mark.parametrize("dtype", [torch.float32, F64], ids=str)
@pytest.mark.parametrize("spread", [1e-8, 1.0, 1e8])
def test_a_diagonal_takes_three_products_in_any_units(dtype, spread):
    diagonal = (spread ** torch.linspace(-1, 1, N, dtype=F64) * DIAGONAL).to(dtype)
    diagonal[::3] *= -1
    b = data(1, N, dtype=F64).to(dtype)
    product = Counting(lambda v: diagonal * v)
    before = torch.get_rng_state()
    x, info = Auto().solve(product, b)
    assert torch.equal(before, torch.get_rng_state())
    torch.testing.assert_close(x, b / diagonal)
    assert info.method == "Auto: entry by entry"
    assert info.status == Status.CONVERGED
    assert info.matvecs == product.count == 3
    assert info.residual_norm < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("coupling", [1e-9, 1e-3, 0.3])
def test_what_is_nearly_diagonal_is_solved_as_ever_for_two_products_more(coupling):
    def product(v):
        return DIAGONAL * v + coupling * v.roll(1)

    b, counted = data(2, N, dtype=F64), Counting(product)
    x, info = Auto(rtol=1e-12).solve(counted, b)
    assert info.method != "Auto: entry by entry"
    assert info.success
    assert (product(x) - b).norm() <= 1e-11 * b.norm()
    assert info.matvecs == counted.count


def test_rows_that_all_sum_to_the_same_are_not_taken_for_a_diagonal():
    """A product with ones sees the same of this matrix as of 3 I, and b = 1 is solved by both."""
    product = lambda v: 2 * v + v.roll(1)
    x, info = Auto().solve(product, torch.ones(N, dtype=F64))
    assert info.method != "Auto: entry by entry"
    torch.testing.assert_close(x, torch.full((N,), 1 / 3, dtype=F64), rtol=1e-5, atol=0)


def test_an_entry_of_zero_is_left_to_the_other_methods():
    diagonal = DIAGONAL.clone()
    diagonal[5] = 0
    b = data(3, N, dtype=F64)
    _, info = Auto().solve(lambda v: diagonal * v, b)
    assert not info.success
    b[5] = 0
    x, info = Auto().solve(lambda v: diagonal * v, b)
    assert info.success
    torch.testing.assert_close(diagonal * x, b, rtol=1e-5, atol=1e-5)


def test_roots_entry_by_entry_cost_three_products_and_carry_their_evidence():
    F = lambda x, q, mu: (x - mu).sinh() - q
    q, mu = torch.linspace(-5, 5, N, dtype=F64), torch.tensor(0.3, dtype=F64)
    seen = []

    @hypergrad.custom_root(F, callback=seen.append)
    def solve(init, q, mu):
        return mu + q.asinh()

    q, mu = q.requires_grad_(), mu.requires_grad_()
    by_q, by_mu = torch.autograd.grad(solve(None, q, mu).square().sum(), (q, mu))
    x = mu + q.asinh()
    right = torch.autograd.grad(x.square().sum(), (q, mu))
    torch.testing.assert_close(by_q, right[0])
    torch.testing.assert_close(by_mu, right[1])
    assert seen[0].matvecs <= 3
    assert seen[0].success
    x = x.detach() + 1e-5  # not quite a root: how far off the answer is, the diagonal knows
    hypergradient, info = hypergrad.implicit_grad(
        lambda x, mu: x.square().sum(),
        hypergrad.Root(lambda x, mu: F(x, q.detach(), mu)),
        x,
        mu.detach(),
        return_info=True,
    )
    assert info.method == "Auto: entry by entry"
    missed = abs(float((hypergradient - right[1]) / right[1]))
    assert missed / 2 <= info.error_estimate < 1e-2


def test_tasks_are_diagonal_together_or_not_at_all():
    b = data(4, 3, N, dtype=F64)
    scales = torch.tensor([1.0, 2.0, 3.0], dtype=F64)
    for coupling in (torch.zeros(3, dtype=F64), torch.tensor([0.0, 0.0, 0.5], dtype=F64)):

        def one(b, scale, c):
            condition = hypergrad.Root(lambda x, b: scale * DIAGONAL * x + c * x.roll(1) - b)
            A = torch.diag(scale * DIAGONAL) + c * torch.eye(N, dtype=F64).roll(1, 0)
            x = torch.linalg.solve(A, b)
            return hypergrad.implicit_grad(lambda x, b: x.sum(), condition, x, b)

        found = vmap(one)(b, scales, coupling)
        for row, scale, c in zip(found, scales, coupling, strict=True):
            A = torch.diag(scale * DIAGONAL) + c * torch.eye(N, dtype=F64).roll(1, 0)
            right = torch.linalg.solve(A.T, torch.ones(N, dtype=F64))
            torch.testing.assert_close(row, right, rtol=1e-5, atol=1e-6)
