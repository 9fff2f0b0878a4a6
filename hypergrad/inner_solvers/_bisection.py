"""Bisection: roots of scalar functions, entry by entry."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._errors import StructureMismatch
from .._info import Status
from ._base import InnerSolver
from ._evaluator import Evaluator
from ._numbers import norm
from ._progress import Progress


@dataclasses.dataclass(frozen=True)
class Bisection(InnerSolver):
    """The root of ``F(params, *args) = 0`` between two bounds, each entry by itself.

    Entry i of F must depend on entry i of the parameters alone, and rise or fall with it: F is a
    batch of scalar equations. A bracket is halved until its ends are neighbours, or until it is
    shorter than `tol` times its root. Where F has one sign at both ends of a bracket there is no
    root to be found in it: the status of the whole is ``BREAKDOWN``, and the entry is NaN.

    Parameters
    ----------
    lower, upper : float, Tensor or callable
        The ends of the brackets: one number, a tensor that is broadcast against the parameters,
        or a function of the further arguments, ``lower(*args)``. The first guess plays no part.
    maxiter : int
        Most halvings.
    tol : float, optional
        The length of a bracket, in units of its ends, at which it is no longer halved; None: until
        the ends are neighbours.

    Examples
    --------
    >>> import torch, hypergrad
    >>> F = lambda x, a: x**3 + x - a
    >>> bisection = hypergrad.inner_solvers.Bisection(lower=-10.0, upper=10.0)
    >>> @hypergrad.custom_root(F, has_aux=True)
    ... def solve(init, a):
    ...     return bisection(F, init, a)
    >>> a = torch.tensor([2.0, 10.0], requires_grad=True)
    >>> x, info = solve(torch.zeros(2), a)
    >>> x.detach(), bool(info.success)
    (tensor([1., 2.]), True)
    >>> torch.autograd.grad(x.sum(), a)[0]  # 1 / (3 x^2 + 1)
    tensor([0.2500, 0.0769])
    """

    lower: Any = None
    upper: Any = None
    maxiter: int = 2000
    tol: float | None = None

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        super().__post_init__()
        for name in ("lower", "upper"):
            if getattr(self, name) is None:
                raise ValueError(f"{name} must be given: bisection starts from a bracket.")

    def _run(self, evaluator: Evaluator, x: Tensor) -> tuple[Tensor, Progress]:
        low, high = (self._end(name, evaluator, x) for name in ("lower", "upper"))
        at_low, at_high = _values(evaluator, low), _values(evaluator, high)
        size = norm(at_low)
        nan = torch.full_like(size, math.nan)
        progress = Progress(self.tol, evaluator.layout.precision, size, nan)
        progress.active = torch.ones_like(progress.active)
        progress.evaluated(progress.active)
        rises = at_high > at_low
        crossed = at_low.sign() * at_high.sign() <= 0
        sound = crossed & (low <= high)
        # Rounded to the narrowest dtype of the leaves, neighbours are that far apart.
        eps = torch.finfo(evaluator.layout.precision).eps
        least = max(eps, self.tol or 0.0)
        for _ in range(self.maxiter):
            middle = low + (high - low) / 2
            open_ = sound & (high - low > least * torch.maximum(low.abs(), high.abs()))
            open_ = open_ & (middle > low) & (middle < high)
            going = open_.any(dim=-1, keepdim=True)
            if not any_task(going):
                break
            value = _values(evaluator, middle)
            progress.evaluated(going)
            progress.iterations = progress.iterations + going
            above = torch.where(rises, value > 0, value < 0)
            exact = open_ & (value == 0)
            high = torch.where((open_ & above) | exact, middle, high)
            low = torch.where((open_ & ~above) | exact, middle, low)
            at_high = torch.where((open_ & above) | exact, value, at_high)
            at_low = torch.where((open_ & ~above) | exact, value, at_low)
        best = torch.where(at_low.abs() <= at_high.abs(), low, high)
        root = torch.where(sound, best, math.nan)
        width = torch.where(sound, high - low, 0.0)
        ends = torch.maximum(low.abs(), high.abs())
        relative = (width / torch.where(ends > 0, ends, 1.0)).amax(dim=-1, keepdim=True)
        closed = ~(sound & (width > 2 * least * ends)).any(dim=-1, keepdim=True)
        unknown = (at_low.isnan() | at_high.isnan()).any(dim=-1, keepdim=True)
        status = torch.where(closed, int(Status.CONVERGED), int(Status.MAX_ITERATIONS))
        status = torch.where(sound.all(dim=-1, keepdim=True), status, int(Status.BREAKDOWN))
        progress.status = torch.where(unknown, int(Status.NOT_FINITE), status)
        progress.active = torch.zeros_like(closed)
        progress.relative = torch.where(sound.all(dim=-1, keepdim=True), relative, math.nan)
        progress.size = norm(torch.where(at_low.abs() <= at_high.abs(), at_low, at_high))
        return root, progress

    def _end(self, name: str, evaluator: Evaluator, x: Tensor) -> Tensor:
        """Shape an end of the brackets like the parameters."""
        passed = getattr(self, name)

        def end(params: Any) -> Any:
            bound = passed(*evaluator.args) if callable(passed) else passed
            leaves = []
            for leaf in evaluator.tree.match("params", params):
                value = torch.as_tensor(bound, dtype=leaf.dtype, device=leaf.device)
                try:
                    leaves.append(value.expand_as(leaf).clone())
                except RuntimeError:
                    raise StructureMismatch(
                        f"{name} has the shape {tuple(value.shape)}, which cannot be broadcast "
                        f"against params of shape {tuple(leaf.shape)}.",
                        argument=name,
                    ) from None
            return evaluator.tree.rebuild(leaves)

        return evaluator.plain(name, end, x)


def _values(evaluator: Evaluator, x: Tensor) -> Tensor:
    return evaluator.plain(
        "F(params, ...)", lambda params: evaluator.fun(params, *evaluator.args), x
    )
