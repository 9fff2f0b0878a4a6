"""Row 50: modules in whose forward pass a derivative would be lost are refused by name."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import hypergrad
from hypergrad import CG, UnsupportedOperation, implicit_grad
from tests.stateful_modules import State, X, answer, by_hand, losses, randn

D = torch.float64


def spectral(old=False):
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        (nn.utils.spectral_norm if old else parametrizations.spectral_norm)(net[0])
    return net


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("solver", [None, CG(maxiter=5)])
def test_row_50_spectral_norm_in_train_mode_is_refused_by_name_and_left_alone(old, solver):
    net = spectral(old)
    before = State(net)
    with pytest.raises(UnsupportedOperation, match=r"0.*spectral_norm in train mode.*module\.eval"):
        answer(net, solver=solver)
    before.assert_same()


@pytest.mark.parametrize("old", [False, True])
def test_row_50_spectral_norm_in_eval_mode_is_right(old):
    net = spectral(old)
    for _ in range(50):
        net(X)
    net.eval()
    before = State(net)
    found = answer(net)
    before.assert_same()
    torch.testing.assert_close(found, by_hand(net), rtol=1e-7, atol=1e-12)


@pytest.mark.parametrize("old", [False, True])
def test_row_50_spectral_norm_in_the_outer_loss_has_its_first_derivative(old):
    net = spectral(old)
    for _ in range(50):
        net(X)
    before = State(net)
    params = {k: v.detach() for k, v in net.named_parameters()}
    inner = lambda p, h: sum((q - h).square().sum() for q in p.values())
    outer = lambda p, h: functional_call(net, p, (X,)).square().mean()
    h = torch.tensor(0.5, dtype=D)
    hypergradient = implicit_grad(outer, inner, params, h, inner_tol=None)
    before.assert_same()
    net.eval()
    expected = implicit_grad(outer, inner, params, h, inner_tol=None)
    torch.testing.assert_close(hypergradient, expected, rtol=1e-6, atol=1e-10)


def test_row_50_spectral_norm_of_a_vector_is_a_mere_quotient():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(randn(3))
            parametrizations.spectral_norm(self)

        def forward(self, x):
            return x @ self.weight

    net = Net()
    torch.testing.assert_close(answer(net), by_hand(net), rtol=1e-7, atol=1e-12)


def test_row_50_spectral_norm_in_a_step_that_takes_a_gradient():
    net = spectral()
    before = State(net)
    params = {k: v.detach() for k, v in net.named_parameters()}

    def loss(p, h):
        return (functional_call(net, p, (X,)) - h).square().mean()

    def by_autograd(p, h):
        found = torch.autograd.grad(loss(p, h), list(p.values()), create_graph=True)
        return {k: v - 0.1 * g for (k, v), g in zip(p.items(), found, strict=True)}

    def by_func(p, h):
        found = torch.func.grad(loss)(p, h)
        return {k: v - 0.1 * found[k] for k, v in p.items()}

    for step in (by_autograd, by_func):
        with pytest.raises(UnsupportedOperation, match="spectral_norm"):
            hypergrad.unrolled_grad(
                lambda p, h: loss(p, 1.0), step, params, torch.tensor(0.0, dtype=D), steps=2
            )
        before.assert_same()


@pytest.mark.parametrize("bag", [False, True])
def test_row_50_an_embedding_with_max_norm_is_refused_before_it_moves(bag):
    kind = nn.EmbeddingBag if bag else nn.Embedding
    net = kind(5, 3, max_norm=0.5, dtype=D, **({"mode": "sum"} if bag else {}))
    ids = torch.tensor([[0, 1], [1, 4]])
    weight = {"weight": net.weight.detach()}
    kept, version = weight["weight"].clone(), weight["weight"]._version
    outer = lambda p, h: functional_call(net, p, (ids,)).square().sum()
    inner = lambda p, h: (p["weight"] - h).square().sum()
    with pytest.raises(UnsupportedOperation, match=r"max_norm=0\.5"):
        implicit_grad(outer, inner, weight, torch.tensor(0.1, dtype=D), inner_tol=None)
    assert torch.equal(weight["weight"], kept)
    assert weight["weight"]._version == version


def test_row_50_an_embedding_whose_rows_are_below_max_norm_is_right():
    net, ids = nn.Embedding(5, 3, max_norm=9.0, dtype=D), torch.tensor([0, 1, 1])
    free = nn.Embedding(5, 3, dtype=D)
    params = {"weight": net.weight.detach().clamp(-1, 1)}
    found = []
    for one in (net, free):
        outer = lambda p, h: functional_call(one, p, (ids,)).square().sum()  # noqa: B023
        inner = lambda p, h: (p["weight"] - h).square().sum()
        found.append(
            implicit_grad(outer, inner, params, torch.tensor(0.1, dtype=D), inner_tol=None)
        )
    torch.testing.assert_close(*found)


class Clamped(nn.Module):
    """Keeps its weight non-negative, by force."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 1, dtype=D), how

    def forward(self, x):
        if self.how == "data":
            self.linear.weight.data.clamp_(min=0)
        else:
            with torch.no_grad():
                self.linear.weight.clamp_(min=0)
        return self.linear(x)


@pytest.mark.parametrize("how", ["data", "no_grad"])
def test_row_50_a_module_that_overwrites_its_weight_is_refused_before_it_moves(how):
    net = Clamped(how)
    before = State(net)
    params = {k: v.detach() for k, v in net.named_parameters()}
    outer, inner = losses(net)
    with pytest.raises(UnsupportedOperation, match=r"linear\.weight.*in place"):
        implicit_grad(outer, inner, params, torch.tensor(-1.0, dtype=D), inner_tol=None)
    before.assert_same()


@pytest.mark.parametrize("how", ["data", "no_grad", "out", "setitem"])
@pytest.mark.parametrize("which", ["params", "hparams"])
def test_row_50_an_argument_is_not_overwritten_either(how, which):
    w, h = randn(3), torch.tensor([0.5, 1.0, 2.0], dtype=D)
    kept, versions = (w.clone(), h.clone()), (w._version, h._version)

    def inner(w, h):
        target = w if which == "params" else h
        if how == "data":
            target.data.mul_(2.0)
        else:
            with torch.no_grad():
                if how == "out":
                    torch.mul(target, 2.0, out=target)
                elif how == "setitem":
                    target[0] = 1.0
                else:
                    target.add_(1.0)
        return ((w - h) ** 2).sum()

    with pytest.raises(UnsupportedOperation, match=f"A loss changes {which} in place"):
        implicit_grad(lambda w, h: w.sum(), inner, w, h, inner_tol=None)
    assert torch.equal(w, kept[0])
    assert torch.equal(h, kept[1])
    assert (w._version, h._version) == versions
