"""A minimum of an objective: its gradient is zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .._autograd.products import Replay
from ._base import Condition, Point, Record
from ._inner_problem import Problem


@dataclasses.dataclass(frozen=True)
class Minimum(Condition):
    """The inner solution minimises ``f(params, *args)``: its gradient is zero there.

    Negative curvature at ``params`` is said, whatever solver meets it. A stationary point that is
    meant to be no minimum is a ``Root(gradient, symmetric=True)``.

    Parameters
    ----------
    f : callable
        ``f(params, hparams)``, a scalar tensor. In the decorators ``f(params, *args)``.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = hypergrad.Minimum(lambda w, lam: (w - 1) ** 2 + lam * w**2)
    >>> w, lam = torch.tensor(0.5), torch.tensor(1.0)  # the minimiser is 1 / (1 + lam)
    >>> hypergrad.implicit_grad(lambda w, lam: w, inner, w, lam)  # -1 / (1 + lam)^2
    tensor(-0.2500)
    """

    f: Callable[..., Any]
    symmetric: ClassVar[bool] = True
    minimum: ClassVar[bool] = True
    of_objective: ClassVar[bool] = True

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the objective."""
        return [problem.objective("inner", self.f, tensors)]

    def record(self, point: Point) -> Record:
        """Record the gradient."""
        value = point.problem.objective("inner", self.f, point.tensors)
        gradient = point.gradient(value)
        hessian = Replay(gradient, point.params)
        return Record([value], gradient, hessian, hessian)
