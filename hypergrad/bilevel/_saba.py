"""SABA: SOBA with the variance reduction of SAGA on all five derivatives."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .._pytrees import Layout
from ..solvers._fields import positive
from ._batches import Batch
from ._levels import Levels
from ._method import State, checked, exponent
from ._soba import Directions, SingleLoop


@dataclasses.dataclass(frozen=True)
class SABA(SingleLoop):
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

    linear_lr: float | None = checked(None, positive)
    inner_decay: float = exponent(0.0)
    outer_decay: float = exponent(0.0)

    def start(self, levels: Levels) -> State:
        """Start the running solution of the linear system, and the memory, still empty."""
        n, m = levels.inner_batches.places("SABA"), levels.outer_batches.places("SABA")
        flat, P = _flat(levels), levels.zeros()
        H = torch.zeros(flat.n, dtype=flat.dtype, device=flat.device)
        memory = {
            "inner": P.new_zeros(n, 2, len(P)),
            "cross": H.new_zeros(n, len(H)),
            "by_params": P.new_zeros(m, len(P)),
            "direct": H.new_zeros(m, len(H)),
        }
        means = {name: torch.zeros_like(table[0]) for name, table in memory.items()}
        return {"u": P, "filled": False, "memory": memory, "means": means}

    def directions(self, levels: Levels) -> Directions:
        """Form the directions with the noise reduced; the memory takes in what was seen."""
        levels.refuse_passed("SABA")
        state = levels.state
        if not state["filled"]:
            self._fill(levels)
        seen, value = self._seen(levels, levels.inner_batch(), levels.outer_batch())
        reduced: dict[str, Tensor] = {}
        for name, (index, now) in seen.items():
            table, mean = state["memory"][name], state["means"][name]
            change = now - table[index]
            reduced[name] = change + mean
            table[index] = now
            state["means"][name] = mean + change / len(table)
            if levels.steps % len(table) == len(table) - 1:
                state["means"][name] = table.mean(dim=0)  # rounding does not add up
        gradient, product = reduced["inner"]
        outer = _flat(levels).split(reduced["direct"] - reduced["cross"])
        variables = levels.hparams.variables
        outer = [part.to(v.dtype) for part, v in zip(outer, variables, strict=True)]
        return Directions(gradient, product - reduced["by_params"], outer, value)

    def _seen(
        self, levels: Levels, i: Batch, j: Batch
    ) -> tuple[dict[str, tuple[int | None, Tensor]], Tensor]:
        """Evaluate a batch of each level at the current point, flat, and the outer loss.

        Returns
        -------
        seen : dict
            Each derivative behind the place of its batch.
        value : Tensor
            The outer loss.
        """
        inner, flat = levels.products(i, levels.state["u"]), _flat(levels)
        value, by_params, direct = levels.outer_slopes(j)
        return {
            "inner": (i.place, torch.stack([inner.residual, inner.product])),
            "cross": (i.place, flat.flatten(inner.cross)),
            "by_params": (j.place, by_params),
            "direct": (j.place, flat.flatten(direct)),
        }, value

    def _fill(self, levels: Levels) -> None:
        """Fill the memory at the first point, from every batch of both levels."""
        memory, means = levels.state["memory"], levels.state["means"]
        inner, outer = levels.inner_batches, levels.outer_batches
        n, m = inner.places("SABA"), outer.places("SABA")
        for k in range(max(n, m)):  # the shorter sequence is gone through again
            for name, (index, now) in self._seen(levels, inner[k % n], outer[k % m])[0].items():
                memory[name][index] = now
        for name, table in memory.items():
            means[name] = table.mean(dim=0)
        levels.state["filled"] = True


def _flat(levels: Levels) -> Layout:
    """Lay the hyperparameters out in one vector."""
    return Layout(levels.hparams, levels.hparams.variables)
