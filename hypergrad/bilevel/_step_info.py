"""The record that one step of the outer problem leaves behind."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .._info import SolveInfo, fields_of, shown


@dataclasses.dataclass(frozen=True, repr=False)
class StepInfo:
    """The record of one step of a `Bilevel`.

    All tensors are detached, and reading them is the only thing that waits for the device.

    Attributes
    ----------
    step : int
        How many outer steps have been made, this one included.
    outer_value : Tensor
        The outer loss on this step's batch, at the parameters and hyperparameters where the
        gradient was taken, which is before the hyperparameters moved. NaN where the estimator
        does not know it.
    grads : pytree of Tensor
        What the outer optimiser was given, shaped like the hyperparameters: an estimate of the
        hypergradient, or what the method makes of one.
    inner_norm : Tensor
        The norm of the inner condition (the gradient of the inner loss) where it was last
        evaluated, on that batch.
    inner_steps : int
        How many steps the inner optimiser made.
    tolerance : float or None
        The tolerance of this step, of a method that has one.
    info : SolveInfo or None
        The evidence of the hypergradient, of a method that solves a linear system.
    warned : dict
        The kinds of warning that the run has met so far, each with the number of steps that met
        it. The first step of a kind issues the warning, and no other does.

    Examples
    --------
    >>> import torch, hypergrad
    >>> loop = hypergrad.Bilevel(
    ...     lambda w, t: (w**2).sum(), lambda w, t: ((w - t) ** 2).sum() / 2,
    ...     torch.zeros(2), torch.ones(2),
    ...     inner_optimizer=lambda v: torch.optim.SGD(v, lr=1.0),
    ...     outer_optimizer=lambda v: torch.optim.SGD(v, lr=0.1),
    ... )
    >>> record = loop.step()
    >>> record.step, record.inner_steps, record.outer_value, record.info.success
    (1, 10, tensor(2.), tensor(True))
    """

    step: int
    outer_value: Tensor
    grads: Any
    inner_norm: Tensor
    inner_steps: int
    tolerance: float | None = None
    info: SolveInfo | None = None
    warned: dict[str, int] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        """Write one line, for people."""
        text = f"step {self.step}: outer value {shown(self.outer_value)}, inner norm "
        text += f"{shown(self.inner_norm)} after {self.inner_steps} inner steps"
        if self.tolerance is not None:
            text += f", tolerance {self.tolerance:.1e}"
        if self.info is not None:
            text += f"; {self.info}"
        met = [f"{kind} ({count})" for kind, count in self.warned.items()]
        return text + (f"; warned of: {', '.join(met)}" if met else "")

    def __repr__(self) -> str:
        """Write the fields, with shapes in place of tensors."""
        return fields_of(self)
