"""The hypergradient by differentiating the steps of an inner optimiser."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Required, TypedDict, Unpack, overload

from .._autograd.refusals import never_compiled
from .._errors import UnsupportedOperation
from .._implicit.signatures import Hparams, Outer, Params
from .._mistakes import explained
from .._warnings import OnFailure, check_on_failure, warn_of_unused
from ._answer import handed_out, hypergradient
from ._forward import Forward
from ._inner_loop import InnerLoop, hyperparameters
from ._reverse import Reverse

_CURE = "The steps may diverge: make them smaller, or look at the data."


class _Options(TypedDict, total=False):
    """The keywords that do not change what is returned."""

    steps: Required[int]
    truncate: int | None
    checkpoint: bool
    mode: Literal["reverse", "forward"]
    on_failure: OnFailure


@overload
def unrolled_grad(
    outer: Outer[Any, Hparams],
    step: Callable[..., Any],
    init: Any,
    hparams: Hparams,
    *,
    has_aux: Literal[False] = ...,
    return_params: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Hparams: ...
@overload
def unrolled_grad(
    outer: Outer[Any, Hparams],
    step: Callable[..., Any],
    init: Any,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_params: bool = ...,
    **options: Unpack[_Options],
) -> Any: ...
@never_compiled
@explained
def unrolled_grad(
    outer: Outer[Params, Hparams],
    step: Callable[..., Any],
    init: Params | Callable[[Hparams], Params],
    hparams: Hparams,
    *,
    steps: int,
    truncate: int | None = None,
    checkpoint: bool = False,
    mode: Literal["reverse", "forward"] = "reverse",
    has_aux: bool = False,
    return_params: bool = False,
    on_failure: OnFailure = "warn",
) -> Hparams | tuple[Hparams, Any]:
    """Compute the hypergradient by differentiating through `steps` steps of an inner optimiser.

    This is the exact derivative of what the steps compute, whether or not they have converged.
    Its memory grows with the steps in reverse mode, with their square root with `checkpoint`, and
    with the number of hyperparameters in forward mode.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor; with `has_aux` a pair of it and anything.
    step : callable
        ``step(params, hparams) -> params``, or with a third argument the step's number.
    init : pytree of Tensor, or callable
        Where the steps start; ``init(hparams)`` where that depends on the hyperparameters, as
        in MAML.
    hparams : pytree of Tensor
        The outer variables.
    steps : int
        How many steps are made.
    truncate : int, optional
        Differentiate the last so many steps only: cheaper, and biased.
    checkpoint : bool
        Keep one inner state in about sqrt(steps) and compute the rest again: memory of
        2 sqrt(steps) steps for one more forward pass. Steps that are linear in `params` record
        nothing, and gain nothing.
    mode : {"reverse", "forward"}
        The direction of differentiation. "forward" is for few hyperparameters and many steps: it
        keeps one copy of the inner variables for each entry of `hparams` and records one step
        at a time, whose cost grows with the number of entries.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.
    return_params : bool
        Whether to return the final inner variables too.
    on_failure : {"warn", "raise", "ignore"}
        With "ignore", NaN is left as NaN and nothing is read from the device.

    Returns
    -------
    grads : pytree of Tensor
        Shaped like `hparams`, detached.
    aux : pytree
        With `has_aux`.
    params : pytree of Tensor
        With `return_params`, detached.

    Raises
    ------
    NotConnected
        If a tensor is a leaf of both `init` and `hparams`, or a function reaches a leaf of
        `hparams` past its arguments, so that its gradient would be lost.
    StructureMismatch
        If `step` changes the structure of the inner variables, or `outer` is no scalar.
    NotFinite
        If a number is not finite, unless `on_failure` is "ignore".
    UnsupportedOperation
        If the hypergradient is differentiated, or `mode` is none of the two.
    ValueError
        If `steps` or `truncate` is negative, or `checkpoint` goes with the forward mode.

    References
    ----------
    Domke, Generic methods for optimization-based modeling, 2012; Shaban et al., Truncated
    back-propagation for bilevel optimization, 2019; Franceschi et al., Forward and reverse
    gradient-based hyperparameter optimization, 2017; Chen et al., Training deep nets with
    sublinear memory cost, 2016.

    Examples
    --------
    >>> import torch, hypergrad
    >>> step = lambda w, lam: w - 0.1 * (2 * (w - 1) + 2 * lam * w)
    >>> w0, lam = torch.tensor(0.0), torch.tensor(1.0)
    >>> hypergrad.unrolled_grad(lambda w, lam: w, step, w0, lam, steps=100)  # -1 / (1 + lam)^2
    tensor(-0.2500)
    """
    if mode not in ("reverse", "forward"):
        raise UnsupportedOperation(f"mode must be 'reverse' or 'forward'; got {mode!r}.")
    if checkpoint and mode == "forward":
        raise ValueError("checkpoint=True is for mode='reverse': forward mode stores no steps.")
    if steps < 0 or (truncate is not None and truncate < 0):
        raise ValueError(f"steps and truncate must not be negative; got {steps} and {truncate}.")
    check_on_failure(on_failure)
    H = hyperparameters(hparams)
    loop = InnerLoop.of(step, init, H)
    first = 0 if truncate is None else max(0, steps - truncate)
    if mode == "forward" and H.variables:
        estimate = Forward(outer, loop, has_aux).gradient(first, steps)
    else:
        length = max(1, math.isqrt(steps - first)) if checkpoint else max(1, steps - first)
        estimate = Reverse(outer, loop, has_aux).gradient(first, steps, length)
    if first < steps:
        warn_of_unused(H, "Neither outer nor step", estimate.grads)
    grads = hypergradient("unrolled_grad", H, estimate, on_failure, _CURE)
    return handed_out(grads, estimate, has_aux, return_params)
