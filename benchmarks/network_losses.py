"""Losses of a drawn network: the inner problem in its parts, and the outer loss."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hypergrad
from benchmarks.calibration_problems import Draws
from benchmarks.network_models import written_out

HYPERPARAMETERS = (
    "weight decay",
    "decay of each leaf",
    "centre",
    "centre and lambda",
    "example weights",
    "shift",
    "augmentation",
)
Leaves = dict[str, Tensor]


@dataclass(frozen=True)
class Losses:
    """A network with its data and what is asked of it.

    Attributes
    ----------
    network : Module
        Its own parameters take no part but those that are not trained.
    data : dict
        Inputs and targets, of training and validation, and what else the losses need.
    task, hyper, sense : str
        The kind of data, of hyperparameters and of outer loss.
    decay : float
        The fixed weight decay: to zero, or to the start where the network has a norm or attention.
    share : float
        The factor of an outer term in the hyperparameters alone.
    """

    network: nn.Module
    data: Leaves
    task: str
    hyper: str
    sense: str
    decay: float
    share: float

    def to(self, dtype: torch.dtype) -> Losses:
        """The same losses in another dtype."""
        data = {name: _cast(value, dtype) for name, value in self.data.items()}
        return dataclasses.replace(self, data=data)

    def written_out(self) -> Losses:
        """The same losses by elementary operations alone, in float64."""
        return dataclasses.replace(self.to(torch.float64), network=written_out(self.network))

    def outputs(self, w: Leaves, h: Leaves) -> Tensor:
        """Predictions or logits for the training data."""
        x = self.data["x"]
        if self.hyper == "augmentation":
            x = x * h["log scale"].exp() + h["noise"] * self.data["augmentation"]
        z = self._predicted(w, x)
        return z + h["shift"] if self.hyper == "shift" else z

    def loss(self, z: Tensor, h: Leaves) -> Tensor:
        """The mean loss of outputs, or a weighted one."""
        losses = self._losses(z, self.data["y"])
        if self.hyper == "example weights":
            losses = 2 * torch.sigmoid(h["weights"]) * losses
        return losses.mean()

    def regulariser(self, w: Leaves, h: Leaves) -> Tensor:
        """A quadratic penalty, in the hyperparameters where they are about it."""
        if self.hyper.startswith("centre"):
            factor = h["log lambda"].exp() if self.hyper == "centre and lambda" else self.decay
            return factor * _square({n: p - h[n] for n, p in w.items()}) / 2
        away = {n: p - self.data["pulled " + n] for n, p in w.items()}
        if self.hyper == "weight decay":
            return h["log decay"].exp() * _square(away) / 2
        if self.hyper == "decay of each leaf":
            return torch.stack([h[n].exp() * p.square().sum() for n, p in away.items()]).sum() / 2
        return self.decay * _square(away) / 2

    def inner(self, w: Leaves, h: Leaves) -> Tensor:
        """The inner objective."""
        return self.loss(self.outputs(w, h), h) + self.regulariser(w, h)

    def outer(self, w: Leaves, h: Leaves) -> Tensor:
        """The outer loss."""
        if self.sense == "distance":
            found = _square({n: p - self.data["target " + n] for n, p in w.items()}) / 2
        elif self.sense == "validation":
            found = self._losses(self._predicted(w, self.data["x val"]), self.data["y val"]).mean()
        else:
            found = self._losses(self._predicted(w, self.data["x"]), self.data["y"]).mean()
        if self.share:
            found = found + self.share * _square(h)
        return found

    def condition(self, name: str) -> hypergrad.Minimum | hypergrad.GaussNewton:
        """The inner problem as the library is given it."""
        if name == "GaussNewton":
            return hypergrad.GaussNewton(self.outputs, self.loss, self.regulariser)
        return hypergrad.Minimum(self.inner)

    def _predicted(self, w: Leaves, x: Tensor) -> Tensor:
        frozen = {n: p for n, p in self.data.items() if n in dict(self.network.named_parameters())}
        return functional_call(self.network, {**frozen, **w}, (x,))

    def _losses(self, z: Tensor, y: Tensor) -> Tensor:
        if self.task == "classes":
            return cross_entropy(z, y, reduction="none")
        return (z - y).square().sum(dim=1) / 2


def draw_losses(
    draws: Draws,
    network: nn.Module,
    shape: tuple[int, ...],
    w: Leaves,
    task: str,
    outputs: int,
    realisable: float,
) -> tuple[Losses, Leaves]:
    """Losses for a network that starts at `w`, and hyperparameters, all in float64.

    With the probability `realisable` a network near `w` has made the targets.
    """
    hyper = draws.one_of(HYPERPARAMETERS)
    rows, entries = round(draws.log_uniform(8, 24)), torch.Size(shape).numel()
    scale = draws.one_of([1.0, 1.0, 1.0, 0.1, 10.0]) * torch.ones(shape, dtype=torch.float64)
    if draws.uniform().item() < 0.15:  # one input in other units
        scale.view(-1)[0] *= draws.log_uniform(3, 300)
    teacher = draws.normal(entries, outputs) / entries**0.5
    data = {n: p.detach().double() for n, p in network.named_parameters() if n not in w}
    noise, unit = draws.one_of([0.0, 0.1, 1.0]), draws.one_of([1.0, 1.0, 1.0, 0.1, 10.0])
    # A network of the same kind has made the targets, so that little is left at the solution.
    spread = {n: p.std(correction=0) for n, p in w.items()}
    exact = draws.uniform().item() < realisable and task == "numbers" and any(spread.values())
    apart = draws.log_uniform(1e-4, 0.3)
    near = {n: p + apart * spread[n] * draws.normal(*p.shape) for n, p in w.items()}
    for name in ("", " val"):
        x = draws.normal(rows, *shape)
        z = torch.sin(2 * x.flatten(1) @ teacher) + noise * draws.normal(rows, outputs)
        x = x * scale
        if exact:
            with torch.no_grad():
                z, unit = functional_call(network, {**data, **near}, (x,)), 1.0
            if name:  # it is judged by other data
                z = z + 0.3 * draws.normal(rows, outputs)
        data["x" + name] = x
        data["y" + name] = z.argmax(dim=1) if task == "classes" else unit * z
    data["augmentation"] = draws.normal(rows, *shape) * scale
    length = torch.cat([p.flatten() for p in w.values()]).std(correction=0)
    data |= {f"target {n}": p + length * draws.normal(*p.shape) for n, p in w.items()}
    # Without a point to be pulled to, what a norm layer divides by shrinks for ever, and queries
    # may be turned against keys: no minimum, or a singular one.
    plain = isinstance(network, nn.Sequential)
    data |= {f"pulled {n}": torch.zeros_like(p) if plain else p for n, p in w.items()}
    decay = draws.log_uniform(3e-3, 0.1) * (1.0 if task == "classes" else unit**2)
    if hyper.startswith("centre"):
        decay *= 10  # iMAML's penalty is strong
    log_decay = torch.tensor(decay, dtype=torch.float64).log()
    hparams: dict[str, Leaves] = {
        "weight decay": {"log decay": log_decay},
        "decay of each leaf": {n: log_decay.clone() for n in w},
        "centre": {n: p.clone() for n, p in w.items()},
        "centre and lambda": {**{n: p.clone() for n, p in w.items()}, "log lambda": log_decay},
        "example weights": {"weights": 0.5 * draws.normal(rows)},
        "shift": {"shift": 0.1 * draws.normal(rows, outputs)},
        "augmentation": {
            "log scale": 0.1 * draws.normal(*shape),
            "noise": torch.tensor(0.1, dtype=torch.float64),
        },
    }
    share = draws.one_of([0.0, 0.0, 0.0, 0.01])
    sense = draws.one_of(["validation", "validation", "distance", "training"])
    return Losses(network, data, task, hyper, sense, decay, share), hparams[hyper]


def _square(leaves: Leaves) -> Tensor:
    return torch.stack([p.square().sum() for p in leaves.values()]).sum()


def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
    return value.to(dtype) if value.is_floating_point() else value
