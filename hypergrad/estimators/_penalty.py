"""The penalty gradient: second derivatives replaced by a second inner solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from .._autograd.refusals import never_compiled
from .._autograd.trace import detached
from .._errors import NotConverged
from .._implicit.signatures import Hparams, Objective, Outer
from .._implicit.verdict import OnFailure, check_on_failure, warn_of_unused
from .._info import SolveInfo
from .._mistakes import explained
from ..conditions._base import plus
from ..solvers._vectors import dot, norm
from ._answer import Found, evidence, hypergradient, judge_figure
from ._inner_loop import map_tensors
from ._loss import (
    MOSTLY_ROUNDING,
    Arguments,
    Loss,
    descend,
    require_params,
    rounding_share,
)

_CURE = "The gradient steps may diverge: make lr smaller, or look at the data."


class _Options(TypedDict, total=False):
    """The keywords that do not change what is returned."""

    penalty: Required[float]
    penalised: Any
    lr: float | None
    steps: int
    rtol: float | None
    inner_tol: float | None
    on_failure: OnFailure


@overload
def penalty_grad(
    outer: Outer[Any, Hparams],
    inner: Objective[Any, Hparams],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: Literal[False] = ...,
    return_params: Literal[False] = ...,
    return_info: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Hparams: ...
@overload
def penalty_grad(
    outer: Outer[Any, Hparams],
    inner: Objective[Any, Hparams],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_params: Literal[False] = ...,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Hparams, SolveInfo]: ...
@overload
def penalty_grad(
    outer: Outer[Any, Hparams],
    inner: Objective[Any, Hparams],
    params: Any,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_params: bool = ...,
    return_info: bool = ...,
    **options: Unpack[_Options],
) -> Any: ...
@never_compiled
@explained
def penalty_grad(
    outer: Callable[[Any, Any], Any],
    inner: Callable[[Any, Any], Any],
    params: Any,
    hparams: Any,
    *,
    penalty: float,
    penalised: Any = None,
    lr: float | None = None,
    steps: int = 10,
    rtol: float | None = 0.1,
    inner_tol: float | None = 1e-3,
    has_aux: bool = False,
    return_params: bool = False,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Any:
    """Hypergradient from first derivatives at two inner solutions: F2SA's penalty method.

    With ``y`` the minimiser of `inner` and ``z`` that of ``inner + outer / penalty``::

        d outer(z) + penalty (d inner(z) - d inner(y))        all d by hparams

    No second derivative is taken and no linear system is solved: three gradients, each with the
    memory of one, whatever the size of the model. The bias is of order ``1 / penalty``; rounding
    grows as ``penalty``, so that 1e2 to 1e3 is a good range in float32.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor; with `has_aux` a pair of it and anything.
    inner : callable
        ``inner(params, hparams)``, the objective that `params` minimises.
    params : pytree of Tensor
        ``y``, found in any way. Frozen parameters beside others that are not are constants.
    hparams : pytree of Tensor
        The outer variables.
    penalty : float
        What `inner` is multiplied by against `outer`.
    penalised : pytree of Tensor, optional
        ``z``, found in any way: it is close to `params`, so a few steps of the same optimiser on
        ``inner + outer / penalty`` lead there. None: gradient steps from `params`.
    lr : float, optional
        Their size, of the order of one over the inner problem's largest curvature; needed
        without `penalised`.
    steps : int
        Their number; each costs a gradient of both losses by `params`.
    rtol : float, optional
        Above this relative residual of the second problem the answer counts as failed. None:
        measured, not judged, as mini-batches want it.
    inner_tol : float, optional
        The same for the first problem, as in `implicit_grad`.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.
    return_params : bool
        Whether to return ``z`` too, where the next call may start.
    on_failure : {"warn", "raise", "ignore"}
        What to do when the answer may be wrong.
    return_info : bool
        Whether to return a `SolveInfo` too.

    Returns
    -------
    grads : pytree of Tensor
        Shaped like `hparams`, detached.
    info : SolveInfo
        With `return_info`. `solution` is ``penalty (y - z)``, which stands for the solution of
        the linear system, and `residual_norm` the relative residual that it leaves there.
    aux : pytree
        With `has_aux` and without `return_info`.
    params : pytree of Tensor
        With `return_params`, detached.

    Raises
    ------
    NotConnected
        If `outer` does not depend on `params`, or a loss reaches an argument past it.
    NotConverged
        With ``on_failure="raise"``, if one of the two problems is not solved, or the difference
        is lost in rounding.
    NotFinite
        If a number is not finite, unless `on_failure` is "ignore".
    StructureMismatch
        If a loss is no scalar, or `penalised` is not shaped like `params`.
    UnsupportedOperation
        If the answer is differentiated, or a loss changes its arguments.
    ValueError
        If a number is out of its range, or neither `penalised` nor `lr` is given, or both.

    References
    ----------
    Kwon et al., A fully first-order method for stochastic bilevel optimization, 2023, equation 4
    and lemma 3.1.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = lambda w, lam: (w - 1) ** 2 + lam * w**2  # the minimiser is 1 / (1 + lam)
    >>> w, lam = torch.tensor(0.5), torch.tensor(1.0)
    >>> hypergrad.penalty_grad(lambda w, lam: w, inner, w, lam, penalty=100.0, lr=0.2)
    tensor(-0.2494)
    """
    check_on_failure(on_failure)
    _check(penalty, penalised, lr, steps)
    given = Arguments.of(params, hparams)
    layout, P, H = given.layout, given.P, given.H
    of_outer = Loss("outer", outer, given, has_aux=has_aux)
    of_inner = Loss("inner", inner, given)
    captured: list[Tensor] = []
    if lr is None:
        z = [detached(t) for t in P.match("penalised", penalised)]
    else:
        both = [(of_outer, 1 / penalty), (of_inner, 1.0)]
        z, captured = descend(both, layout, given.params, lr=lr, steps=steps)

    slopes = of_outer(z)
    require_params(slopes)
    there, here = of_inner(z), of_inner(given.params)
    difference = [
        None if a is None or c is None else penalty * (a - c)
        for a, c in zip(there.by_hparams, here.by_hparams, strict=True)
    ]
    grads = [plus(d, part) for d, part in zip(slopes.by_hparams, difference, strict=True)]
    captured += [*slopes.captured, *there.captured, *here.captured]
    found = Found(grads, slopes.value, P.rebuild(z), slopes.aux, captured)
    answer = hypergradient("penalty_grad", H, found, on_failure, _CURE)

    b, F = layout.flatten(slopes.by_params), layout.flatten(here.by_params)
    y = layout.flatten(given.params)
    u = penalty * (y - layout.flatten(z))
    left = b + penalty * (layout.flatten(there.by_params) - F)
    residual = torch.where(norm(b) == 0, norm(left), norm(left) / norm(b))
    least = (torch.finfo(y.dtype).eps * layout.n) ** 0.5
    unsolved = norm(F) * norm(u) / (norm(b) * norm(y).clamp(min=least))
    rounding = rounding_share(layout, there.by_hparams, grads, penalty)
    # Without an outer gradient there is nothing to be judged by.
    flat = norm(b) == 0
    unsolved = torch.where(flat | (norm(F) == 0), torch.zeros_like(unsolved), unsolved)
    rounding = torch.where(flat, torch.zeros_like(rounding), rounding)
    for figure, limit, text in (
        (unsolved, inner_tol, _unsolved),
        (residual, rtol, _unpenalised),
        (rounding, MOSTLY_ROUNDING, _lost),
    ):
        judge_figure(figure, limit, on_failure, NotConverged, text)
    if on_failure != "ignore":
        warn_of_unused(H, "Neither outer nor inner", slopes.by_hparams, there.by_hparams)

    aux = map_tensors(slopes.aux, Tensor.detach)
    results = [answer]
    if return_info:
        success = ~(rounding > MOSTLY_ROUNDING)
        if rtol is not None:
            success = success & (residual <= rtol)
        if inner_tol is not None:
            success = success & (unsolved <= inner_tol)
        results.append(
            evidence(
                "penalty",
                success=success,
                residual_norm=residual,
                inner_residual=unsolved,
                outer_error=dot(u, F),
                solution=P.fill(layout.split(u)),
                outer_value=slopes.value,
                aux=aux,
            )
        )
    elif has_aux:
        results.append(aux)
    if return_params:
        results.append(P.rebuild([t.clone() for t in z]))
    return results[0] if len(results) == 1 else tuple(results)


def _check(penalty: float, penalised: Any, lr: float | None, steps: int) -> None:
    if not (penalty > 0 and math.isfinite(penalty)):
        raise ValueError(f"penalty must be positive and finite; got {penalty}.")
    if (penalised is None) == (lr is None):
        raise ValueError(
            "Give either penalised, the minimiser of inner + outer / penalty, or lr, with which it "
            "is looked for by gradient steps."
        )
    if lr is not None and not (lr > 0 and math.isfinite(lr)):
        raise ValueError(f"lr must be positive and finite; got {lr}.")
    if steps < 0:
        raise ValueError(f"steps must not be negative; got {steps}.")


def _unsolved(figure: str) -> str:
    return (
        f"params does not solve the inner problem: its relative inner residual is {figure}, above "
        "inner_tol. Solve it further, or pass inner_tol=None where it is truncated on purpose."
    )


def _unpenalised(figure: str) -> str:
    return (
        f"The penalised problem is not solved: its relative residual is {figure}, above rtol, and "
        "the answer's implicit term is of about that error. Make more steps, or larger ones (lr); "
        "or minimise inner + outer / penalty otherwise and pass it as penalised; or rtol=None."
    )


def _lost(share: str) -> str:
    return (
        f"The difference of two gradients is lost in rounding, which may be {share} of the answer. "
        "Make penalty smaller, or use float64."
    )
