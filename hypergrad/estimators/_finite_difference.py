"""The product with the cross derivative as a difference of two first derivatives."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from .._autograd.refusals import never_compiled
from .._implicit.signatures import Hparams, Objective, Outer, Params
from .._info import SolveInfo, Status
from .._mistakes import explained
from .._warnings import OnFailure
from ..solvers._vectors import norm
from ._answer import check_positive, evidence
from ._first_order import FirstOrder, added, difference
from ._loss import MOSTLY_ROUNDING, Arguments, descend, moved, rounding_share

#: The default distance, in units of the one that balances rounding and truncation for a function
#: whose third derivative is of the order of its first: networks bend more. Measured on a linear
#: classifier and a small network, where it is within a factor of 3 of the best in float64,
#: float32 and bfloat16.
_BENT = 1 / 20
_LOST = (
    "The finite difference is lost in rounding, which may be {} of the answer. Raise epsilon, or "
    "leave it out; or use float64."
)


class _Options(TypedDict, total=False):
    """The keywords that do not change what is returned."""

    epsilon: float | None
    scale: float | None
    lr: float | None
    preconditioner: Callable[[Any], Any] | None
    on_failure: OnFailure


@overload
def finite_difference_grad(
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
def finite_difference_grad(
    outer: Outer[Any, Hparams],
    inner: Objective[Any, Hparams],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Hparams, SolveInfo]: ...
@overload
def finite_difference_grad(
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
def finite_difference_grad(
    outer: Outer[Params, Hparams],
    inner: Objective[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    epsilon: float | None = None,
    scale: float | None = None,
    lr: float | None = None,
    preconditioner: Callable[[Any], Any] | None = None,
    has_aux: bool = False,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Hparams | tuple[Hparams, Any]:
    """Estimate the hypergradient without a second derivative: DARTS and SAMA.

    The cross product ``(d2 inner / d params d hparams)^T u`` is the central difference of ``d
    inner / d hparams`` at ``params + h u`` and ``params - h u``. Here ``u`` stands for the
    solution of the linear system: ``u = b / scale`` with ``b = d outer / d params``, or
    ``preconditioner(b)``. Only first derivatives are taken, so that it works where double
    backward does not: fused attention, compiled functions.

    It costs one gradient of `outer` and two of `inner` by `hparams`, each with the memory of one.
    No weight is edited: the two points are tensors of their own. Both evaluations of `inner` see
    the same random numbers.

    The error has two parts: that of ``u``, which is the solution only where the inner Hessian is
    ``scale`` times the identity (or `preconditioner` its inverse), and that of the difference,
    of order ``epsilon ** 2``, which vanishes where `inner` is quadratic in `params`.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor; with `has_aux` a pair of it and anything.
    inner : callable
        ``inner(params, hparams)``, the objective that `params` minimises.
    params : pytree of Tensor
        The inner variables. Frozen parameters beside others that are not are constants.
    hparams : pytree of Tensor
        The outer variables.
    epsilon : float, optional
        How far `params` is moved to each side, as the norm of ``h u``: ``h = epsilon / ||u||``,
        which is the rule of DARTS with 0.01, and that of SAMA. None: ``||params||`` times the
        cube root of the dtype's rounding unit, which balances rounding and truncation, by 20:
        2.5e-4 of the norm in float32.
    scale : float, optional
        What stands for the inner Hessian; None: 1.
    lr : float, optional
        The learning rate of DARTS' unrolled step: `outer` is evaluated at ``params - lr d inner /
        d params``, one more gradient, and ``u = lr b``. The answer is then that of
        `one_step_grad` with a gradient step.
    preconditioner : callable, optional
        ``b -> u`` on pytrees shaped like `params`, which approximates the inverse of the inner
        Hessian. SAMA takes the derivative of its optimiser's update by the gradient.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.
    on_failure : {"warn", "raise", "ignore"}
        What to do when the difference is lost in rounding.
    return_info : bool
        Whether to return a `SolveInfo` too.

    Returns
    -------
    grads : pytree of Tensor
        Shaped like `hparams`, detached.
    info : SolveInfo
        With `return_info`. `solution` is ``u``; `success` says that the difference is not lost
        in rounding, and nothing of how well ``u`` solves the linear system.
    aux : pytree
        With `has_aux` and without `return_info`.

    Raises
    ------
    NotConnected
        If `outer` does not depend on `params`, or a loss reaches an argument past it.
    NotConverged
        With ``on_failure="raise"``, if the difference is lost in rounding.
    NotFinite
        If a number is not finite, unless `on_failure` is "ignore".
    StructureMismatch
        If a loss is no scalar, or the preconditioner's answer is not shaped like `params`.
    UnsupportedOperation
        If the hypergradient is differentiated, or a loss changes its arguments.
    ValueError
        If more than one of `scale`, `lr` and `preconditioner` is given, or one is no number.

    References
    ----------
    Liu, Simonyan and Yang, DARTS: Differentiable architecture search, 2019, equation 8; Choe et
    al., Making scalable meta learning practical, 2023.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = lambda w, lam: (w - 1) ** 2 + lam * w**2  # the Hessian is 2 + 2 lam
    >>> w, lam = torch.tensor(0.5), torch.tensor(1.0)
    >>> hypergrad.finite_difference_grad(lambda w, lam: w, inner, w, lam, scale=4.0)
    tensor(-0.2500)
    """
    if sum(option is not None for option in (scale, lr, preconditioner)) > 1:
        raise ValueError("Give one of scale, lr and preconditioner: each stands for the Hessian.")
    check_positive(epsilon=epsilon, lr=lr)
    if scale is not None and (scale == 0 or not math.isfinite(scale)):
        raise ValueError(f"scale must be finite and not zero; got {scale}.")
    call = FirstOrder("finite_difference_grad", outer, inner, params, hparams, has_aux, on_failure)
    at, layout, steps = call.at, call.at.layout, int(lr is not None)
    slopes = call.outer_slopes(descend([(call.inner, 1.0)], at, lr=lr or 0.0, steps=steps))
    b = layout.flatten(slopes.by_params)
    if preconditioner is not None:
        u = preconditioner(at.P.fill(layout.split(b)))
        u = layout.flatten(at.P.match("What preconditioner returned", u)).detach()
    else:
        u = b * lr if lr is not None else b / (1.0 if scale is None else scale)

    size = norm(u)
    h = torch.where(size > 0, _length(at, epsilon) / size, torch.ones_like(size))
    above, below = (
        call.inner(moved(layout, at.params, layout.split(u), way * h), by_params=False)
        for way in (1, -1)
    )
    grads = added(slopes.by_hparams, -1 / (2 * h), difference(above.by_hparams, below.by_hparams))
    rounding = rounding_share(layout, above.by_hparams, grads, 1 / (2 * h))
    rounding = torch.where(size > 0, rounding, torch.zeros_like(rounding))  # then there is none
    info = None
    if return_info:
        success = ~(rounding > MOSTLY_ROUNDING) & torch.isfinite(size)
        solution = at.P.fill(layout.split(u))
        info = evidence("finite difference", slopes, solution, success, Status.STAGNATED)
    figures = [(rounding, MOSTLY_ROUNDING, _LOST)]
    return call.finish(grads, [slopes, above, below], figures, info=info)


def _length(at: Arguments, epsilon: float | None) -> Tensor:
    """Choose how far `params` is moved to each side."""
    size = norm(at.layout.flatten(at.params))
    if epsilon is not None:
        return torch.full_like(size, epsilon)
    # Parameters this close to zero have no scale of their own.
    size = torch.where(size > (at.eps * at.layout.n) ** 0.5, size, torch.ones_like(size))
    return _BENT * at.eps ** (1 / 3) * size
