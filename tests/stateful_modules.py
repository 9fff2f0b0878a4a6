"""Modules that change what they hold when they are called, and the truth by hand."""

from __future__ import annotations

import torch
from torch import nn
from torch.func import functional_call

from hypergrad import implicit_grad

D = torch.float64


def randn(*shape, seed=0):
    return torch.randn(*shape, dtype=D, generator=torch.Generator().manual_seed(seed))


X, X_VAL = randn(8, 3), randn(8, 3, seed=1)


def losses(net, call=None):
    """A small ridge problem on a network's outputs."""
    call = call or (lambda p, x: functional_call(net, p, (x,)))

    def inner(p, h):
        return (call(p, X) - 1).square().mean() + h.exp() * sum((q**2).sum() for q in p.values())

    def outer(p, h):
        return (call(p, X_VAL) - 1).square().mean()

    return outer, inner


def answer(net, call=None, **options):
    outer, inner = losses(net, call)
    params = {k: v.detach() for k, v in net.named_parameters()}
    h = torch.tensor(-1.0, dtype=D)
    return implicit_grad(outer, inner, params, h, inner_tol=None, on_failure="ignore", **options)


def by_hand(net, call=None):
    """The same by the dense Hessian, the network a function without a state."""
    outer, inner = losses(net, call)
    names = [k for k, _ in net.named_parameters()]
    shapes = [v.shape for _, v in net.named_parameters()]
    sizes = [v.numel() for _, v in net.named_parameters()]
    flat = torch.cat([v.detach().reshape(-1) for _, v in net.named_parameters()])
    h = torch.tensor(-1.0, dtype=D)

    def tree(w):
        parts = zip(names, torch.split(w, sizes), shapes, strict=True)
        return {k: part.reshape(shape) for k, part, shape in parts}

    w = flat.requires_grad_()
    lam = h.clone().requires_grad_()
    (g,) = torch.autograd.grad(inner(tree(w), lam), w, create_graph=True)
    rows = [torch.autograd.grad(g[i], (w, lam), retain_graph=True) for i in range(len(w))]
    A = torch.stack([row[0] for row in rows])
    cross = torch.stack([row[1] for row in rows])
    b, direct = torch.autograd.grad(outer(tree(w), lam), (w, lam), allow_unused=True)
    assert direct is None
    return -(torch.linalg.solve(A, b) @ cross)


class State:
    """What a network's modules hold, to the bit, the identity of every tensor and its version."""

    def __init__(self, net):
        self.net = net
        self.attributes = {n: dict(m.__dict__) for n, m in net.named_modules()}
        self.slots = {n: dict(m._buffers) for n, m in net.named_modules()}
        self.tensors = [
            (t, t.clone(), t._version)
            for m in net.modules()
            for t in [*m._buffers.values(), *m.__dict__.values(), *m._parameters.values()]
            if isinstance(t, torch.Tensor)
        ]

    def assert_same(self):
        for name, module in self.net.named_modules():
            assert module.__dict__.keys() == self.attributes[name].keys()
            assert all(module.__dict__[k] is v for k, v in self.attributes[name].items())
            assert module._buffers.keys() == self.slots[name].keys()
            assert all(module._buffers[k] is v for k, v in self.slots[name].items())
        for tensor, values, version in self.tensors:
            assert torch.equal(tensor.detach(), values.detach())
            assert tensor._version == version


class Counts(nn.Module):
    """A linear layer that counts its calls, as buffers and as a number."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1, dtype=D)
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long), persistent=False)
        self.number = 0

    def forward(self, x):
        self.calls += 1
        self.seen = self.seen + len(x)
        self.number += 1
        return self.linear(x)


class MovingAverage(nn.Module):
    """Centres by a moving average that every call updates, in place or by a new buffer."""

    def __init__(self, how):
        super().__init__()
        self.linear, self.how = nn.Linear(3, 1, dtype=D), how
        if how == "attribute":
            self.mean = torch.ones(3, dtype=D)
        else:
            self.register_buffer("mean", torch.ones(3, dtype=D))

    def forward(self, x):
        if self.how == "new":
            self.mean = 0.9 * self.mean + 0.1 * x.mean(0)
        elif self.how == "data":
            self.mean.data = 0.9 * self.mean + 0.1 * x.mean(0)
        elif self.how == "out":
            torch.add(0.9 * self.mean, x.mean(0), alpha=0.1, out=self.mean)
        else:
            self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
        return self.linear(x * (1 + self.mean))
