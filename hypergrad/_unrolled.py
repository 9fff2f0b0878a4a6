"""The hypergradient by differentiating the steps of an inner optimiser."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._advice import advice
from ._captures import refuse_past_arguments
from ._conditions import plus
from ._errors import NotConnected, UnsupportedOperation
from ._problem import scalar, without_aux
from ._randomness import Draw
from ._replay import Replay
from ._report import warn_of_unused
from ._trace import being_traced, detached, further_out, trace
from ._transforms import never_compiled, refuse_derivatives
from ._tree import Tree


@never_compiled
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
        2 sqrt(steps) steps for one more forward pass.
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
        If a tensor is a leaf of both `init` and `hparams`, or a function reaches a leaf of
        `hparams` past its arguments, so that its gradient would be lost.
    StructureMismatch
        If `step` changes the structure of the inner variables, or `outer` is no scalar.
    UnsupportedOperation
        If the answer is differentiated.
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
    H = Tree("hparams", hparams)
    _refuse_shared(init, H)
    first = 0 if truncate is None else max(0, steps - truncate)

    unroll = _Unrolling(outer, step, init, H, _takes_number(step), has_aux)
    length = max(1, math.isqrt(steps - first)) if checkpoint else max(1, steps - first)
    params, aux, found, captured = unroll.gradient(first, steps, length)
    if first < steps:
        warn_of_unused(H, "Neither outer nor step", found)
    leaves = [
        torch.zeros_like(v.detach())
        if g is None
        else g.detach().clone(memory_format=torch.contiguous_format)
        for g, v in zip(found, H.variables, strict=True)
    ]
    sources = [*H.variables, *captured]
    leaves = refuse_derivatives(leaves, sources, _not_differentiable, plain=being_traced())
    answer: list[Any] = [H.fill(leaves)]
    if has_aux:
        answer.append(_map(aux, Tensor.detach))
    if return_params:
        answer.append(_map(params, Tensor.detach))
    return answer[0] if len(answer) == 1 else tuple(answer)


@dataclasses.dataclass(frozen=True)
class _Unrolling:
    """The steps as a chain of segments, differentiated one by one from the last.

    Only the inner variables between segments are kept; what a segment computes is recorded when
    its turn comes. Without checkpointing there is a single segment.
    """

    outer: Callable[[Any, Any], Any]
    step: Callable[..., Any]
    init: Any
    H: Tree
    numbered: bool
    has_aux: bool

    def gradient(
        self, first: int, steps: int, length: int
    ) -> tuple[Any, Any, list[Tensor | None], list[Tensor]]:
        """Final params, aux, gradients by the hyperparameters, and what the loss captures."""
        constants = [detached(v) for v in self.H.variables]
        given = self.H.rebuild(constants)
        start: Any = None if callable(self.init) else _map(self.init, detached)
        with torch.no_grad():
            if first:
                begin = self.init(given) if start is None else start
                start = self.forward(begin, constants, 0, first)
            bounds = [(s, min(s + length, steps)) for s in range(first, steps, length)]
            bounds = bounds or [(first, first)]
            states, draws = [start], [Draw() for _ in bounds]
            for (s, e), draw in zip(bounds[:-1], draws, strict=False):
                with draw.evaluation():
                    begin = self.init(given) if states[-1] is None else states[-1]
                    states.append(self.forward(begin, constants, s, e))

        def last(aliases: list[Tensor], params: Any) -> Any:
            given = self.H.rebuild(aliases)
            params = self.advance(params, given, *bounds[-1])
            returned, aux = without_aux("outer", self.outer(params, given), self.has_aux, "loss")
            value = scalar("outer", returned)
            return [value], [torch.ones_like(value)], (params, aux)

        found, cotangent, captured, (params, aux) = self.segment(states[-1], constants, last)
        for i in reversed(range(len(bounds) - 1)):

            def middle(
                aliases: list[Tensor], params: Any, i: int = i, pulled: Any = cotangent
            ) -> Any:
                ended = self.advance(params, self.H.rebuild(aliases), *bounds[i])
                return Tree("params", ended).variables, pulled, None

            with draws[i].evaluation():
                more, cotangent, further, _ = self.segment(states[i], constants, middle)
            found = [plus(a, b) for a, b in zip(found, more, strict=True)]
            captured += further
        return params, aux, found, captured

    def segment(
        self, state: Any, constants: list[Tensor], evaluate: Callable[[list[Tensor], Any], Any]
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor], Any]:
        """Pull a cotangent back through a segment: to the hyperparameters and to its start.

        Returns
        -------
        found, start : list of Tensor or None
            The two pulled-back cotangents.
        captured : list of Tensor
            What the segment captures.
        more
            What `evaluate` returned beside its outputs.
        """
        tree = None if state is None else Tree("params", state)

        def pull(aliases: list[Tensor]) -> tuple[list[Tensor | None], list[Tensor], Any]:
            of_hparams = aliases[: len(constants)]
            if tree is None:
                params = self.init(self.H.rebuild(of_hparams))
            else:
                params = tree.rebuild(aliases[len(constants) :])
            outputs, cotangents, more = evaluate(of_hparams, params)
            refuse_past_arguments("outer, step or init", outputs, aliases, [self.H])
            captured = [t for output in outputs for t in further_out(output, aliases)]
            return list(Replay(outputs, aliases)(cotangents)), captured, more

        variables = [*constants, *([] if tree is None else tree.variables)]
        with advice([self.H] if tree is None else [tree, self.H]):
            found, captured, more = trace(pull, variables)
        return found[: len(constants)], found[len(constants) :], captured, more

    def forward(self, params: Any, constants: list[Tensor], start: int, stop: int) -> Any:
        """Make steps without keeping a graph; each may take derivatives itself."""
        for k in range(start, stop):
            tree = Tree("params", params)

            def one(aliases: list[Tensor], k: int = k, tree: Tree = tree) -> Any:
                given = self.H.rebuild(aliases[: len(constants)])
                return self.advance(tree.rebuild(aliases[len(constants) :]), given, k, k + 1)

            start_of_step = [detached(v) for v in tree.variables]
            with advice([tree, self.H]):
                ended = trace(one, [*constants, *start_of_step])
            params = _map(ended, Tensor.detach)
        return params

    def advance(self, params: Any, given: Any, start: int, stop: int) -> Any:
        """Make the steps from `start` to `stop`."""
        for k in range(start, stop):
            tree = Tree("params", params)
            params = self.step(params, given, k) if self.numbered else self.step(params, given)
            tree.match("What step returned", params)
        return params


def _takes_number(step: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(step).parameters.values()
    except (TypeError, ValueError):
        return False
    positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    required = [p for p in parameters if p.kind in positional and p.default is p.empty]
    return len(required) >= 3


def _refuse_shared(init: Any, H: Tree) -> None:
    if callable(init) and not isinstance(init, nn.Module):
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
