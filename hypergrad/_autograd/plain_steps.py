"""Steps of plain gradient descent, which need nothing of torch.optim's bookkeeping."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer
from torch.optim import optimizer as optimizers

_STEP = SGD.step
_ABSENT = ("momentum", "weight_decay", "nesterov", "maximize", "differentiable", "foreach", "fused")


def plain_rate(optimiser: Optimizer, variables: Sequence[Tensor]) -> float | None:
    """Look up the learning rate of an optimiser whose next step is plain gradient descent.

    Parameters
    ----------
    optimiser : Optimizer
        Whatever moves the variables.
    variables : sequence of Tensor
        All that it moves.

    Returns
    -------
    rate : float or None
        None: its step is more than ``variable -= rate * gradient``, or somebody follows its steps,
        such as a hook or a scheduler.
    """
    if type(optimiser) is not SGD or len(optimiser.param_groups) != 1:
        return None
    (group,) = optimiser.param_groups
    rate = group["lr"]
    if type(rate) is not float or any(group[name] for name in _ABSENT):
        return None
    step = SGD.step
    if not (step is _STEP or getattr(step, "__wrapped__", None) is _STEP):
        return None
    if (
        "step" in optimiser.__dict__
        or optimiser._optimizer_step_pre_hooks
        or optimiser._optimizer_step_post_hooks
        or optimizers._global_optimizer_pre_hooks
        or optimizers._global_optimizer_post_hooks
    ):
        return None
    held = group["params"]
    same = len(held) == len(variables) and all(map(_is, held, variables))
    return rate if same else None


def descend(variables: Sequence[Tensor], gradients: Sequence[Tensor], rate: float) -> bool:
    """Make a step of plain gradient descent; False: these are no gradients of the variables."""
    for variable, gradient in zip(variables, gradients, strict=True):
        if gradient.shape != variable.shape or gradient.dtype != variable.dtype:
            return False
        if variable.device.type != "cpu" or gradient.device.type != "cpu":
            return False
    with torch.no_grad():
        for variable, gradient in zip(variables, gradients, strict=True):
            variable.add_(gradient, alpha=-rate)
    return True


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b
