"""Reverse mode through an inner loop, in segments of which one at a time is recorded."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autograd.guard import Guard
from .._autograd.products import Replay
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, record
from .._autograd.trace import detached
from .._pytrees import Tree
from ..conditions._base import plus
from ..conditions._inner_problem import scalar, without_aux
from ._answer import Found
from ._inner_loop import InnerLoop, map_tensors


@dataclasses.dataclass(frozen=True)
class Reverse:
    """The steps as a chain of segments, differentiated one by one from the last.

    Only the inner variables between segments are kept; what a segment computes is recorded when
    its turn comes. Without checkpointing there is a single segment.
    """

    outer: Callable[[Any, Any], Any]
    loop: InnerLoop
    has_aux: bool

    def gradient(self, first: int, steps: int, length: int) -> Found:
        """Run `steps` steps and differentiate those from `first`, in segments of `length`."""
        loop, H = self.loop, self.loop.H
        constants = [detached(v) for v in H.variables]
        given = H.rebuild(constants)
        start: Any = loop.start
        with torch.no_grad():
            if first:
                begin = loop.made(given) if start is None else start
                start = loop.forward(begin, constants, 0, first)
            bounds = [(s, min(s + length, steps)) for s in range(first, steps, length)]
            bounds = bounds or [(first, first)]
            states, draws = [start], [Draw()]
            for s, e in bounds[:-1]:
                draws.append(Draw(after=draws[-1]))
                with draws[-2].evaluation():
                    begin = loop.made(given) if states[-1] is None else states[-1]
                    states.append(loop.forward(begin, constants, s, e))

        def last(aliases: list[Tensor], params: Any) -> Any:
            given = H.rebuild(aliases)
            params = loop.advance(params, given, *bounds[-1])
            with Guard():
                returned = self.outer(params, given)
            returned, aux = without_aux("outer", returned, self.has_aux, "loss")
            value = scalar("outer", returned)
            # Detached: the other segments are to find the memory of this one free.
            kept = (*(map_tensors(t, Tensor.detach) for t in (params, aux)), value.detach())
            return [value], [torch.ones_like(value)], kept

        found, cotangent, captured, (params, aux, value) = self._segment(
            states[-1], constants, last, draws[-1]
        )
        for i in reversed(range(len(bounds) - 1)):

            def middle(
                aliases: list[Tensor], params: Any, i: int = i, pulled: Any = cotangent
            ) -> Any:
                ended = loop.advance(params, H.rebuild(aliases), *bounds[i])
                return Tree("params", ended).variables, pulled, None

            more, cotangent, further, _ = self._segment(states[i], constants, middle, draws[i])
            found = [plus(a, b) for a, b in zip(found, more, strict=True)]
            captured += further
        return Found(found, value, params, aux, captured)

    def _segment(
        self,
        state: Any,
        constants: list[Tensor],
        evaluate: Callable[[list[Tensor], Any], Any],
        draw: Draw,
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
        H = self.loop.H
        tree = None if state is None else Tree("params", state)

        def pull(recording: Recording) -> tuple[list[Tensor | None], list[Tensor], Any]:
            aliases = recording.aliases
            of_hparams = aliases[: len(constants)]
            if tree is None:
                params = self.loop.made(H.rebuild(of_hparams))
            else:
                params = tree.rebuild(aliases[len(constants) :])
            outputs, cotangents, more = evaluate(of_hparams, params)
            recording.returned(outputs)
            recording.refuse_past_arguments("outer, step or init", [H])
            found = list(Replay(outputs, aliases)(cotangents))
            return found, recording.captured(), more

        variables = [*constants, *([] if tree is None else tree.variables)]
        trees = [H] if tree is None else [tree, H]
        found, captured, more = record(pull, variables, trees, [H], draw)
        return found[: len(constants)], found[len(constants) :], captured, more
