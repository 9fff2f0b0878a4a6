"""Inner problems of other kinds than a loss, and what a loss may not reach."""

from __future__ import annotations

import pytest
import torch

import hypergrad
from hypergrad import F2SA, HOAG, SOBA, Alternating, Bilevel
from tests.bilevel_quadratic import F64, Quadratic, run, sgd, start


def test_one_tensor_on_both_levels_is_refused():
    shared = torch.zeros(2, requires_grad=True)
    with pytest.raises(hypergrad.NotConnected, match=r"params\['a'\] and hparams\[0\]"):
        Bilevel(
            lambda p, h: p["a"].sum(),
            lambda p, h: p["a"].square().sum(),
            {"a": shared},
            (shared,),
            inner_optimizer=torch.optim.SGD([shared], lr=0.1),
            outer_optimizer=torch.optim.SGD([shared], lr=0.1),
        )


def test_a_loss_that_reaches_a_variable_past_its_arguments_is_refused():
    z, x = (t.requires_grad_() for t in start())
    problem = Quadratic()
    bilevel = Bilevel(
        lambda p, h: problem.outer(p, h, problem.whole_outer),
        lambda p, h: problem.inner(p, x, problem.whole_inner),
        z,
        x,
        inner_optimizer=torch.optim.SGD([z], lr=0.1),
        outer_optimizer=torch.optim.SGD([x], lr=0.1),
        method=SOBA(),
    )
    with pytest.raises(hypergrad.NotConnected, match="hparams past its arguments"):
        bilevel.step()


def test_a_fixed_point_is_iterated_by_gradient_descent_with_rate_one():
    M = torch.tensor([[0.2, 0.5], [-0.3, 0.1]], dtype=F64)
    target = torch.tensor([1.0, -1.0], dtype=F64)
    bilevel = Bilevel(
        lambda z, x: (z - target).square().sum(),
        hypergrad.FixedPoint(lambda z, x: M @ z + x),
        torch.zeros(2, dtype=F64),
        torch.zeros(2, dtype=F64),
        inner_optimizer=sgd(1.0),
        outer_optimizer=sgd(0.2),
        method=Alternating(inner_steps=15),
    )
    run(bilevel, 40)
    expected = target - M @ target
    torch.testing.assert_close(bilevel.hparams, expected, rtol=1e-4, atol=1e-4)
    # The system is not symmetric: its transpose belongs to the hypergradient.
    soba = Bilevel(
        lambda z, x: (z - target).square().sum(),
        hypergrad.FixedPoint(lambda z, x: M @ z + x),
        torch.zeros(2, dtype=F64),
        torch.zeros(2, dtype=F64),
        inner_optimizer=sgd(0.5),
        outer_optimizer=sgd(0.1),
        method=SOBA(inner_decay=0, outer_decay=0),
    )
    run(soba, 250)
    torch.testing.assert_close(soba.hparams, expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(hypergrad.UnsupportedOperation, match="F2SA needs an inner loss"):
        Bilevel(
            lambda z, x: z.sum(),
            hypergrad.FixedPoint(lambda z, x: M @ z + x),
            torch.zeros(2, dtype=F64),
            torch.zeros(2, dtype=F64),
            inner_optimizer=sgd(1.0),
            outer_optimizer=sgd(0.2),
            method=F2SA(),
        )


def test_a_proximal_step_is_an_inner_step_with_rate_one():
    """Lasso with an orthogonal design: w = y - lam sign(y), so that lam = 0.5 fits the target."""
    y, target = torch.tensor([3.0, -2.0], dtype=F64), torch.tensor([2.5, -1.5], dtype=F64)
    bilevel = Bilevel(
        lambda w, lam: (w - target).square().sum(),
        hypergrad.ProximalGradient(
            lambda w, lam: (w - y).square().sum() / 2,
            lambda v, step, lam: v.sign() * (v.abs() - step * lam).clamp(min=0),
            0.5,
        ),
        torch.zeros(2, dtype=F64),
        torch.tensor(0.2, dtype=F64),
        inner_optimizer=sgd(1.0),
        outer_optimizer=sgd(0.1),
        method=HOAG(),
    )
    run(bilevel, 60)
    # The tolerance of the last step is 2e-4 of the parameters' norm.
    torch.testing.assert_close(bilevel.hparams, torch.tensor(0.5, dtype=F64), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "method", [SOBA(inner_decay=0, outer_decay=0), Alternating(inner_tol=None)]
)
def test_every_function_of_a_condition_is_given_the_batch(method):
    rows = torch.randn(6, 3, generator=torch.Generator().manual_seed(1), dtype=F64)
    batches = [rows[:3], rows[3:]]
    condition = hypergrad.GaussNewton(
        outputs=lambda w, h, batch: batch @ w,
        loss=lambda z, h, batch: (z - batch.sum(1)).square().mean(),
        regulariser=lambda w, h, batch: h.exp() * w.square().sum() * len(batch) / 3,
    )

    def plain(w, h, batch):
        return (batch @ w - batch.sum(1)).square().mean() + h.exp() * w.square().sum()

    found = []
    for inner in (condition, plain):
        bilevel = Bilevel(
            lambda w, h, batch: (batch @ w).square().mean(),
            inner,
            torch.zeros(3, dtype=F64),
            torch.tensor(-1.0, dtype=F64),
            inner_optimizer=sgd(0.1),
            outer_optimizer=sgd(0.1),
            method=method,
            inner_batches=batches,
            outer_batches=batches,
        )
        run(bilevel, 5)
        found.append(bilevel.hparams)
    torch.testing.assert_close(*found)  # the loss is quadratic in the outputs
