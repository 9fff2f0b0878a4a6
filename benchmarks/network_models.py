"""Small networks of the kinds that people train, with 20 to 400 parameters.

Those with a fused layer are written out as well, by the same parameters: `written_out` has the
elementary operations alone, whose derivatives PyTorch batches several times as fast.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention, unfold

from benchmarks.calibration_problems import Draws

KINDS = ("tanh", "relu", "softplus", "layer norm", "convolution", "attention")
#: The least and the largest number of parameters, each range as often as it stands here.
SIZES = (*((20, 100),) * 3, *((101, 180),) * 5, (181, 400))
_ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "softplus": nn.Softplus,
}
OTHERS: tuple[type[nn.Module], ...] = (nn.Tanh, nn.GELU, nn.Softplus, nn.ReLU)


def written_out(network: nn.Module) -> nn.Module:
    """The same network without fused layers."""
    network = copy.copy(network)
    if hasattr(network, "fused"):
        network.fused = False
    return network


class Normalised(nn.Module):
    """One hidden layer with a layer norm before its activation."""

    def __init__(self, features: int, width: int, activation: nn.Module, outputs: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(features, width)
        self.norm = nn.LayerNorm(width)
        self.activation = activation
        self.head = nn.Linear(width, outputs)
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(rows, outputs)`` of ``(rows, features)``."""
        x = self.hidden(x)
        x = self.norm(x) if self.fused else _normalised(x, [1], self.norm)
        return self.head(self.activation(x))


class Convolution(nn.Module):
    """A convolution of images with a batch norm that has no running statistics, and a head."""

    def __init__(self, channels: int, side: int, activation: nn.Module, pool: bool, outputs: int):
        super().__init__()
        self.convolution = nn.Conv2d(1, channels, 3)
        self.norm = nn.BatchNorm2d(channels, track_running_stats=False)
        self.activation = activation
        self.head = nn.Linear(channels * (1 if pool else (side - 2) ** 2), outputs)
        self.pool = pool
        self.fused = True

    def forward(self, x: Tensor) -> Tensor:
        """Outputs ``(rows, outputs)`` of ``(rows, 1, side, side)``."""
        if self.fused:
            x = self.norm(self.convolution(x)).flatten(2)
        else:
            weight, bias = self.convolution.weight, self.convolution.bias
            assert bias is not None
            x = weight.flatten(1) @ unfold(x, 3) + bias[:, None]  # (rows, channels, places)
            x = _normalised(x.transpose(1, 2), [0, 1], self.norm).transpose(1, 2)
        x = self.activation(x)
        return self.head(x.mean(dim=2) if self.pool else x.flatten(1))


def _normalised(x: Tensor, over: list[int], norm: nn.LayerNorm | nn.BatchNorm2d) -> Tensor:
    centred = x - x.mean(dim=over, keepdim=True)
    variance = centred.square().mean(dim=over, keepdim=True)
    return centred / (variance + norm.eps).sqrt() * norm.weight + norm.bias


class Attention(nn.Module):
    """One layer of self-attention with a residual connection, the mean of its tokens, a head."""

    def __init__(self, features: int, width: int, heads: int, outputs: int, fused: bool) -> None:
        super().__init__()
        self.embedding = nn.Linear(features, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        self.head = nn.Linear(width, outputs)
        self.heads, self.fused = heads, fused

    def forward(self, x: Tensor) -> Tensor:
        """Logits or predictions ``(rows, outputs)`` of tokens ``(rows, tokens, features)``."""
        x = torch.tanh(self.embedding(x))
        rows, tokens, width = x.shape
        q, k, v = self.qkv(x).view(rows, tokens, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        if self.fused:
            with sdpa_kernel(SDPBackend.MATH):
                seen = scaled_dot_product_attention(q, k, v)
        else:
            scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            seen = torch.softmax(scores, dim=-1) @ v
        x = x + self.mix(seen.transpose(1, 2).reshape(rows, tokens, width))
        return self.head(x.mean(dim=1))


def model(
    draws: Draws, kind: str, outputs: int, size: tuple[int, int], head_only: bool
) -> tuple[nn.Module, tuple[int, ...], list[str]]:
    """A network, the shape of one of its inputs, and the names of what is trained.

    Their number is in the range `size`. With `head_only` the last layer alone is trained.
    """
    low, high = size
    while True:
        network, shape = _any(draws, kind, outputs)
        names = [name for name, _ in network.named_parameters()]
        if head_only:
            names = names[-2:]
        if low <= sum(network.get_parameter(name).numel() for name in names) <= high:
            return network, shape, names


def _any(draws: Draws, kind: str, outputs: int) -> tuple[nn.Module, tuple[int, ...]]:
    features, width = round(draws.log_uniform(2, 8)), round(draws.log_uniform(2, 60))
    with torch.random.fork_rng(devices=[]):  # each layer as PyTorch initialises it
        torch.manual_seed(int(draws.uniform().item() * 2**31))
        if kind == "attention":
            tokens, heads = draws.one_of([2, 3, 4]), draws.one_of([1, 2])
            width = heads * draws.one_of([1, 2, 3, 4, 8])
            fused = draws.one_of([True, False])
            return Attention(features, width, heads, outputs, fused), (tokens, features)
        activation = _ACTIVATIONS[kind]() if kind in _ACTIVATIONS else draws.one_of(OTHERS)()
        if kind == "convolution":
            side, channels = draws.one_of([4, 5]), round(draws.log_uniform(1, 12))
            pool = draws.one_of([True, False])
            return Convolution(channels, side, activation, pool, outputs), (1, side, side)
        if kind == "layer norm":
            return Normalised(features, width, activation, outputs), (features,)
        layers: list[nn.Module] = [nn.Linear(features, width), activation]
        if draws.one_of([True, False, False]):
            layers += [nn.Linear(width, width), activation]
        return nn.Sequential(*layers, nn.Linear(width, outputs)), (features,)
