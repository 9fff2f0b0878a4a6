"""So many steps of a given length, at which nothing looks: the verdict is formed at the end."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd.branches import traced
from .._autograd.host import every_task
from .._info import Status
from ._evaluator import Evaluator
from ._info import InnerInfo
from ._momentum import pushed
from ._numbers import dot, largest, norm_unseen
from ._progress import GROWTH, least_length

Backward = Callable[[Tensor, Tensor], Tensor]


class FixedSteps:
    """What is remembered of steps that nobody looks at, as tensors alone.

    Attributes
    ----------
    alive : Tensor
        bool: the tasks whose points are all finite. The others stay where they were finite.
    """

    def __init__(self, x: Tensor) -> None:
        self._size = self._value = x.new_zeros((*x.shape[:-1], 1))
        self.alive = torch.ones_like(self._size, dtype=torch.bool)
        self._steps = torch.zeros_like(self._size, dtype=torch.int64)
        self._residuals: list[tuple[Tensor, Tensor]] = []  # the first and the last two, with x
        self._count = 0

    def seen(self, x: Tensor, residual: Tensor, value: Tensor, end: Tensor) -> Tensor:
        """Note an evaluation at `x`, from where a step leads to `end`; return which are alive."""
        size = largest(end)  # NaN or infinite where anything on the way there is
        self._size = torch.where(self.alive, size, self._size)
        self._value = torch.where(self.alive, value, self._value)
        self.alive = self.alive & torch.isfinite(size)
        self._steps = self._steps + self.alive
        self._note(x, residual)
        return self.alive

    def passed(self, x: Tensor, residual: Tensor, value: Tensor) -> None:
        """Note an evaluation at `x` where all numbers are finite."""
        self._value, self._steps = value, self._steps + 1
        self._note(x, residual)

    def _note(self, x: Tensor, residual: Tensor) -> None:
        self._count += 1
        known = self._residuals or [(x, residual)]
        self._residuals = [known[0], known[-1], (x, residual)]

    def info(self, method: str) -> InnerInfo:
        """Form the verdict from the last two evaluations."""
        (_, first), (x_before, before), (x, residual) = self._residuals
        # The value is that of the last evaluation; those before are not looked at.
        self.alive = self.alive & torch.isfinite(self._value)
        # Of one that is not alive the last residual is not known, but for what it led to.
        unknown = torch.where(torch.isfinite(self._size), math.nan, self._size)
        size = torch.where(self.alive, norm_unseen(residual), unknown)
        step, change = x - x_before, residual - before
        length = norm_unseen(x).clamp(min=least_length(x))
        distance, along = norm_unseen(step), dot(step, change)
        curvature = torch.where(along > 0, along / distance**2, norm_unseen(change) / distance)
        relative = torch.where(self.alive, size / (curvature * length), math.nan)
        relative = torch.where(size == 0, torch.zeros_like(size), relative)
        status = torch.full_like(self._steps, int(Status.MAX_ITERATIONS))
        status = torch.where(size == 0, int(Status.CONVERGED), status)
        grown = size > GROWTH * norm_unseen(first)
        grown = grown | torch.isinf(size) | torch.isinf(self._value)
        status = torch.where(grown, int(Status.DIVERGED), status)
        missing = torch.isnan(self._size) | torch.isnan(self._value)
        missing = missing | (~self.alive & (self._steps == 0))
        status = torch.where(missing, int(Status.NOT_FINITE), status)[..., 0]
        return InnerInfo(
            status=status,
            success=status == Status.CONVERGED,
            iterations=self._steps[..., 0],
            evaluations=torch.full_like(status, self._count),
            residual_norm=size[..., 0],
            inner_residual=relative[..., 0],
            value=self._value[..., 0],
            method=method,
        )


def descend(
    evaluator: Evaluator, x: Tensor, length: Tensor, maxiter: int
) -> tuple[Tensor, FixedSteps]:
    """Go down the gradient."""
    if traced():  # a point that is not finite stays so: one look at the last one will do
        steps, end = FixedSteps(x), x
        for _ in range(maxiter):
            value, g = evaluator.objective(end)
            steps.passed(end, g, value)
            end = torch.addcmul(end, length, g, value=-1)
        if every_task(torch.isfinite(end)):
            return end, steps
    steps, last = FixedSteps(x), x
    for _ in range(maxiter):
        value, g = evaluator.objective(x)
        end = torch.addcmul(x, length, g, value=-1)
        alive = steps.seen(x, g, value, end)
        last = torch.where(alive, x, last)
        x = torch.where(alive, end, last)
    return x, steps


def accelerate(
    evaluator: Evaluator, backward: Backward | None, x: Tensor, length: Tensor, maxiter: int
) -> tuple[Tensor, FixedSteps]:
    """Go down with momentum, as `Nesterov` and `FISTA` do."""
    steps, y, z = FixedSteps(x), x, x
    momentum = torch.ones_like(steps.alive, dtype=x.dtype)
    for _ in range(maxiter):
        value, g = evaluator.objective(y)
        end = torch.addcmul(y, length, g, value=-1)
        if backward is not None:
            end = backward(end, length)
        residual = length * g if backward is None else y - end
        alive = steps.seen(y, residual, value, end)
        x, z = z, torch.where(alive, end, z)
        y, momentum = pushed(x, y, z, momentum)
        y = torch.where(alive, y, z)
    return z, steps
