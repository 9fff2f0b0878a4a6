"""SABA: SOBA with the variance reduction of SAGA on all five derivatives."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor

from .._errors import UnsupportedOperation
from .._pytrees import Layout
from ._batches import Batch, Batches
from ._levels import Levels
from ._method import Method, State, check_decays, check_rate, decayed, linear_rate
from ._soba import Directions, record
from ._step_info import StepInfo


@dataclasses.dataclass(frozen=True)
class SABA(Method):
    """The stochastic average bilevel algorithm of Dagréou et al. (2022).

    `SOBA` in which each derivative of a batch is replaced by the SAGA estimate: its value, less
    what it was when the batch was last drawn, plus the mean over all batches of what they were
    when last drawn. The noise goes to zero as the iterates converge, so that constant learning
    rates reach the optimum.

    Both levels' batches must be sequences, from which batches are drawn at random, with
    replacement, and which have a place in the memory each: a list of batches, say. The losses
    that are minimised are the plain means over the batches. The memory is filled by one pass
    through all batches at the first step; it holds, for n inner and m outer batches,
    ``n (2 P + H) + m (P + H)`` numbers with P parameters and H hyperparameters.

    Parameters
    ----------
    linear_lr : float, optional
        As in `SOBA`.
    inner_decay, outer_decay : float
        The exponents of the learning rates, which are constant in the paper.

    References
    ----------
    Dagréou, Ablin, Vaiter and Moreau, A framework for bilevel optimization that enables
    stochastic and global variance reduction algorithms, NeurIPS 2022, equation 8; Defazio, Bach
    and Lacoste-Julien, SAGA, 2014.

    Examples
    --------
    >>> import hypergrad
    >>> hypergrad.SABA(linear_lr=0.1)
    SABA(linear_lr=0.1, inner_decay=0.0, outer_decay=0.0)
    """

    linear_lr: float | None = None
    inner_decay: float = 0.0
    outer_decay: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        check_rate("linear_lr", self.linear_lr)
        check_decays(inner_decay=self.inner_decay, outer_decay=self.outer_decay)

    def start(self, levels: Levels) -> State:
        """The running solution of the linear system, and the memory, still empty."""
        n, m = (_count(b) for b in (levels.inner_batches, levels.outer_batches))
        P, H = (
            levels.zeros(),
            _flat(levels).flatten([
                torch.zeros_like(v, requires_grad=False) for v in levels.hparams.variables
            ]),
        )
        memory = {
            "inner": P.new_zeros(n, 2, len(P)),
            "cross": H.new_zeros(n, len(H)),
            "by_params": P.new_zeros(m, len(P)),
            "direct": H.new_zeros(m, len(H)),
        }
        means = {name: torch.zeros_like(table[0]) for name, table in memory.items()}
        return {"u": P, "filled": False, "memory": memory, "means": means}

    def step(self, levels: Levels) -> StepInfo:
        """Make one outer step."""
        if any(levels.given):
            raise UnsupportedOperation(
                "SABA keeps what it has seen of each batch, and so draws the batches itself. Pass "
                "inner_batches and outer_batches to Bilevel, as sequences, and call step()."
            )
        state = levels.state
        if not state["filled"]:
            self._fill(levels)
        i, j = levels.inner_batch(), levels.outer_batch()
        found, value = self._seen(levels, i, j)
        reduced: dict[str, Tensor] = {}
        for name, place in (("inner", i), ("cross", i), ("by_params", j), ("direct", j)):
            assert place.index is not None
            table, mean = state["memory"][name], state["means"][name]
            change = found[name] - table[place.index]
            reduced[name] = change + mean
            table[place.index] = found[name]
            state["means"][name] = mean + change / len(table)
            if levels.steps % len(table) == len(table) - 1:
                state["means"][name] = table.mean(dim=0)  # rounding does not add up
        gradient, product = reduced["inner"]
        outer = [
            part.to(v.dtype)
            for part, v in zip(
                _flat(levels).split(reduced["direct"] - reduced["cross"]),
                levels.hparams.variables,
                strict=True,
            )
        ]
        directions = Directions(
            inner=gradient,
            linear=product - reduced["by_params"],
            outer=outer,
            value=value,
            norm=torch.linalg.vector_norm(gradient),
        )
        shrink, decay = (decayed(e, levels.steps) for e in (self.inner_decay, self.outer_decay))
        rate = linear_rate(self, self.linear_lr, levels) * shrink
        levels.require_finite(
            the_inner_gradient=gradient,
            the_linear_system=directions.linear,
            the_hypergradient=outer,
        )
        levels.move_inner(gradient, shrink)
        state["u"] = torch.sub(state["u"], directions.linear, alpha=rate)
        levels.move_outer(outer, decay)
        return record(levels, directions, outer)

    def _seen(self, levels: Levels, i: Batch, j: Batch) -> tuple[dict[str, Tensor], Tensor]:
        """What a batch of each level says at the current point, flat, and the outer loss."""
        inner, flat = levels.products(i, levels.state["u"]), _flat(levels)
        value, by_params, direct = levels.outer_slopes(j)
        return {
            "inner": torch.stack([inner.residual, inner.product]),
            "cross": flat.flatten(inner.cross),
            "by_params": by_params,
            "direct": flat.flatten(direct),
        }, value

    def _fill(self, levels: Levels) -> None:
        """Fill the memory at the first point, from every batch of both levels."""
        memory, means = levels.state["memory"], levels.state["means"]
        for i, j in _pairs(levels):
            found, _ = self._seen(levels, i, j)
            for name, place in (("inner", i), ("cross", i), ("by_params", j), ("direct", j)):
                assert place.index is not None
                memory[name][place.index] = found[name]
        for name, table in memory.items():
            means[name] = table.mean(dim=0)
        levels.state["filled"] = True


def _pairs(levels: Levels) -> Iterator[tuple[Batch, Batch]]:
    """Every batch of both levels, the shorter sequence gone through again."""
    n, m = (_count(b) for b in (levels.inner_batches, levels.outer_batches))
    for k in range(max(n, m)):
        yield levels.inner_batches[k % n], levels.outer_batches[k % m]


def _count(batches: Batches) -> int:
    if batches.count is None:
        raise UnsupportedOperation(
            f"SABA keeps what it has seen of each batch: {batches.name} must be a sequence, with a "
            "length and with batches at places 0, 1, ..., such as list(dataloader)."
        )
    return batches.count


def _flat(levels: Levels) -> Layout:
    """How the hyperparameters lie in one vector."""
    return Layout(levels.hparams, levels.hparams.variables)
