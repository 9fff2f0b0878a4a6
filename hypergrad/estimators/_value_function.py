"""The value-function gradient: descent on both levels at once, from first derivatives."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from .._autograd.products import filled
from .._autograd.refusals import never_compiled
from .._autograd.torch_pytrees import pytree
from .._errors import Diverged
from .._implicit.signatures import Hparams, Objective, Outer, Params
from .._mistakes import explained
from .._warnings import OnFailure
from ._answer import check_not_negative, check_positive
from ._first_order import FirstOrder, added, difference
from ._loss import Leaves, descend, wide

#: By how much of its size the inner objective may rise before the steps count as diverging.
_RISE = 1e-3
_RISING = (
    "The gradient steps raise the inner objective, by {} of its size: lr is too large. One over "
    "the largest curvature of inner is safe."
)


@dataclasses.dataclass(frozen=True)
class ValueFunctionInfo:
    """The evidence beside a value-function gradient.

    It is a registered pytree whose leaves are tensors.

    Attributes
    ----------
    outer_value : Tensor
        The outer loss at `params`.
    multiplier : Tensor
        What the gap's gradient was multiplied by.
    gap : Tensor
        By how much the inner objective at `params` exceeds that after the gradient steps: how far
        `params` is from solving the inner problem.
    params_grads : pytree of Tensor
        The other half of the direction, shaped like `params`.
    aux : pytree
        What the outer loss returned beside its value, with ``has_aux=True``; else None.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = lambda w, lam: (w - 1) ** 2 + lam * w**2
    >>> w, lam = torch.tensor(0.6), torch.tensor(1.0)
    >>> grads, info = hypergrad.value_function_grad(
    ...     lambda w, lam: w**2, inner, w, lam, lr=0.2, return_info=True
    ... )
    >>> round(info.gap.item(), 2)  # 2 (w - 1/2)^2
    0.02
    """

    outer_value: Tensor
    multiplier: Tensor
    gap: Tensor
    params_grads: Any
    aux: Any = None


_FIELDS = ["outer_value", "multiplier", "gap", "params_grads", "aux"]
pytree.register_dataclass(
    ValueFunctionInfo, field_names=_FIELDS, serialized_type_name="hypergrad.ValueFunctionInfo"
)


class _Options(TypedDict, total=False):
    """The keywords that do not change what is returned."""

    lr: Required[float]
    steps: int
    eta: float
    multiplier: float | None
    on_failure: OnFailure


@overload
def value_function_grad(
    outer: Outer[Any, Hparams],
    inner: Objective[Any, Hparams],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: Literal[False] = ...,
    return_info: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Hparams: ...
@overload
def value_function_grad(
    outer: Outer[Any, Hparams],
    inner: Objective[Any, Hparams],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Hparams, ValueFunctionInfo]: ...
@overload
def value_function_grad(
    outer: Outer[Any, Hparams],
    inner: Objective[Any, Hparams],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_info: bool = ...,
    **options: Unpack[_Options],
) -> Any: ...
@never_compiled
@explained
def value_function_grad(
    outer: Outer[Params, Hparams],
    inner: Objective[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    lr: float,
    steps: int = 10,
    eta: float = 0.5,
    multiplier: float | None = None,
    has_aux: bool = False,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Hparams | tuple[Hparams, Any]:
    """Form the direction of joint descent on both levels, from first derivatives: BOME.

    The inner problem is the constraint that the gap ``q = inner(params) - inner(y)`` be zero,
    with ``y`` made from `params` by gradient steps and held constant. The direction is ``d outer +
    multiplier d q``, by `hparams` and by `params` (``info.params_grads``), and both are to be
    moved along it; the multiplier is the least that lowers the gap at the rate `eta`::

        multiplier = max(eta - <d outer, d q> / ||d q||^2, 0)

    At a solution of the inner problem the gap's gradient is zero and the direct term alone is
    left, so this is no hypergradient there: `params` is meant to be where the joint descent has
    led. With its own direction by `params` gone to zero, the answer is the hypergradient up
    to a bias of order ``1 / multiplier``, as in `penalty_grad`.

    It costs `steps` gradients of `inner` by `params`, two more of `inner` and one of `outer`,
    each with the memory of one.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor; with `has_aux` a pair of it and anything.
    inner : callable
        ``inner(params, hparams)``, the objective of the inner problem.
    params : pytree of Tensor
        Where the joint descent is. Frozen parameters beside others that are not are constants.
    hparams : pytree of Tensor
        The outer variables.
    lr : float
        Size of the gradient steps on `inner`, of the order of one over its largest curvature.
    steps : int
        Their number.
    eta : float
        How much the gap is to be lowered, against the square of its gradient.
    multiplier : float, optional
        A fixed one; None: the formula's.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.
    on_failure : {"warn", "raise", "ignore"}
        What to do when the steps raise the inner objective.
    return_info : bool
        Whether to return a `ValueFunctionInfo` too.

    Returns
    -------
    grads : pytree of Tensor
        Shaped like `hparams`, detached.
    info : ValueFunctionInfo
        With `return_info`.
    aux : pytree
        With `has_aux` and without `return_info`.

    Raises
    ------
    Diverged
        With ``on_failure="raise"``, if the gradient steps raise the inner objective.
    NotConnected
        If `outer` does not depend on `params`, or a loss reaches an argument past it.
    NotFinite
        If a number is not finite, unless `on_failure` is "ignore".
    StructureMismatch
        If a loss is no scalar.
    UnsupportedOperation
        If the hypergradient is differentiated, or a loss changes its arguments.
    ValueError
        If a number is out of its range.

    References
    ----------
    Liu et al., BOME! Bilevel optimization made easy: a simple first-order approach, 2022,
    algorithm 1.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = lambda w, lam: (w - lam) ** 2
    >>> outer = lambda w, lam: (w - 1) ** 2 + lam**2  # best at 1/2
    >>> w, lam = torch.tensor(0.0), torch.tensor(0.0)
    >>> for _ in range(200):
    ...     grads, info = hypergrad.value_function_grad(
    ...         outer, inner, w, lam, lr=0.5, steps=1, return_info=True
    ...     )
    ...     w, lam = w - 0.05 * info.params_grads, lam - 0.05 * grads
    >>> bool(abs(w - 0.5) < 0.02), bool(abs(lam - 0.5) < 0.02)
    (True, True)
    """
    check_positive(lr=lr, eta=eta)
    check_not_negative(multiplier=multiplier, steps=steps)
    call = FirstOrder("value_function_grad", outer, inner, params, hparams, has_aux, on_failure)
    at, slopes = call.at, call.outer_slopes(call.at.params)
    y = descend([(call.inner, 1.0)], at, lr=lr, steps=steps)
    here, there = call.inner(at.params), call.inner(y, by_params=False)

    of_gap = difference(here.by_hparams, there.by_hparams)
    f, q = [*slopes.by_hparams, *slopes.by_params], [*of_gap, *here.by_params]
    square = _dot(q, q, slopes.value)
    if multiplier is None:
        weight = (eta - _dot(f, q, slopes.value) / square).clamp(min=0)
        weight = torch.where(square == 0, torch.zeros_like(weight), weight)
    else:
        weight = torch.full_like(square, multiplier)
    grads = added(slopes.by_hparams, weight, of_gap)
    gap = here.value - there.value
    rise = torch.where(gap < 0, -gap / here.value.abs(), torch.zeros_like(gap))
    rise = torch.where(gap.isnan(), gap, rise)
    info = None
    if return_info:
        by_params = filled(added(slopes.by_params, weight, here.by_params), at.params)
        info = ValueFunctionInfo(slopes.value, weight, gap, at.P.fill(by_params), slopes.aux)
    figures, kept = [(rise, _RISE, _RISING)], at.P.rebuild(y)
    return call.finish(grads, [slopes, here, there], figures, kept, info=info, error=Diverged)


def _dot(a: Leaves, b: Leaves, like: Tensor) -> Tensor:
    total = torch.zeros_like(wide(like))
    for x, y in zip(a, b, strict=True):
        if x is not None and y is not None:
            total = total + (x.to(total.dtype) * y.to(total.dtype)).sum()
    return total
