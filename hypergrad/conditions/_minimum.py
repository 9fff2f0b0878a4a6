"""A minimum of an objective: its gradient is zero."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ClassVar

from torch import Tensor

from .._autograd.products import Replay
from ._base import Point, Record
from ._inner_problem import Problem
from ._objective import Objective, Products, with_batch


@dataclasses.dataclass(frozen=True)
class Minimum(Objective):
    """The inner solution minimises ``f(params, *args)``: its gradient is zero there.

    Negative curvature at ``params`` is said, whatever solver meets it. A stationary point that is
    meant to be no minimum is a ``Root(gradient, symmetric=True)``.

    Parameters
    ----------
    f : callable
        ``f(params, hparams)``, a scalar tensor. In the decorators ``f(params, *args)``. With
        `batches` one argument more, the batch: ``f(params, hparams, batch)``.
    batches : iterable, optional
        Batches over which the mean of `f` is minimised: unweighted, also where they are of
        different size. A list, a tuple, or a DataLoader without shuffling: whatever gives the same
        batches each time that it is iterated. A product is one pass, and the memory is that of one
        batch. A batch, be it a tuple, a dict or a tensor, is handed to `f` unchanged.
    products : {"exact", "difference"}
        How products with the Hessian and with the cross derivative are formed: from second
        derivatives, or by central differences of gradients, two for each product. ``"difference"``
        needs first derivatives alone, so that fused attention, modules of `torch.compile` and
        custom kernels can be used. Its error is measured by a second step: ``info.product_error``
        has it, and ``info.error_estimate`` covers it.
    on_batch : callable, optional
        ``on_batch(done)``, called after each batch with how many of this pass are done. A product
        is one pass, by differences two.

    With `batches`, or by differences, second derivatives through the solution raise, and tensors
    that `f` captures are not differentiated.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = hypergrad.Minimum(lambda w, lam: (w - 1) ** 2 + lam * w**2)
    >>> w, lam = torch.tensor(0.5), torch.tensor(1.0)  # the minimiser is 1 / (1 + lam)
    >>> hypergrad.implicit_grad(lambda w, lam: w, inner, w, lam)  # -1 / (1 + lam)^2
    tensor(-0.2500)

    The same from two batches, and from first derivatives alone:

    >>> inner = hypergrad.Minimum(
    ...     lambda w, lam, x: (w - x) ** 2 + lam * w**2,
    ...     batches=[torch.tensor(0.5), torch.tensor(1.5)],
    ...     products="difference",
    ... )
    >>> gradient = hypergrad.implicit_grad(lambda w, lam: w, inner, w, lam)
    >>> torch.allclose(gradient, torch.tensor(-0.25), rtol=1e-3)
    True
    """

    f: Callable[..., Any]
    batches: Iterable[Any] | None = None
    products: Products = "exact"
    on_batch: Callable[[int], Any] | None = None
    minimum: ClassVar[bool] = True

    def functions(self) -> list[Callable[..., Any]]:
        """List the objective."""
        return [self.f]

    def chain(self) -> tuple[int | None, ...] | None:
        """Say that the objective stands alone."""
        return (None,) if self.replays else None

    def of_batch(self, batch: Any) -> Minimum:
        """Make the objective of one batch."""
        return self if self.batches is None else Minimum(with_batch(self.f, batch))

    def values(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the objective."""
        return [problem.objective("inner", self.f, tensors)]

    def _graph(self, point: Point) -> Record:
        value = point.problem.objective("inner", self.f, point.tensors)
        gradient = point.gradient(value)
        hessian = Replay(gradient, point.params)
        return Record([value], gradient, hessian, hessian)
