"""Antithetic pairs of hyperparameters: how they are drawn and evaluated, and what they sum to."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.guard import Guard
from .._autograd.random_numbers import Draw
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import further_out
from .._autograd.transforms import outside_transforms, without_left, without_saved_tensor_hooks
from ..conditions._inner_problem import scalar
from ._inner_loop import InnerLoop, map_tensors
from ._loss import wide


@dataclasses.dataclass
class Evaluation:
    """The outer loss for a batch of hyperparameters, with one draw for all batches.

    Attributes
    ----------
    outer : callable
        The loss.
    loop : InnerLoop
        The inner solver.
    steps : int
        How many steps it makes.
    batching : str
        "vmap" or "loop".
    draw : Draw
        The random numbers of the functions.
    """

    outer: Callable[[Any, Any], Any]
    loop: InnerLoop
    steps: int
    batching: str
    draw: Draw = dataclasses.field(default_factory=Draw)
    _further_out: list[Tensor] = dataclasses.field(default_factory=list)

    def __call__(self, batch: list[Tensor]) -> Tensor:
        """Form the values, one for each row of the tensors."""
        if self.batching == "loop":
            return torch.stack([self._drawn(self._one, rows) for rows in zip(*batch, strict=True)])
        try:
            return self._drawn(torch.func.vmap(self._one, randomness="same"), batch)
        except RuntimeError as error:
            error.add_note(
                "hypergrad: the inner solver was mapped over the perturbed hyperparameters by "
                "torch.func.vmap. Where it uses .backward(), torch.optim, .item() or NumPy, pass "
                "batching='loop', which calls it for each."
            )
            raise

    def _drawn(self, fun: Callable[..., Tensor], rows: Sequence[Tensor]) -> Tensor:
        modes = (torch.inference_mode(False), torch.enable_grad(), without_saved_tensor_hooks())
        with self.draw.evaluation(), modes[0], modes[1], modes[2]:
            return fun(*rows)

    def _one(self, *variables: Tensor) -> Tensor:
        hparams = self.loop.H.rebuild(variables)
        start = self.loop.made(hparams) if callable(self.loop.init) else self.loop.start
        self._note(start)
        params = map_tensors(start, lambda t: t.detach().clone())
        params = self.loop.forward(params, list(variables), 0, self.steps, self._further_out)
        with Guard():
            returned = self.outer(params, hparams)
        value = scalar("outer", returned)
        self._note(value)
        return value.detach()

    def _note(self, tree: Any) -> None:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self._further_out += further_out(leaf, [])

    @property
    def captured(self) -> list[Tensor]:
        """The tensors that the functions capture and that are differentiated further out."""
        return [without_left(t) for t in self._further_out]


class Moments:
    """Sums over the pairs, from which mean and standard error follow.

    Parameters
    ----------
    center : list of Tensor
        The hyperparameters' variables.
    sigma : float
        The standard deviation of their perturbation.
    """

    def __init__(self, center: list[Tensor], sigma: float) -> None:
        self._center, self._sigma, self._pairs = center, sigma, 0
        self._sums = [torch.zeros_like(c, dtype=wide(c).dtype) for c in center]
        self._squares = [torch.zeros_like(s) for s in self._sums]
        self._values: Any = 0.0
        self._sizes: Any = 0.0
        self._differences: Any = 0.0
        self._eps = 0.0

    def add(self, evaluate: Evaluation, pairs: int, generator: torch.Generator | None) -> None:
        """Draw so many directions and evaluate both sides of each."""
        with outside_transforms():
            noise = [
                torch.randn((pairs, *s.shape), generator=generator, dtype=s.dtype, device=s.device)
                for s in self._sums
            ]
        moves = [(self._sigma * n).to(c.dtype) for n, c in zip(noise, self._center, strict=True)]
        values = evaluate([
            torch.cat([c + m, c - m]) for c, m in zip(self._center, moves, strict=True)
        ])
        self._eps = torch.finfo(values.dtype).eps
        values = wide(values)
        difference = values[:pairs] - values[pairs:]
        weights = difference / (2 * self._sigma)
        for place, drawn in enumerate(noise):
            terms = weights.to(drawn).reshape(-1, *[1] * (drawn.ndim - 1)) * drawn
            self._sums[place] = self._sums[place] + terms.sum(dim=0)
            self._squares[place] = self._squares[place] + terms.square().sum(dim=0)
        self._values = self._values + values.sum()
        self._sizes = self._sizes + values.square().sum()
        self._differences = self._differences + difference.square().sum()
        self._pairs += pairs

    @property
    def value(self) -> Tensor:
        """The mean of all values."""
        mean: Tensor = self._values / (2 * self._pairs)
        return mean

    def mean(self) -> list[Tensor]:
        """Form the estimate."""
        return [s / self._pairs for s in self._sums]

    def standard_error(self) -> list[Tensor]:
        """Form the standard error of each entry of the estimate; NaN for a single pair."""
        if self._pairs == 1:
            return [torch.full_like(s, math.nan) for s in self._sums]
        spread = zip(self._sums, self._squares, strict=True)
        scale = self._pairs * (self._pairs - 1)
        return [((q - s.square() / self._pairs).clamp(min=0) / scale).sqrt() for s, q in spread]

    def rounding(self) -> Tensor:
        """Measure the rounding of the values over their differences."""
        size = (self._sizes / 2).sqrt()  # of as many values as there are differences
        share: Tensor = self._eps * size / self._differences.sqrt()
        return torch.where(self._differences == 0, torch.full_like(share, math.inf), share)
