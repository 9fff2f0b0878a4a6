"""Row 54: kernels without a second derivative, and what does work on them."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import hypergrad
from hypergrad import CG, UnsupportedOperation, implicit_grad

D = torch.float64
torch.manual_seed(0)
X, ROWS = torch.randn(6, 3, dtype=D), torch.randint(0, 4, (8,))
CLASSES, ENDS = torch.tensor([0, 1, 2, 3, 0, 1]), torch.tensor([0, 1, 2, 3, 4, 5])
W, H = 0.3 * torch.randn(4, 3, dtype=D), torch.tensor(0.5, dtype=D)


def ctc(w):
    logits = (X @ w.T).reshape(3, 2, 4).log_softmax(2)
    lengths = torch.tensor([3, 3]), torch.tensor([1, 1])
    return F.ctc_loss(logits, torch.tensor([[1], [2]]), *lengths)


KERNELS = {
    "cdist": lambda w: torch.cdist(X, w).sum(),
    "pdist": lambda w: torch.pdist(w).sum(),
    "embedding_bag": lambda w: F.embedding_bag(ROWS, w, ENDS).square().sum(),
    "hardsigmoid": lambda w: F.hardsigmoid(X @ w.T).square().sum(),
    "multi_margin_loss": lambda w: F.multi_margin_loss(X @ w.T, CLASSES, p=2),
    "multilabel_margin_loss": lambda w: F.multilabel_margin_loss(
        X @ w.T, torch.tensor([[3, 0, -1, 1]] * 6)
    ),
    "ctc_loss": ctc,
    "segment_reduce": lambda w: (
        torch.segment_reduce(w.reshape(-1), "mean", lengths=torch.full((6,), 2)).square().sum()
    ),
}


def outer(w, h):
    return ((w - 1) ** 2).sum()


def lacks_a_second_derivative(kernel):
    """Whether this torch does; 2.14 brought those of cdist and pdist."""
    w = W.clone().requires_grad_()
    (first,) = torch.autograd.grad(kernel(w), w, create_graph=True)
    try:
        torch.autograd.grad(first.square().sum(), w)
    except (RuntimeError, NotImplementedError):
        return True
    return False


LACKING = [name for name, kernel in KERNELS.items() if lacks_a_second_derivative(kernel)]


def test_row_54_only_the_two_distances_have_gained_a_second_derivative():
    assert set(KERNELS) - set(LACKING) <= {"cdist", "pdist"}


@pytest.mark.parametrize("name", LACKING)
def test_row_54_a_kernel_without_a_second_derivative_is_named_with_what_does_work(name):
    inner = lambda w, h: 0.1 * KERNELS[name](w) + h.exp() * (w**2).sum()
    step = lambda w, h: w - 0.01 * torch.func.grad(inner)(w, h)
    fit = hypergrad.custom_argmin(inner)(lambda init, h: W)
    for call in (
        lambda: implicit_grad(outer, inner, W, H, inner_tol=None),
        lambda: implicit_grad(outer, inner, W, H, inner_tol=None, solver=CG()),
        lambda: torch.func.grad(lambda h: fit(None, h).sum())(H),
        lambda: hypergrad.unrolled_grad(outer, step, W, H, steps=2),
    ):
        with pytest.raises(UnsupportedOperation, match=rf"^{name} has no second .*penalty_grad"):
            call()
    # They do: these need first derivatives alone.
    options = {"penalty": 10.0, "lr": 0.01, "inner_tol": None, "rtol": None}
    assert hypergrad.penalty_grad(outer, inner, W, H, **options).isfinite()
    assert hypergrad.finite_difference_grad(outer, inner, W, H).isfinite()


FIRST, SECOND = torch.triu_indices(4, 4, 1)
WRITTEN_OUT = {
    "hardsigmoid": lambda w: ((X @ w.T) / 6 + 0.5).clamp(0, 1).square().sum(),
    "cdist": lambda w: (X[:, None] - w).square().sum(-1).sqrt().sum(),
    "pdist": lambda w: (w[FIRST] - w[SECOND]).square().sum(-1).sqrt().sum(),
    "multi_margin_loss": lambda w: (
        ((1 - (X @ w.T).gather(1, CLASSES[:, None]) + X @ w.T).clamp(min=0) ** 2)
        .masked_fill(F.one_hot(CLASSES, 4).bool(), 0)
        .mean()
    ),
}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_row_54_a_kernel_that_is_written_out_as_the_error_says_is_the_same(name):
    torch.testing.assert_close(WRITTEN_OUT[name](W), KERNELS[name](W))
    found = []
    for kernel in (WRITTEN_OUT[name], KERNELS[name]):
        if kernel is WRITTEN_OUT[name] or name not in LACKING:
            inner = lambda w, h, kernel=kernel: 0.1 * kernel(w) + h.exp() * (w**2).sum()
            found.append(implicit_grad(outer, inner, W, H, inner_tol=None))
    torch.testing.assert_close(found[0], found[-1])


B = (CLASSES > 0).to(D)
WEIGHTED = {
    "cross_entropy": lambda w, h: F.cross_entropy(X @ w.T, CLASSES, weight=h.exp()),
    "nll_loss": lambda w, h: F.nll_loss((X @ w.T).log_softmax(1), CLASSES, weight=h.exp()),
    "pos_weight": lambda w, h: F.binary_cross_entropy_with_logits(
        X @ w[0], B, pos_weight=h[0].exp()
    ),
    "with_logits": lambda w, h: F.binary_cross_entropy_with_logits(
        X @ w[0], B, weight=h.exp()[CLASSES]
    ),
    "probabilities": lambda w, h: F.binary_cross_entropy(
        (X @ w[0]).sigmoid(), B, weight=h.exp()[CLASSES]
    ),
}


@pytest.mark.parametrize("form", WEIGHTED)
def test_row_54_weights_that_are_hyperparameters_are_written_out(form):
    inner = lambda w, h: WEIGHTED[form](w, h) + 0.1 * (w**2).sum()
    h = torch.zeros(4, dtype=D)
    for call in (
        lambda: implicit_grad(outer, inner, W, h),
        lambda: hypergrad.penalty_grad(outer, inner, W, h, penalty=10.0, lr=0.1),
    ):
        with pytest.raises(UnsupportedOperation, match=r'weight.*reduction="none"') as caught:
            call()
        assert "penalty_grad" not in str(caught.value)
