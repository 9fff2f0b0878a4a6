"""Evolution strategies: the hypergradient from values of the outer loss alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor

from .._autograd.refusals import never_compiled
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached
from .._errors import NotConverged
from .._implicit.signatures import Hparams, Outer, Params
from .._mistakes import explained
from .._pytrees import Layout
from .._warnings import OnFailure, check_on_failure
from ._answer import Estimate, check_positive, hypergradient, judge_figure
from ._antithetic import Evaluation, Moments
from ._inner_loop import InnerLoop, hyperparameters
from ._loss import MOSTLY_ROUNDING

_LOST = (
    "The outer loss hardly changes from one side of a pair to the other: the rounding of its "
    "values may be {} of the difference. Raise sigma, use float64, or look for a .detach(), a copy "
    "or a captured value that cuts hparams off."
)
_CURE = "The inner solver may diverge at hyperparameters so far apart: make sigma smaller."


@dataclasses.dataclass(frozen=True)
class EvolutionInfo:
    """How far an estimate by evolution strategies can be trusted.

    It is a registered pytree whose leaves are tensors.

    Attributes
    ----------
    outer_value : Tensor
        The mean of all values of the outer loss: the smoothed loss, estimated.
    standard_error : pytree of Tensor
        That of each entry of the answer, shaped like `hparams`; NaN for a single pair.
    relative_error : Tensor
        The norm of `standard_error` over that of the answer. From one on the direction is mostly
        noise; it falls as ``1 / sqrt(pairs)``.
    rounding : Tensor
        The rounding of the outer loss over the differences that the answer is made of.

    Examples
    --------
    >>> import torch, hypergrad
    >>> grads, info = hypergrad.evolution_strategies_grad(
    ...     lambda w, h: w.sum(), None, lambda h: h**2, torch.ones(3), pairs=100, return_info=True
    ... )
    >>> bool(info.relative_error < 0.5), info.standard_error.shape
    (True, torch.Size([3]))
    """

    outer_value: Tensor
    standard_error: Any
    relative_error: Tensor
    rounding: Tensor


pytree.register_dataclass(EvolutionInfo, serialized_type_name="hypergrad.EvolutionInfo")


class _Options(TypedDict, total=False):
    """The keywords that do not change what is returned."""

    steps: int
    sigma: float
    pairs: int
    generator: torch.Generator | None
    batching: Literal["vmap", "loop"]
    chunk_size: int | None
    on_failure: OnFailure


@overload
def evolution_strategies_grad(
    outer: Outer[Any, Hparams],
    step: Callable[..., Any] | None,
    init: Any,
    hparams: Hparams,
    *,
    return_info: Literal[False] = ...,
    **options: Unpack[_Options],
) -> Hparams: ...
@overload
def evolution_strategies_grad(
    outer: Outer[Any, Hparams],
    step: Callable[..., Any] | None,
    init: Any,
    hparams: Hparams,
    *,
    return_info: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Hparams, EvolutionInfo]: ...
@overload
def evolution_strategies_grad(
    outer: Outer[Any, Hparams],
    step: Callable[..., Any] | None,
    init: Any,
    hparams: Hparams,
    *,
    return_info: bool = ...,
    **options: Unpack[_Options],
) -> Any: ...
@never_compiled
@explained
def evolution_strategies_grad(
    outer: Outer[Params, Hparams],
    step: Callable[..., Any] | None,
    init: Params | Callable[[Hparams], Params],
    hparams: Hparams,
    *,
    steps: int = 0,
    sigma: float = 0.01,
    pairs: int = 32,
    generator: torch.Generator | None = None,
    batching: Literal["vmap", "loop"] = "vmap",
    chunk_size: int | None = None,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Hparams | tuple[Hparams, Any]:
    """Estimate the hypergradient from values of the outer loss at random hyperparameters, in pairs.

    With ``f(hparams) = outer(params, hparams)``, `params` being what the inner solver makes of
    `hparams`, and standard normal ``e_i``::

        1 / pairs  sum_i  (f(hparams + sigma e_i) - f(hparams - sigma e_i)) / (2 sigma)  e_i

    It is an unbiased estimate of the gradient of ``f`` smoothed by a Gaussian. The distance to the
    gradient of ``f`` is of order ``sigma ** 2``: small for a smooth loss. The smoothed gradient is
    useful by itself where ``f`` is chaotic, as after many unstable steps. The noise is large: with
    ``n`` hyperparameters its norm is about ``sqrt(n / pairs)`` times that of the gradient. No
    derivative through the inner solver is taken, so it need have none, and memory is flat in the
    steps.

    All ``2 * pairs`` evaluations see the same random numbers of the functions' own.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor.
    step : callable, optional
        ``step(params, hparams) -> params``, or with a third argument the step's number, as in
        `unrolled_grad`. None: `init` is the whole solver.
    init : pytree of Tensor, or callable
        Where the steps start; ``init(hparams)`` where that depends on the hyperparameters. With
        ``step=None`` any solver, ``init(hparams) -> params``.
    hparams : pytree of Tensor
        The outer variables.
    steps : int
        How many steps are made.
    sigma : float
        The standard deviation of the perturbation.
    pairs : int
        How many directions; each costs two runs of the inner solver.
    generator : torch.Generator, optional
        Where the directions are drawn from. Tasks of a surrounding vmap share them.
    batching : {"vmap", "loop"}
        "vmap" maps the inner solver over the pairs; "loop" calls it for each, as solvers need
        that use ``.backward()``, torch.optim, ``.item()`` or NumPy.
    chunk_size : int, optional
        How many pairs are in memory at a time; None: all.
    on_failure : {"warn", "raise", "ignore"}
        What to do when the differences are lost in rounding.
    return_info : bool
        Whether to return an `EvolutionInfo` too.

    Returns
    -------
    grads : pytree of Tensor
        Shaped like `hparams`, detached.
    info : EvolutionInfo
        With `return_info`.

    Raises
    ------
    NotConnected
        If a tensor is a leaf of both `init` and `hparams`.
    NotConverged
        With ``on_failure="raise"``, if the differences are lost in rounding: the outer loss is
        too insensitive to perturbations of this size, or not connected to `hparams` at all.
    NotFinite
        If a number is not finite, unless `on_failure` is "ignore".
    StructureMismatch
        If `step` changes the structure of the inner variables, `outer` is no scalar, or `hparams`
        holds no floating-point tensor.
    UnsupportedOperation
        If the hypergradient is differentiated.
    ValueError
        If a number is out of its range.

    References
    ----------
    Salimans et al., Evolution strategies as a scalable alternative to reinforcement learning,
    2017; Metz et al., Understanding and correcting pathologies in the training of learned
    optimizers, 2019.

    Examples
    --------
    >>> import torch, hypergrad
    >>> step = lambda w, lam: w - 0.1 * (2 * (w - 1) + 2 * lam * w)
    >>> w0, lam = torch.tensor(0.0), torch.tensor(1.0)
    >>> grads = hypergrad.evolution_strategies_grad(
    ...     lambda w, lam: w, step, w0, lam, steps=100, pairs=1000,
    ...     generator=torch.Generator().manual_seed(0),
    ... )
    >>> bool(abs(grads + 0.25) < 0.05)  # -1 / (1 + lam)^2
    True
    """
    check_on_failure(on_failure)
    if step is None and (steps or not callable(init)):
        raise ValueError(
            "With step=None, init must be the whole solver, init(hparams) -> params, and steps 0."
        )
    if steps < 0 or pairs < 1 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(
            f"steps must not be negative, pairs and chunk_size must be positive; got {steps}, "
            f"{pairs} and {chunk_size}."
        )
    check_positive(sigma=sigma)
    if batching not in ("vmap", "loop"):
        raise ValueError(f"batching must be 'vmap' or 'loop'; got {batching!r}.")
    H = hyperparameters(hparams)
    Layout(H, H.variables)  # refuses what holds no tensor, or tensors on several devices
    loop = InnerLoop.of(_no_step if step is None else step, init, H)
    evaluate = Evaluation(outer, loop, steps, batching)
    moments = Moments([detached(v) for v in H.variables], sigma)
    for first in range(0, pairs, chunk_size or pairs):
        moments.add(evaluate, min(chunk_size or pairs, pairs - first), generator)
    value, grads, errors = moments.value, moments.mean(), moments.standard_error()
    estimate = Estimate(list(grads), value, None, None, evaluate.captured)
    filled = hypergradient("evolution_strategies_grad", H, estimate, on_failure, _CURE)
    rounding = moments.rounding()
    judge_figure(rounding, MOSTLY_ROUNDING, on_failure, NotConverged, _LOST)
    if not return_info:
        return filled
    squares = [
        torch.stack([t.to(value).square().sum() for t in of]).sum() for of in (errors, grads)
    ]
    fill = H.fill([e.to(v.dtype) for e, v in zip(errors, H.variables, strict=True)])
    return filled, EvolutionInfo(value, fill, (squares[0] / squares[1]).sqrt(), rounding)


def _no_step(params: Any, hparams: Any) -> Any:
    return params
