"""The derivatives of a step by compiled programs."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached
from .._compiled.session import Body, Session
from ._batches import Batch

if TYPE_CHECKING:
    from ._derivatives import Derivatives

#: A batch for each level that is evaluated, "inner" or "outer".
Batches = Mapping[str, Batch]
#: ``evaluate(derivatives, batches, extra) -> tensors``
Evaluate = Callable[["Derivatives", Batches, Sequence[Tensor]], Sequence[Tensor]]


def replayed(
    session: Session,
    derivatives: Derivatives,
    of: tuple[str, ...],
    batches: Batches,
    tensors: Sequence[Tensor],
    extra: Sequence[Tensor],
    evaluate: Evaluate,
) -> list[Tensor] | None:
    """Evaluate and differentiate losses by a program.

    Parameters
    ----------
    session : Session
        Where programs are kept.
    derivatives : Derivatives
        The losses.
    of : tuple of str
        What is evaluated of them.
    batches : mapping
        On which batches, and so which losses.
    tensors : sequence of Tensor
        Where: those of the problem.
    extra : sequence of Tensor
        Vectors that take part.
    evaluate : callable
        ``evaluate(derivatives, batches, extra) -> tensors``, of other derivatives.

    Returns
    -------
    tensors : list of Tensor or None
        None: it is to be evaluated as without a compiler.
    """
    problem, condition = derivatives.problem, derivatives.problem.condition
    chain = condition.chain() if "inner" in batches else ()
    if chain is None:
        cause = f"the functions of {type(condition).__name__} are not followed"
        session.fall_back(("Bilevel.step", type(condition)), cause)
        return None
    args = [arg for batch in batches.values() for arg in batch.args]
    picks, begin = {}, 0
    for level, batch in batches.items():
        picks[level] = slice(begin, begin + len(batch.args))
        begin += len(batch.args)
    functions = [
        (f, "inner", first) for f, first in zip(condition.functions(), chain, strict=False)
    ]
    functions += [(derivatives.outer_loss, "outer", None)] if "outer" in batches else []
    leaves, spec = pytree.tree_flatten(args)
    places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    n, m = len(tensors), len(places)

    def rebuilt(given: Sequence[Tensor]) -> list[Any]:
        filled = list(leaves)
        for place, tensor in zip(places, given, strict=True):
            filled[place] = tensor
        whole: list[Any] = pytree.tree_unflatten(filled, spec)
        return whole

    def body(functions: list[Any], tensors: list[Tensor]) -> Body:
        own = rebuilt(tensors[n : n + m])
        inner = [functools.partial(_among, f, own, picks["inner"]) for f in functions[: len(chain)]]
        outer = derivatives.outer_loss
        if "outer" in batches:
            outer = functools.partial(_among, functions[-1], own, picks["outer"])
        posed = problem
        if inner:
            posed = dataclasses.replace(problem, condition=condition.with_functions(inner))
        there = derivatives.at(posed, outer, tensors[:n])
        mine = {k: batch._replace(args=tuple(own[picks[k]])) for k, batch in batches.items()}
        return Body(evaluate(there, mine, tensors[n + m :]))

    given = [leaves[place] for place in places]
    arguments = [*problem.arguments([detached(t) for t in tensors])]
    arguments += rebuilt([detached(t) for t in given])
    stages = [
        (f if len(batches) == 1 else _picked(f, picks[level]), first)
        for f, level, first in functions
    ]
    key = of, type(condition), condition.symmetric
    everything = [*tensors, *given, *extra]
    replay = session.replay("Bilevel.step", key, stages, arguments, everything, body, None)
    if replay is None:
        return None
    if session.is_due(replay.program):
        present = evaluate(derivatives, batches, extra)
        session.agree(replay, replay.tensors, present)
        return list(present)
    return replay.tensors


def _picked(function: Callable[..., Any], pick: slice) -> Callable[..., Any]:
    """Give a loss its own among the batches of all levels."""
    first, last = pick.start, pick.stop

    @functools.wraps(function)
    def picked(params: Any, hparams: Any, *batches: Any) -> Any:
        return function(params, hparams, *batches[first:last])

    return picked


def _among(
    function: Callable[..., Any],
    batches: list[Any],
    pick: slice,
    params: Any,
    hparams: Any,
    *own: Any,
) -> Any:
    """Call a captured loss, which takes the batches of all levels, with its own."""
    return function(params, hparams, *batches[: pick.start], *own, *batches[pick.stop :])
