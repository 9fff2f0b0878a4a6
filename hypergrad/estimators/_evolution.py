"""Evolution strategies: the hypergradient from values of the outer loss alone."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypedDict, Unpack, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._captures import refuse_distributed
from .._errors import NotConverged
from .._guard import Guard
from .._overloads import Hparams, Outer
from .._problem import scalar
from .._randomness import Draw
from .._report import OnFailure, check_on_failure
from .._trace import detached, further_out
from .._transforms import (
    never_compiled,
    outside_transforms,
    without_left,
    without_saved_tensor_hooks,
)
from ._answer import Found, hypergradient, judge_figure
from ._inner_loop import InnerLoop, hyperparameters, map_tensors
from ._loss import MOSTLY_ROUNDING

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
def evolution_strategies_grad(
    outer: Callable[[Any, Any], Any],
    step: Callable[..., Any] | None,
    init: Any,
    hparams: Any,
    *,
    steps: int = 0,
    sigma: float = 0.01,
    pairs: int = 32,
    generator: torch.Generator | None = None,
    batching: Literal["vmap", "loop"] = "vmap",
    chunk_size: int | None = None,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Any:
    """Hypergradient from values of the outer loss at random hyperparameters, in pairs.

    With ``f(hparams) = outer(params, hparams)``, `params` being what the inner solver makes of
    `hparams`, and standard normal ``e_i``::

        1 / pairs  sum_i  (f(hparams + sigma e_i) - f(hparams - sigma e_i)) / (2 sigma)  e_i

    It is an unbiased estimate of the gradient of ``f`` smoothed by a Gaussian, whose distance to
    the gradient of ``f`` is of order ``sigma ** 2``: small for a smooth loss, and useful by itself
    where ``f`` is chaotic, as after many unstable steps. The noise is large: with ``n``
    hyperparameters its norm is about ``sqrt(n / pairs)`` times that of the gradient. No derivative
    through the inner solver is taken, so it need have none, and memory is flat in the steps.

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
        If `step` changes the structure of the inner variables, or `outer` is no scalar.
    UnsupportedOperation
        If the answer is differentiated.
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
    _check(step, init, steps, sigma, pairs, chunk_size, batching)
    H = hyperparameters(hparams)
    loop = InnerLoop.of(_no_step if step is None else step, init, H)
    refuse_distributed([outer, *loop.functions])
    evaluate = _Evaluation(outer, loop, steps, batching)
    moments = _Moments([detached(v) for v in H.variables], sigma)
    for first in range(0, pairs, chunk_size or pairs):
        moments.add(evaluate, min(chunk_size or pairs, pairs - first), generator)
    value, grads, errors = moments.value, moments.mean(), moments.standard_error()
    found = Found(list(grads), value, None, None, [without_left(t) for t in evaluate.captured])
    answer = hypergradient("evolution_strategies_grad", H, found, on_failure, _CURE)
    rounding = moments.rounding()
    judge_figure(rounding, MOSTLY_ROUNDING, on_failure, NotConverged, _lost)
    if not return_info:
        return answer
    squares = [
        torch.stack([t.to(value).square().sum() for t in parts]).sum() for parts in (errors, grads)
    ]
    fill = H.fill([e.to(v.dtype) for e, v in zip(errors, H.variables, strict=True)])
    return answer, EvolutionInfo(value, fill, (squares[0] / squares[1]).sqrt(), rounding)


@dataclasses.dataclass
class _Evaluation:
    """The outer loss for a batch of hyperparameters, with one draw for all batches."""

    outer: Callable[[Any, Any], Any]
    loop: InnerLoop
    steps: int
    batching: str
    draw: Draw = dataclasses.field(default_factory=Draw)
    captured: list[Tensor] = dataclasses.field(default_factory=list)

    def __call__(self, batch: list[Tensor]) -> Tensor:
        """The values, one for each row of the tensors."""
        if self.batching == "loop":
            return torch.stack([self._drawn(self._one, rows) for rows in zip(*batch, strict=True)])
        try:
            return self._drawn(torch.func.vmap(self._one, randomness="same"), batch)
        except RuntimeError as error:
            error.add_note(
                "hypergrad: the inner solver was mapped over the perturbed hyperparameters by "
                "torch.func.vmap. Where it uses .backward(), torch.optim, .item() or NumPy, pass "
                "batching='loop', which calls it for each."
            )
            raise

    def _drawn(self, fun: Callable[..., Tensor], given: Sequence[Tensor]) -> Tensor:
        modes = (torch.inference_mode(False), torch.enable_grad(), without_saved_tensor_hooks())
        with self.draw.evaluation(), modes[0], modes[1], modes[2]:
            return fun(*given)

    def _one(self, *variables: Tensor) -> Tensor:
        given = self.loop.H.rebuild(variables)
        with Guard():
            start = self.loop.init(given) if callable(self.loop.init) else self.loop.start
            self._note(start)
            params = map_tensors(start, lambda t: t.detach().clone())
            params = self.loop.forward(params, list(variables), 0, self.steps, self.captured)
            value = scalar("outer", self.outer(params, given))
            self._note(value)
            return value.detach()

    def _note(self, tree: Any) -> None:
        for leaf in pytree.tree_leaves(tree):
            if isinstance(leaf, Tensor):
                self.captured += further_out(leaf, [])


class _Moments:
    """Sums over the pairs, from which mean and standard error follow."""

    def __init__(self, center: list[Tensor], sigma: float) -> None:
        self._center, self._sigma, self._pairs = center, sigma, 0
        self._sums = [torch.zeros_like(c, dtype=_wide(c)) for c in center]
        self._squares = [torch.zeros_like(s) for s in self._sums]
        self._values: Any = 0.0
        self._sizes: Any = 0.0
        self._differences: Any = 0.0
        self._eps = 0.0

    def add(self, evaluate: _Evaluation, pairs: int, generator: torch.Generator | None) -> None:
        """Draw so many directions and evaluate both sides of each."""
        with outside_transforms():
            noise = [
                torch.randn((pairs, *c.shape), generator=generator, dtype=_wide(c), device=c.device)
                for c in self._center
            ]
        moves = [(self._sigma * n).to(c.dtype) for n, c in zip(noise, self._center, strict=True)]
        values = evaluate([
            torch.cat([c + m, c - m]) for c, m in zip(self._center, moves, strict=True)
        ])
        self._eps = torch.finfo(values.dtype).eps
        values = values.to(_wide(values))
        difference = values[:pairs] - values[pairs:]
        weights = difference / (2 * self._sigma)
        for place, part in enumerate(noise):
            terms = weights.to(part).reshape(-1, *[1] * (part.ndim - 1)) * part
            self._sums[place] = self._sums[place] + terms.sum(dim=0)
            self._squares[place] = self._squares[place] + terms.square().sum(dim=0)
        self._values = self._values + values.sum()
        self._sizes = self._sizes + values.square().sum()
        self._differences = self._differences + difference.square().sum()
        self._pairs += pairs

    @property
    def value(self) -> Tensor:
        """The mean of all values."""
        mean: Tensor = self._values / (2 * self._pairs)
        return mean

    def mean(self) -> list[Tensor]:
        """The estimate."""
        return [s / self._pairs for s in self._sums]

    def standard_error(self) -> list[Tensor]:
        """That of each entry of the estimate; NaN for a single pair."""
        if self._pairs == 1:
            return [torch.full_like(s, math.nan) for s in self._sums]
        spread = zip(self._sums, self._squares, strict=True)
        scale = self._pairs * (self._pairs - 1)
        return [((q - s.square() / self._pairs).clamp(min=0) / scale).sqrt() for s, q in spread]

    def rounding(self) -> Tensor:
        """The rounding of the values over their differences."""
        size = (self._sizes / 2).sqrt()  # of as many values as there are differences
        found: Tensor = self._eps * size / self._differences.sqrt()
        return torch.where(self._differences == 0, torch.full_like(found, math.inf), found)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _no_step(params: Any, hparams: Any) -> Any:
    return params


def _check(
    step: Any,
    init: Any,
    steps: int,
    sigma: float,
    pairs: int,
    chunk_size: int | None,
    batching: str,
) -> None:
    if step is None and (steps or not callable(init)):
        raise ValueError(
            "With step=None, init must be the whole solver, init(hparams) -> params, and steps 0."
        )
    if steps < 0 or pairs < 1 or (chunk_size is not None and chunk_size < 1):
        raise ValueError(
            f"steps must not be negative, pairs and chunk_size must be positive; got {steps}, "
            f"{pairs} and {chunk_size}."
        )
    if not (sigma > 0 and math.isfinite(sigma)):
        raise ValueError(f"sigma must be positive and finite; got {sigma}.")
    if batching not in ("vmap", "loop"):
        raise ValueError(f"batching must be 'vmap' or 'loop'; got {batching!r}.")


def _lost(share: str) -> str:
    return (
        "The outer loss hardly changes from one side of a pair to the other: the rounding of its "
        f"values may be {share} of the difference. Raise sigma, use float64, or look for a "
        ".detach(), a copy or a captured value that cuts hparams off."
    )
