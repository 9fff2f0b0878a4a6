"""When to stop, and the evidence: one judgement a task."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import Status
from ._evaluator import Evaluator
from ._info import InnerInfo
from ._numbers import dot, norm

# The tolerance for ``tol=None``, by the dtype in which the objective is computed.
_REACHABLE = {torch.float64: 1e-8, torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-3}
_ENOUGH = 1e-3  # the relative residual that `implicit_grad` lets pass without a word
_WINDOW = 10  # iterations whose lowest curvature counts
_PATIENCE = 200  # iterations without any progress, before a task counts as stagnated
#: The growth of the residual beyond which a task counts as diverged.
GROWTH = 1e10


def least_length(x: Tensor) -> float:
    """Say below which norm parameters count as this long, where a residual is related to them."""
    return float((torch.finfo(x.dtype).eps * max(x.shape[-1], 1)) ** 0.5)


@dataclasses.dataclass
class Progress:
    """Which tasks are still at work, and how the others have ended.

    Attributes
    ----------
    tol : float, optional
        The relative residual that is asked for; None: what `precision` can reach.
    precision : torch.dtype
        The one in which the function is computed.
    size : Tensor
        The norm of the residual.
    value : Tensor
        The objective's; NaN where there is none.
    lowest : Tensor, optional
        The lowest curvature that is known before the first iteration.
    """

    tol: float | None
    precision: torch.dtype
    size: Tensor
    value: Tensor
    lowest: Tensor | None = None
    status: Tensor = dataclasses.field(init=False)
    active: Tensor = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        """Stop at once where there is nothing to do, or nothing that can be done."""
        size = self.size
        self.active = torch.isfinite(size) & (size > 0)
        self.status = torch.where(
            torch.isfinite(size), int(Status.CONVERGED), int(Status.NOT_FINITE)
        )
        self.relative = torch.where(size == 0, size, torch.full_like(size, math.nan))
        self.first, self.best, self.best_value = size, size, self.value
        self.idle = torch.zeros_like(self.status)
        self.iterations, self.evaluations = self.idle, self.idle + 1
        self._curvature: list[Tensor] = []
        if self.lowest is None:
            self.lowest = torch.full_like(size, math.nan)

    def begin(self, evaluator: Evaluator, x: Tensor, g: Tensor) -> Tensor:
        """Look at the curvature along the gradient once, for the length of a first step."""
        if not any_task(self.active):
            return torch.ones_like(self.size)
        product, used = evaluator.curved(x, self.value, g, g)
        self.evaluated(self.active, used)
        seen = norm(product)
        usable = torch.isfinite(seen) & (seen > 0)
        assert self.lowest is not None
        self.lowest = torch.where(usable, seen, self.lowest)
        guess = 0.1 * norm(x).clamp(min=1.0) / torch.where(self.size > 0, self.size, 1.0)
        return torch.where(usable, 1 / torch.where(usable, seen, 1.0), guess)

    def evaluated(self, active: Tensor, times: int = 1) -> None:
        """Count evaluations of some tasks."""
        self.evaluations = self.evaluations + times * active

    def update(
        self,
        x: Tensor,
        step: Tensor,
        change: Tensor,
        size: Tensor,
        value: Tensor,
        *,
        stuck: Tensor | None = None,
        floored: Tensor | None = None,
    ) -> None:
        """Judge an iteration of the active tasks.

        Parameters
        ----------
        x : Tensor
            Where it has led.
        step, change : Tensor
            How `x` and the residual have changed.
        size, value : Tensor
            The residual's norm there, and the objective's value.
        stuck : Tensor, optional
            bool: no step could be made.
        floored : Tensor, optional
            bool: the residual is the rounding error of what it was computed from.
        """
        no = torch.zeros_like(self.active)
        stuck, floored = no if stuck is None else stuck, no if floored is None else floored
        eps = torch.finfo(self.precision).eps
        length = norm(x).clamp(min=least_length(x))
        distance = norm(step)
        along = dot(step, change)
        seen = torch.where(along > 0, along / distance**2, norm(change) / distance)
        # Too short a step shows no curvature, only rounding.
        seen = torch.where(distance > 8 * eps * length, seen, torch.full_like(seen, math.inf))
        self._curvature = [*self._curvature[1 - _WINDOW :], seen]
        assert self.lowest is not None
        lowest = torch.stack(self._curvature).amin(dim=0)
        lowest = torch.where(torch.isfinite(lowest), lowest, self.lowest)
        self.lowest = torch.where(self.active, lowest, self.lowest)
        relative = torch.where(size == 0, torch.zeros_like(size), size / (lowest * length))
        stuck = stuck | ~(distance > eps / 4 * length)

        noise = 4 * eps * self.best_value.abs()
        better = (size < self.best) | (value < self.best_value - noise)
        idle = torch.where(better, torch.zeros_like(self.idle), self.idle + 1)
        met = relative <= (_REACHABLE[self.precision] if self.tol is None else self.tol)
        ended = torch.full_like(self.status, int(Status.MAX_ITERATIONS))
        stagnated = stuck | floored | (idle >= _PATIENCE)
        ended = torch.where(stagnated, int(Status.STAGNATED), ended)
        ended = torch.where(met & ((size == 0) | ~stuck), int(Status.CONVERGED), ended)
        diverged = (size > GROWTH * self.first) | torch.isinf(size) | torch.isinf(value)
        ended = torch.where(diverged, int(Status.DIVERGED), ended)
        ended = torch.where(torch.isnan(size), int(Status.NOT_FINITE), ended)
        active = self.active
        self.iterations = self.iterations + active
        self.status = torch.where(active, ended, self.status)
        self.relative = torch.where(active, relative, self.relative)
        self.size = torch.where(active, size, self.size)
        self.value = torch.where(active, value, self.value)
        self.best = torch.where(active, torch.fmin(self.best, size), self.best)
        self.best_value = torch.where(active, torch.fmin(self.best_value, value), self.best_value)
        self.idle = torch.where(active, idle, self.idle)
        self.active = active & (ended == Status.MAX_ITERATIONS)

    def rounds(self, maxiter: int) -> Iterator[Tensor]:
        """Yield the tasks that are active before each iteration, as long as there are any."""
        for _ in range(maxiter):
            if not any_task(self.active):
                break
            yield self.active

    def info(self, method: str) -> InnerInfo:
        """Collect the evidence."""
        success = self.status == Status.CONVERGED
        if self.tol is None:
            success = success | ((self.status == Status.STAGNATED) & (self.relative <= _ENOUGH))
        return InnerInfo(
            status=self.status[..., 0],
            success=success[..., 0],
            iterations=self.iterations[..., 0],
            evaluations=self.evaluations[..., 0],
            residual_norm=self.size[..., 0],
            inner_residual=self.relative[..., 0],
            value=self.value[..., 0],
            method=method,
        )
