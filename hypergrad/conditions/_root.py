"""A root of a system of equations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ._base import Condition, Point, Record, record_equation
from ._inner_problem import Problem

_LEAST_SQUARES = (
    " A root has as many equations as unknowns. Residuals of a least-squares problem are none: use "
    "Minimum(lambda p, h: residuals(p, h).square().sum() / 2), or GaussNewton(residuals, lambda "
    "r, h: r.square().sum() / 2)."
)


@dataclasses.dataclass(frozen=True)
class Root(Condition):
    """The inner solution is a root: ``F(params, *args) = 0``.

    Parameters
    ----------
    F : callable
        ``F(params, hparams)``, a pytree shaped like ``params``.
    symmetric : bool
        Whether dF/dparams is symmetric; allows CG.

    Examples
    --------
    >>> import torch, hypergrad
    >>> kepler = hypergrad.Root(lambda E, e: E - e * torch.sin(E) - 1.0)
    >>> E, e = torch.tensor(0.5).acos(), torch.tensor(0.0)
    >>> hypergrad.implicit_grad(lambda E, e: E, kepler, torch.tensor(1.0), e)  # sin(1)
    tensor(0.8415)
    """

    F: Callable[..., Any]
    symmetric: bool = False

    def chain(self) -> tuple[int | None, ...] | None:
        """Say that the function stands alone."""
        return (None,)

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the equation."""
        return problem.equation("F(params, ...)", self.F, tensors, _LEAST_SQUARES)

    def record(self, point: Point) -> Record:
        """Record the equation."""
        values = self.probe(point.problem, point.tensors)
        return record_equation(point, values, self.symmetric)
