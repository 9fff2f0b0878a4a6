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
from .._autograd.recording import Recording
from .._autograd.trace import detached
from .._pytrees import Tree
from ..conditions._base import plus
from ..conditions._inner_problem import scalar, without_aux
from ._answer import Estimate
from ._inner_loop import InnerLoop, map_tensors


@dataclasses.dataclass(frozen=True)
class Reverse:
    """The steps as a chain of segments, differentiated one by one from the last.

    Only the inner variables between segments are kept. A segment is recorded when its turn comes.
    Without checkpointing there is a single segment.
    """

    outer: Callable[[Any, Any], Any]
    loop: InnerLoop
    has_aux: bool

    def gradient(self, first: int, steps: int, length: int) -> Estimate:
        """Run `steps` steps and differentiate those from `first`, in segments of `length`."""
        loop, H = self.loop, self.loop.H
        constants = [detached(v) for v in H.variables]
        arguments = H.rebuild(constants)
        start: Any = loop.start
        with torch.no_grad():
            if first:
                begin = loop.made(arguments) if start is None else start
                start = loop.forward(begin, constants, 0, first)
            bounds = [(s, min(s + length, steps)) for s in range(first, steps, length)]
            bounds = bounds or [(first, first)]
            states, draws = [start], [Draw()]
            for s, e in bounds[:-1]:
                draws.append(Draw(after=draws[-1]))
                with draws[-2].evaluation():
                    begin = loop.made(arguments) if states[-1] is None else states[-1]
                    states.append(loop.forward(begin, constants, s, e))

        def last(arguments: Any, params: Any) -> Any:
            params = loop.advance(params, arguments, *bounds[-1])
            with Guard():
                returned = self.outer(params, arguments)
            returned, aux = without_aux("outer", returned, self.has_aux, "loss")
            value = scalar("outer", returned)
            # Detached: the other segments are to find the memory of this one free.
            kept = (*(map_tensors(t, Tensor.detach) for t in (params, aux)), value.detach())
            return [value], [torch.ones_like(value)], kept

        grads, cotangent, captured, (params, aux, value) = self._segment(
            states[-1], constants, last, draws[-1]
        )
        for i in reversed(range(len(bounds) - 1)):

            def middle(arguments: Any, params: Any, i: int = i, pulled: Any = cotangent) -> Any:
                ended = loop.advance(params, arguments, *bounds[i])
                return Tree("params", ended).variables, pulled, None

            more, cotangent, further, _ = self._segment(states[i], constants, middle, draws[i])
            grads = [plus(a, b) for a, b in zip(grads, more, strict=True)]
            captured += further
        return Estimate(grads, value, params, aux, captured)

    def _segment(
        self,
        state: Any,
        constants: list[Tensor],
        evaluate: Callable[[Any, Any], Any],
        draw: Draw,
    ) -> tuple[list[Tensor | None], list[Tensor | None], list[Tensor], Any]:
        """Pull a cotangent back through a segment: to the hyperparameters and to its start.

        Returns
        -------
        by_hparams, by_start : list of Tensor or None
            The two pulled-back cotangents.
        captured : list of Tensor
            What the segment captures.
        more
            What `evaluate` returned beside its outputs.
        """

        def pull(
            recording: Recording, arguments: Any, params: Any
        ) -> tuple[list[Tensor | None], list[Tensor], Any]:
            outputs, cotangents, more = evaluate(arguments, params)
            recording.returned(outputs)
            recording.refuse_past_arguments("outer, step or init", [self.loop.H])
            pulled = list(Replay(outputs, recording.aliases)(cotangents))
            return pulled, recording.captured(), more

        pulled, captured, more = self.loop.recorded(pull, constants, state, draw=draw)
        return pulled[: len(constants)], pulled[len(constants) :], captured, more
