"""The evidence of an inner solver."""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._info import Status


@dataclasses.dataclass(frozen=True)
class InnerInfo:
    """How an inner solver ended: a registered pytree of tensors, with one entry a task.

    Attributes
    ----------
    status : Tensor
        int64, a `Status`: ``CONVERGED``; ``MAX_ITERATIONS``; ``STAGNATED`` where rounding, or the
        objective, allows no further progress; ``BREAKDOWN`` where a bracket of `Bisection` holds no
        root; ``DIVERGED``; ``NOT_FINITE`` where NaN was met.
    success : Tensor
        bool: converged or, with ``tol=None``, stagnated at a relative residual of at most 1e-3.
    iterations, evaluations : Tensor
        int64: the iterations, and the evaluations of the objective (with or without its
        gradient) or of the map. Products with a Hessian count as one each. In a batch an evaluation
        that one task needs counts for all that are still at work.
    residual_norm : Tensor
        The norm of the gradient, or of ``params - T(params)``; of the step of `FISTA`.
    inner_residual : Tensor
        The same divided by the curvature that the last iterations have seen and by the norm of
        ``params``: an estimate of the relative distance to the solution, as
        ``SolveInfo.inner_residual`` is by a Newton step in `implicit_grad`. Norms of
        ``params`` below sqrt(n eps) count as that: solutions smaller than 1e-4 (float32) or 1e-8
        (float64) want larger units.
    value : Tensor
        The objective (of `FISTA` its smooth part); NaN for a map.
    method : str
        The name of the method (static text).

    Examples
    --------
    >>> import torch
    >>> from hypergrad import inner_solvers
    >>> params, info = inner_solvers.LBFGS()(lambda x: ((x - 1) ** 2).sum(), torch.zeros(2))
    >>> print(info)
    LBFGS: CONVERGED after ... iterations, ... evaluations; relative residual ...
    """

    status: Tensor
    success: Tensor
    iterations: Tensor
    evaluations: Tensor
    residual_norm: Tensor
    inner_residual: Tensor
    value: Tensor
    method: str = ""

    def __str__(self) -> str:
        """Write one line for people; of a batch, how many tasks ended in which way."""
        if self.status.ndim:
            ends = self.status.flatten().tolist()
            counts = [f"{ends.count(s)} {Status(s).name}" for s in sorted(set(ends))]
            most = float(self.inner_residual.max()) if ends else 0.0
            return f"{self.method}, {len(ends)} tasks: {', '.join(counts)}; at most {most:.1e}"
        return (
            f"{self.method}: {Status(int(self.status)).name} after {int(self.iterations)} "
            f"iterations, {int(self.evaluations)} evaluations; relative residual "
            f"{float(self.inner_residual):.1e}"
        )


_FIELDS = tuple(f.name for f in dataclasses.fields(InnerInfo) if f.name != "method")


def _flatten_with_keys(info: InnerInfo) -> tuple[list[tuple[Any, Any]], str]:
    return [(pytree.GetAttrKey(name), getattr(info, name)) for name in _FIELDS], info.method


def _flatten(info: InnerInfo) -> tuple[list[Any], str]:
    return [getattr(info, name) for name in _FIELDS], info.method


def _unflatten(leaves: Any, method: str) -> InnerInfo:
    return InnerInfo(**dict(zip(_FIELDS, leaves, strict=True)), method=method)


pytree.register_pytree_node(
    InnerInfo,
    _flatten,
    _unflatten,
    serialized_type_name="hypergrad.inner_solvers.InnerInfo",
    flatten_with_keys_fn=_flatten_with_keys,
)
