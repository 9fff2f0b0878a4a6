"""Forward mode through an inner loop: the tangents of the inner variables, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autograd.products import ForwardReplay
from .._autograd.recording import Recording, record
from .._autograd.rows import by_rows
from .._autograd.trace import detached, graph
from .._pytrees import Tree
from ..conditions._base import plus
from ._answer import Found
from ._inner_loop import InnerLoop, map_tensors
from ._loss import Arguments, Loss


@dataclasses.dataclass(frozen=True)
class Forward:
    """The derivative of the inner variables by each hyperparameter, carried along the steps.

    For ``n`` hyperparameters it keeps ``n`` copies of the inner variables and records one step at
    a time. Each step is evaluated once; its ``n`` products are mapped.
    """

    outer: Callable[[Any, Any], Any]
    loop: InnerLoop
    has_aux: bool
    #: Positions of the hyperparameters that a step, or `init`, depends on.
    reached: set[int] = dataclasses.field(default_factory=set)

    def gradient(self, first: int, steps: int) -> Found:
        """Run `steps` steps and differentiate those from `first`."""
        with torch.inference_mode(False):
            return self._gradient(first, steps)

    def _gradient(self, first: int, steps: int) -> Found:
        loop, H = self.loop, self.loop.H
        constants = [detached(v) for v in H.variables]
        directions = _basis(constants)
        captured: list[Tensor] = []
        if first or not callable(loop.init):
            params = loop.forward(loop.begin(constants), constants, 0, first)
            tree = Tree("params", params)
            n = directions[0].shape[0] if directions else 0
            tangents = [v.new_zeros(n, *v.shape) for v in map(detached, tree.variables)]
        else:
            params, tangents = self._push(constants, None, directions, [], captured, loop.made)
        for k in range(first, steps):

            def step(given: Any, params: Any, k: int = k) -> Any:
                return loop.advance(params, given, k, k + 1)

            params, tangents = self._push(
                constants, Tree("params", params), directions, tangents, captured, step
            )
        return self._contract(constants, Tree("params", params), tangents, captured)

    def _push(
        self,
        constants: list[Tensor],
        tree: Tree | None,
        directions: list[Tensor],
        tangents: list[Tensor],
        captured: list[Tensor],
        fun: Callable[..., Any],
    ) -> tuple[Any, list[Tensor]]:
        """The value of a step, or of `init`, and its tangents in all directions."""
        H, state = self.loop.H, [] if tree is None else [detached(v) for v in tree.variables]

        def evaluate(recording: Recording) -> tuple[Any, list[Tensor]]:
            aliases = recording.aliases
            seed = aliases.pop()
            given = H.rebuild(aliases[: len(constants)])
            before = [] if tree is None else [tree.rebuild(aliases[len(constants) :])]
            ended = fun(given, *before)
            outputs = Tree("params", ended).variables
            recording.returned(outputs)
            recording.refuse_past_arguments("step or init", [H])
            captured.extend(recording.captured())
            leaves = {id(leaf) for output in outputs for leaf in graph(output).leaves}
            self.reached.update(i for i in range(len(constants)) if id(aliases[i]) in leaves)
            push = ForwardReplay(outputs, aliases, seed)

            def product(*parts: Tensor) -> list[Tensor]:
                found = push(parts)
                pairs = zip(found, outputs, strict=True)
                return [torch.zeros_like(o) if t is None else t for t, o in pairs]

            pushed = by_rows(product, *directions, *tangents)
            return ended, [t.detach() for t in pushed]

        seed = torch.zeros((), dtype=torch.float64, device=constants[0].device)
        trees = [H] if tree is None else [tree, H]
        ended, pushed = record(evaluate, [*constants, *state, seed], trees, [H])
        return map_tensors(ended, Tensor.detach), pushed

    def _contract(
        self,
        constants: list[Tensor],
        tree: Tree,
        tangents: list[Tensor],
        captured: list[Tensor],
    ) -> Found:
        """The gradient of the outer loss, applied to the tangents."""
        given = Arguments(tree, self.loop.H)
        found = Loss("outer", self.outer, given, has_aux=self.has_aux)(given.params)
        captured += found.captured
        direct, slopes = found.by_hparams, found.by_params
        grads: list[Tensor | None] = list(direct)
        used = [(s, t) for s, t in zip(slopes, tangents, strict=True) if s is not None]
        if used:
            terms = [_wide(t).reshape(len(t), s.numel()) @ _wide(s).reshape(-1) for s, t in used]
            total = torch.stack(terms).sum(dim=0)
            parts = torch.split(total, [c.numel() for c in constants])
            for i in self.reached:
                indirect = parts[i].reshape(constants[i].shape).to(constants[i].dtype)
                grads[i] = plus(indirect, direct[i])
        return Found(grads, found.value, tree.rebuild(given.params), found.aux, captured)


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _basis(constants: list[Tensor]) -> list[Tensor]:
    """For each hyperparameter, its entry in every one of the ``n`` unit directions."""
    n = sum(c.numel() for c in constants)
    basis, start = [], 0
    for c in constants:
        part = torch.zeros(n, c.numel(), dtype=c.dtype, device=c.device)
        part[start : start + c.numel()] = torch.eye(c.numel(), dtype=c.dtype, device=c.device)
        basis.append(part.reshape(n, *c.shape))
        start += c.numel()
    return basis
