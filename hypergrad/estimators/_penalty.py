"""The penalty gradient: second derivatives replaced by a second inner solution."""

from __future__ import annotations

from typing import Any, Literal, Required, TypedDict, Unpack, overload

import torch
from torch import Tensor

from .._autograd.refusals import never_compiled
from .._autograd.trace import detached
from .._implicit.signatures import Hparams, Objective, Outer, Params
from .._info import SolveInfo
from .._mistakes import explained
from .._warnings import OnFailure
from ..solvers._vectors import dot, norm
from ._answer import check_not_negative, check_positive, evidence
from ._first_order import FirstOrder, added, difference
from ._loss import MOSTLY_ROUNDING, Arguments, Leaves, Slopes, descend, rounding_share

_UNSOLVED = (
    "params does not solve the inner problem: its relative inner residual is {}, above inner_tol. "
    "Solve it further, or pass inner_tol=None where it is truncated on purpose."
)
_UNPENALISED = (
    "The penalised problem is not solved: its relative residual is {}, above rtol, and the "
    "answer's implicit term is of about that error. Make more steps, or larger ones (lr); or "
    "minimise inner + outer / penalty otherwise and pass it as penalised; or rtol=None."
)
_LOST = (
    "The difference of two gradients is lost in rounding, which may be {} of the answer. Make "
    "penalty smaller, or use float64."
)


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
    outer: Outer[Params, Hparams],
    inner: Objective[Params, Hparams],
    params: Params,
    hparams: Hparams,
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
) -> Hparams | tuple[Hparams, Any]:
    """Estimate the hypergradient from first derivatives at two inner solutions: F2SA's penalty.

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
        If the hypergradient is differentiated, or a loss changes its arguments.
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
    check_positive(penalty=penalty, lr=lr)
    check_not_negative(steps=steps)
    if (penalised is None) == (lr is None):
        raise ValueError(
            "Give either penalised, the minimiser of inner + outer / penalty, or lr, with which it "
            "is looked for by gradient steps."
        )
    call = FirstOrder("penalty_grad", outer, inner, params, hparams, has_aux, on_failure)
    at = call.at
    if lr is None:
        z = [detached(t) for t in at.P.match("penalised", penalised)]
    else:
        z = descend([(call.outer, 1 / penalty), (call.inner, 1.0)], at, lr=lr, steps=steps)

    slopes, there, here = call.outer_slopes(z), call.inner(z), call.inner(at.params)
    grads = added(slopes.by_hparams, penalty, difference(there.by_hparams, here.by_hparams))
    b, F = at.layout.flatten(slopes.by_params), at.layout.flatten(here.by_params)
    u = penalty * (at.layout.flatten(at.params) - at.layout.flatten(z))
    left = b + penalty * (at.layout.flatten(there.by_params) - F)
    figures = (
        (_unsolved(at, b, F, u), inner_tol, _UNSOLVED),
        (torch.where(norm(b) == 0, norm(left), norm(left) / norm(b)), rtol, _UNPENALISED),
        (_rounding(at, b, there, grads, penalty), MOSTLY_ROUNDING, _LOST),
    )
    info = None
    if return_info:
        success = ~(figures[2][0] > MOSTLY_ROUNDING)
        for figure, limit, _ in figures[:2]:
            success = success if limit is None else success & (figure <= limit)
        known: Any = {"inner_residual": figures[0][0], "residual_norm": figures[1][0]}
        solution = at.P.fill(at.layout.split(u))
        info = evidence("penalty", slopes, solution, success, outer_error=dot(u, F), **known)
    kept = at.P.rebuild([t.clone() for t in z] if return_params else z)  # z may be the caller's
    return call.finish(grads, [slopes, there, here], figures, kept, return_params, info)


def _unsolved(at: Arguments, b: Tensor, F: Tensor, u: Tensor) -> Tensor:
    """Measure the relative inner residual; without an outer gradient nothing judges it."""
    y = at.layout.flatten(at.params)
    least = (torch.finfo(y.dtype).eps * at.layout.n) ** 0.5
    unsolved = norm(F) * norm(u) / (norm(b) * norm(y).clamp(min=least))
    return torch.where((norm(b) == 0) | (norm(F) == 0), torch.zeros_like(unsolved), unsolved)


def _rounding(at: Arguments, b: Tensor, there: Slopes, grads: Leaves, penalty: float) -> Tensor:
    """Bound the rounding's share of the answer, where there is an outer gradient."""
    share = rounding_share(at.layout, there.by_hparams, grads, penalty)
    return torch.where(norm(b) == 0, torch.zeros_like(share), share)
