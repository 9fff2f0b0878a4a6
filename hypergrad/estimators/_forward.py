"""Forward mode through an inner loop: the tangents of the inner variables, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autograd.products import ForwardReplay, filled
from .._autograd.recording import Recording
from .._autograd.rows import by_rows
from .._autograd.trace import detached, graph
from .._pytrees import Tree
from ..conditions._base import plus
from ._answer import Estimate
from ._inner_loop import InnerLoop, map_tensors
from ._loss import Arguments, Loss, wide


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

    def gradient(self, first: int, steps: int) -> Estimate:
        """Run `steps` steps and differentiate those from `first`."""
        with torch.inference_mode(False):
            return self._gradient(first, steps)

    def _gradient(self, first: int, steps: int) -> Estimate:
        loop = self.loop
        constants = [detached(v) for v in loop.H.variables]
        directions, captured = _basis(constants), list[Tensor]()
        if first or not callable(loop.init):
            params = loop.forward(loop.begin(constants), constants, 0, first)
            n, variables = len(directions[0]), Tree("params", params).variables
            tangents = [v.new_zeros(n, *v.shape) for v in map(detached, variables)]
        else:
            params, tangents = self._push(constants, None, directions, captured, None)
        for k in range(first, steps):
            params, tangents = self._push(constants, params, [*directions, *tangents], captured, k)
        return self._contract(constants, Tree("params", params), tangents, captured)

    def _push(
        self,
        constants: list[Tensor],
        state: Any,
        tangents: list[Tensor],
        captured: list[Tensor],
        k: int | None,
    ) -> tuple[Any, list[Tensor]]:
        """Evaluate step `k`, or `init`, and push its tangents in all directions."""
        loop = self.loop

        def evaluate(recording: Recording, arguments: Any, ended: Any) -> tuple[Any, list[Tensor]]:
            aliases = recording.aliases
            seed = aliases.pop()
            if k is not None:
                ended = loop.advance(ended, arguments, k, k + 1)
            outputs = Tree("params", ended).variables
            recording.returned(outputs)
            recording.refuse_past_arguments("step or init", [loop.H])
            captured.extend(recording.captured())
            leaves = {id(leaf) for output in outputs for leaf in graph(output).leaves}
            self.reached.update(i for i in range(len(constants)) if id(aliases[i]) in leaves)
            push = ForwardReplay(outputs, aliases, seed)

            def product(*leaves: Tensor) -> list[Tensor]:
                return filled(push(leaves), outputs)

            return ended, [t.detach() for t in by_rows(product, *tangents)]

        seed = torch.zeros((), dtype=torch.float64, device=constants[0].device)
        ended, pushed = loop.recorded(evaluate, constants, state, seed)
        return map_tensors(ended, Tensor.detach), pushed

    def _contract(
        self,
        constants: list[Tensor],
        tree: Tree,
        tangents: list[Tensor],
        captured: list[Tensor],
    ) -> Estimate:
        """Apply the gradient of the outer loss to the tangents."""
        point = Arguments(tree, self.loop.H)
        slopes = Loss("outer", self.outer, point, has_aux=self.has_aux)(point.params)
        grads = list(slopes.by_hparams)
        used = [(s, t) for s, t in zip(slopes.by_params, tangents, strict=True) if s is not None]
        if used:
            terms = [wide(t).reshape(len(t), s.numel()) @ wide(s).reshape(-1) for s, t in used]
            rows = torch.stack(terms).sum(dim=0).split([c.numel() for c in constants])
            for i in self.reached:
                indirect = rows[i].reshape(constants[i].shape).to(constants[i].dtype)
                grads[i] = plus(indirect, grads[i])
        captured += slopes.captured
        return Estimate(grads, slopes.value, tree.rebuild(point.params), slopes.aux, captured)


def _basis(constants: list[Tensor]) -> list[Tensor]:
    """Make, for each hyperparameter, its entry in every one of the ``n`` unit directions."""
    sizes = [c.numel() for c in constants]
    columns = torch.eye(sum(sizes), device=constants[0].device).split(sizes, dim=1)
    return [b.to(c.dtype).reshape(-1, *c.shape) for b, c in zip(columns, constants, strict=True)]
