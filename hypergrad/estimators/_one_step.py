"""One-step differentiation: the derivative of the last step alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, overload

from torch import Tensor

from .._autograd.refusals import never_compiled
from .._errors import StructureMismatch
from .._implicit.signatures import Hparams, Outer, Params
from .._mistakes import explained
from .._pytrees import Tree
from .._warnings import OnFailure, check_on_failure, warn_of_unused
from ._answer import handed_out, hypergradient
from ._inner_loop import InnerLoop, hyperparameters
from ._reverse import Reverse

_CURE = "Look at the step size and the data."


@overload
def one_step_grad(
    outer: Outer[Any, Hparams],
    step: Callable[[Any, Hparams], Any],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: Literal[False] = ...,
    return_params: Literal[False] = ...,
    on_failure: OnFailure = ...,
) -> Hparams: ...
@overload
def one_step_grad(
    outer: Outer[Any, Hparams],
    step: Callable[[Any, Hparams], Any],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_params: bool = ...,
    on_failure: OnFailure = ...,
) -> Any: ...
@never_compiled
@explained
def one_step_grad(
    outer: Outer[Params, Hparams],
    step: Callable[[Params, Hparams], Params],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: bool = False,
    return_params: bool = False,
    on_failure: OnFailure = "warn",
) -> Hparams | tuple[Hparams, Any]:
    """Estimate the hypergradient by differentiating one step of an inner solver near convergence.

    One step is made from `params`, and that step alone is differentiated, with `params` a
    constant: ``outer(step(params, hparams), hparams)`` by `hparams`. The cost is one step and its
    gradient, the memory that of one step.

    It is exact at a fixed point of a step whose derivative by `params` is zero there, as that of
    Newton's method is. Where that derivative has norm ``rho < 1`` the error is at most
    ``rho / (1 - rho)`` times the norms of the two factors that are left, ``d step / d hparams``
    and ``d outer / d params``. That is small for a solver that converges in a few steps, and
    larger than the answer for gradient steps on an ill-conditioned problem.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor; with `has_aux` a pair of it and anything.
    step : callable
        ``step(params, hparams) -> params``, one step of the inner solver.
    params : pytree of Tensor
        Where the solver has arrived, the last step left out or not.
    hparams : pytree of Tensor
        The outer variables.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.
    return_params : bool
        Whether to return what the step made of `params` too.
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
        If a function reaches a leaf of `hparams` past its arguments.
    NotFinite
        If a number is not finite, unless `on_failure` is "ignore".
    StructureMismatch
        If `step` changes the structure of the inner variables, or `outer` is no scalar.
    UnsupportedOperation
        If the hypergradient is differentiated.

    References
    ----------
    Bolte, Pauwels and Vaiter, One-step differentiation of iterative algorithms, 2023.

    Examples
    --------
    >>> import torch, hypergrad
    >>> heron = lambda x, a: (x + a / x) / 2  # Newton's method for x = sqrt(a)
    >>> hypergrad.one_step_grad(lambda x, a: x, heron, torch.tensor(2.0), torch.tensor(4.0))
    tensor(0.2500)
    """
    check_on_failure(on_failure)
    if callable(params) and not isinstance(params, Tensor):
        Tree("params", params)  # a module has a message of its own
        raise StructureMismatch(
            "params is a function; one_step_grad starts from inner variables, which are constant. "
            "Pass what the function returns, or use unrolled_grad, which differentiates it.",
            argument="params",
        )
    H = hyperparameters(hparams)
    loop = InnerLoop(step, params, H, numbered=False)
    estimate = Reverse(outer, loop, has_aux).gradient(0, 1, 1)
    warn_of_unused(H, "Neither outer nor step", estimate.grads)
    grads = hypergradient("one_step_grad", H, estimate, on_failure, _CURE)
    return handed_out(grads, estimate, has_aux, return_params)
