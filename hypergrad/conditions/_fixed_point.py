"""A fixed point of a map."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from ._base import Condition, Point, Record, record_equation
from ._inner_problem import Problem


@dataclasses.dataclass(frozen=True)
class FixedPoint(Condition):
    """The inner solution is a fixed point: ``T(params, *args) = params``.

    The condition is ``params - T(params, *args)``, so A = I - dT/dparams.

    Parameters
    ----------
    T : callable
        ``T(params, hparams)``, a pytree shaped like ``params``.
    symmetric : bool
        Whether dT/dparams is symmetric; allows CG.

    Examples
    --------
    >>> import torch, hypergrad
    >>> heron = hypergrad.FixedPoint(lambda x, a: (x + a / x) / 2)  # x = sqrt(a)
    >>> hypergrad.implicit_grad(lambda x, a: x, heron, torch.tensor(2.0), torch.tensor(4.0))
    tensor(0.2500)
    """

    T: Callable[..., Any]
    symmetric: bool = False
    contraction: ClassVar[bool] = True

    def chain(self) -> tuple[int | None, ...] | None:
        """Say that the function stands alone."""
        return (None,)

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the map."""
        return problem.equation("T(params, ...)", self.T, tensors)

    def record(self, point: Point) -> Record:
        """Record ``params - T``."""
        values = self.probe(point.problem, point.tensors)
        residual = [p - value for p, value in zip(point.params, values, strict=True)]
        return record_equation(point, residual, self.symmetric)
