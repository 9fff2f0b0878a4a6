"""Losses of the kinds that people train, as modules called by `functional_call`, and the truth.

Each kind is a function ``(seed) -> Task``: the same code with other data, other modules and other
closures at each call, as the steps of an outer loop have them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, vmap

D = torch.float64


@dataclasses.dataclass
class Task:
    """An inner and an outer loss, and where they are evaluated."""

    outer: Callable[[Any, Any], Tensor]
    inner: Callable[[Any, Any], Tensor]
    params: dict[str, Tensor]
    hparams: dict[str, Tensor]


def hypergradient_by_hand(task: Task) -> list[Tensor]:
    """Compute the hypergradient by double autograd and a dense solve."""
    w = {k: v.detach().clone().requires_grad_() for k, v in task.params.items()}
    h = {k: v.detach().clone().requires_grad_() for k, v in task.hparams.items()}
    leaves = list(w.values())
    gradient = torch.autograd.grad(task.inner(w, h), leaves, create_graph=True)
    flat = torch.cat([g.flatten() for g in gradient])
    rows = [
        torch.cat([r.flatten() for r in torch.autograd.grad(f, leaves, retain_graph=True)])
        for f in flat
    ]
    value = task.outer(w, h)
    slopes = torch.autograd.grad(value, [*leaves, *h.values()], materialize_grads=True)
    b = torch.cat([s.flatten() for s in slopes[: len(leaves)]])
    u = torch.linalg.solve(torch.stack(rows).T, b)
    cross = torch.autograd.grad(flat @ u.detach(), list(h.values()))
    return [d - c for d, c in zip(slopes[len(leaves) :], cross, strict=True)]


def _of_module(
    seed: int,
    module: nn.Module,
    x: Callable[[torch.Generator], Tensor],
    y: Callable[[torch.Generator], Tensor],
    loss: Callable[[Tensor, Tensor], Tensor],
) -> Task:
    """Fit a module with a penalty for each of its leaves, and look at another batch."""
    g = torch.Generator().manual_seed(seed)
    module = module.to(D)
    params = {
        k: 0.3 * torch.randn(p.shape, generator=g, dtype=D) for k, p in module.named_parameters()
    }
    train, held = (x(g), y(g)), (x(g), y(g))
    hparams = {
        "strength": 1 + torch.rand(len(params), generator=g, dtype=D),
        "scale": 0.1 * torch.randn((), generator=g, dtype=D),
    }

    def inner(w: dict[str, Tensor], h: dict[str, Tensor]) -> Tensor:
        fit = loss(functional_call(module, w, train[0]), train[1])
        penalty = sum(s * (p**2).sum() for s, p in zip(h["strength"], w.values(), strict=True))
        return h["scale"].exp() * fit + penalty

    def outer(w: dict[str, Tensor], h: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(module, w, held[0]), held[1]) + 0.1 * h["strength"].sum()

    return Task(outer, inner, params, hparams)


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(shape, generator=g, dtype=D)


def _classes(rows: int, classes: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(classes, (rows,), generator=g)


def _binary(rows: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randint(2, (rows, 1), generator=g).to(D)


def bce_with_logits(seed: int) -> Task:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    return _of_module(seed, net, _normal(8, 3), _binary(8), F.binary_cross_entropy_with_logits)


def cross_entropy(seed: int) -> Task:
    net = nn.Sequential(nn.Linear(3, 4), nn.Softplus(), nn.Linear(4, 3))
    return _of_module(seed, net, _normal(8, 3), _classes(8, 3), F.cross_entropy)


def gelu_and_smooth_l1(seed: int) -> Task:
    net = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 2))
    return _of_module(seed, net, _normal(8, 3), _normal(8, 2), F.smooth_l1_loss)


def _convolutional(**batch_norm: Any) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2, **batch_norm), nn.ReLU(),
        nn.MaxPool2d(2), nn.Flatten(), nn.Linear(8, 3),
    )  # fmt: skip


def convolution_with_batch_statistics(seed: int) -> Task:
    net = _convolutional(track_running_stats=False)
    return _of_module(seed, net, _normal(5, 1, 4, 4), _classes(5, 3), F.cross_entropy)


def convolution_with_running_statistics(seed: int) -> Task:
    net = _convolutional()
    g = torch.Generator().manual_seed(seed)
    net[1].running_mean.copy_(torch.randn(2, generator=g))
    net[1].running_var.copy_(1 + torch.rand(2, generator=g))
    net.eval()
    return _of_module(seed, net, _normal(5, 1, 4, 4), _classes(5, 3), F.cross_entropy)


def layer_norm(seed: int) -> Task:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 2))
    return _of_module(seed, net, _normal(8, 3), _normal(8, 2), F.mse_loss)


class Transposed(nn.Module):
    """A group norm of what lies in memory in another order."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.GroupNorm(2, 4), nn.Linear(20, 2)

    def forward(self, x: Tensor) -> Tensor:  # (rows, 5, 3)
        return self.last(self.norm(self.first(x).transpose(1, 2)).tanh().flatten(1))


def group_norm(seed: int) -> Task:
    return _of_module(seed, Transposed(), _normal(6, 5, 3), _normal(6, 2), F.mse_loss)


class Attention(nn.Module):
    """Attention with an explicit softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(3, 3) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        return torch.softmax(q @ k.transpose(-2, -1) / 3**0.5, -1) @ v


def attention(seed: int) -> Task:
    return _of_module(seed, Attention(), _normal(2, 4, 3), _normal(2, 4, 3), F.mse_loss)


def embedding(seed: int) -> Task:
    net = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(6, 2))
    words = lambda g: torch.randint(5, (7, 2), generator=g)
    return _of_module(seed, net, words, _classes(7, 2), F.cross_entropy)


def dropout(seed: int) -> Task:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Dropout(0.5), nn.Linear(4, 1))
    return _of_module(seed, net, _normal(8, 3), _binary(8), F.binary_cross_entropy_with_logits)


class Recurrent(nn.Module):
    """A GRU cell, a few steps."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.last = nn.GRUCell(2, 3), nn.Linear(3, 1)

    def forward(self, x: Tensor) -> Tensor:
        state = x.new_zeros(x.shape[0], 3)
        for step in x.unbind(1):
            state = self.cell(step, state)
        return self.last(state)


def gru(seed: int) -> Task:
    return _of_module(seed, Recurrent(), _normal(4, 3, 2), _normal(4, 1), F.mse_loss)


class Ensemble(nn.Module):
    """A network of which several are evaluated by a vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.zeros(3, 2, 4))
        self.last = nn.Parameter(torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        def one(a: Tensor, b: Tensor) -> Tensor:
            return F.layer_norm(x @ a, (4,)).tanh() @ b

        return vmap(one)(self.first, self.last)


def vmapped_with_layer_norm(seed: int) -> Task:
    return _of_module(seed, Ensemble(), _normal(6, 2), _normal(3, 6), F.mse_loss)


class Evidence(nn.Module):
    """The negative log-likelihood of a Gaussian process, up to a constant."""

    def __init__(self) -> None:
        super().__init__()
        self.width, self.noise = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        z = x * self.width.exp()
        squares = ((z[:, None] - z[None]) ** 2).sum(-1)
        return torch.exp(-squares / 2) + (0.1 + self.noise.exp()) * torch.eye(len(x), dtype=x.dtype)


def _likelihood(K: Tensor, y: Tensor) -> Tensor:
    return (torch.logdet(K) + y @ torch.linalg.solve(K, y)) / len(y)


def logdet_and_solve(seed: int) -> Task:
    return _of_module(seed, Evidence(), _normal(6, 2), _normal(6), _likelihood)


KINDS: list[Callable[[int], Task]] = [
    bce_with_logits, cross_entropy, gelu_and_smooth_l1, convolution_with_batch_statistics,
    convolution_with_running_statistics, layer_norm, group_norm, attention, embedding, gru,
    vmapped_with_layer_norm, logdet_and_solve,
]  # fmt: skip
