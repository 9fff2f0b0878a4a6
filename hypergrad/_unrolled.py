"""The hypergradient by differentiating the steps of an inner optimiser."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint as checkpointed

from ._errors import NotConnected, StructureMismatch, UnsupportedOperation
from ._problem import scalar
from ._trace import detached, further_out, trace
from ._transforms import refuse_derivatives, transforms_active
from ._tree import Tree


def unrolled_grad(
    outer: Callable[[Any, Any], Any],
    step: Callable[..., Any],
    init: Any,
    hparams: Any,
    *,
    steps: int,
    truncate: int | None = None,
    checkpoint: bool = False,
    mode: Literal["reverse"] = "reverse",
    has_aux: bool = False,
    return_params: bool = False,
) -> Any:
    """Hypergradient by differentiating through `steps` steps of an inner optimiser.

    This is the exact derivative of what the steps compute, whether or not they have converged;
    its memory grows with the steps.

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
        2 sqrt(steps) steps for one more forward pass. Not inside function transforms.
    mode : {"reverse"}
        The direction of differentiation.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.
    return_params : bool
        Whether to return the final inner variables too.

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
        If a tensor is a leaf of both `init` and `hparams`, so that its gradient would be lost.
    StructureMismatch
        If `step` changes the structure of the inner variables, or `outer` is no scalar.
    UnsupportedOperation
        If the answer is differentiated, or for `checkpoint` inside a function transform.
    ValueError
        If `steps` or `truncate` is negative.

    References
    ----------
    Domke, Generic methods for optimization-based modeling, 2012; Shaban et al., Truncated
    back-propagation for bilevel optimization, 2019.

    Examples
    --------
    >>> import torch, hypergrad
    >>> step = lambda w, lam: w - 0.1 * (2 * (w - 1) + 2 * lam * w)
    >>> w0, lam = torch.tensor(0.0), torch.tensor(1.0)
    >>> hypergrad.unrolled_grad(lambda w, lam: w, step, w0, lam, steps=100)  # -1 / (1 + lam)^2
    tensor(-0.2500)
    """
    if mode != "reverse":
        raise UnsupportedOperation(f"mode must be 'reverse'; got {mode!r}.")
    if steps < 0 or (truncate is not None and truncate < 0):
        raise ValueError(f"steps and truncate must not be negative; got {steps} and {truncate}.")
    if checkpoint and transforms_active():
        raise UnsupportedOperation(
            "checkpoint=True does not work inside torch.func transforms, where "
            "torch.utils.checkpoint is not supported. Use truncate=k, or batch the tasks in step."
        )
    H = Tree("hparams", hparams)
    _refuse_shared(init, H)
    numbered = _takes_number(step)
    first = 0 if truncate is None else max(0, steps - truncate)

    def advance(params: Any, given: Any, start: int, stop: int) -> Any:
        for k in range(start, stop):
            tree = Tree("params", params)
            params = step(params, given, k) if numbered else step(params, given)
            tree.match("What step returned", params)
        return params

    def evaluate(aliases: list[Tensor]) -> tuple[Any, Any, list[Tensor | None], list[Tensor]]:
        given = H.rebuild(aliases)
        params = init(given) if callable(init) else _map(init, detached)
        if first:
            with torch.no_grad():
                params = advance(params, given, 0, first)
            params = _map(params, Tensor.detach)
        length = max(1, math.isqrt(steps - first)) if checkpoint else max(1, steps - first)
        for start in range(first, steps, length):
            stop = min(start + length, steps)
            if checkpoint:
                params = _checkpointed(advance, params, given, start, stop)
            else:
                params = advance(params, given, start, stop)
        returned, aux = outer(params, given), None
        if has_aux:
            if not (isinstance(returned, tuple) and len(returned) == 2):
                raise StructureMismatch("With has_aux=True outer must return (loss, aux).")
            returned, aux = returned
        value = scalar("outer", returned)
        found: list[Tensor | None] = [None] * len(aliases)
        if value.requires_grad:
            found = list(torch.autograd.grad(value, aliases, allow_unused=True))
        return _map(params, Tensor.detach), _map(aux, Tensor.detach), found, further_out(value)

    params, aux, found, captured = trace(evaluate, [detached(v) for v in H.variables])
    leaves = [
        torch.zeros_like(v.detach())
        if g is None
        else g.detach().clone(memory_format=torch.contiguous_format)
        for g, v in zip(found, H.variables, strict=True)
    ]
    leaves = refuse_derivatives(leaves, [*H.variables, *captured], _not_differentiable)
    answer: list[Any] = [H.fill(leaves)]
    if has_aux:
        answer.append(aux)
    if return_params:
        answer.append(params)
    return answer[0] if len(answer) == 1 else tuple(answer)


def _checkpointed(
    advance: Callable[..., Any], params: Any, given: Any, start: int, stop: int
) -> Any:
    return checkpointed(advance, params, given, start, stop, use_reentrant=False)


def _takes_number(step: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(required) >= 3


def _refuse_shared(init: Any, H: Tree) -> None:
    if callable(init):
        return
    start = Tree("init", init)
    for i, leaf in enumerate(start.variables):
        for j, other in enumerate(H.variables):
            if leaf is other:
                raise NotConnected(
                    f"{start.variable_path(i)} and {H.variable_path(j)} are one tensor, whose "
                    "gradient through the initial point would be lost. Pass init as a callable: "
                    "init=lambda hparams: hparams."
                )


def _map(tree: Any, fun: Callable[[Tensor], Tensor]) -> Any:
    return pytree.tree_map(lambda leaf: fun(leaf) if isinstance(leaf, Tensor) else leaf, tree)


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "unrolled_grad returns a detached hypergradient that cannot be differentiated again. "
        "Differentiate the steps with torch.func.grad themselves for higher derivatives."
    )
