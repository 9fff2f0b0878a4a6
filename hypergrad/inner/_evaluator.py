"""The caller's function on flat vectors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from .._advice import advice
from .._captures import refuse_past_arguments
from .._errors import NotConnected
from .._problem import scalar
from .._replay import Replay
from .._trace import detached, further_out, trace
from .._transforms import alive, carries_derivative
from .._tree import Layout, Tree
from ..solvers._base import norm


class Evaluator:
    """The caller's function on flat vectors, detached from all that surrounds the call."""

    def __init__(self, fun: Callable[..., Any], tree: Tree, layout: Layout, args: Any) -> None:
        self.fun, self.tree, self.layout = fun, tree, layout
        self.args = pytree.tree_map(lambda t: detached(t) if isinstance(t, Tensor) else t, args)
        self.captured: list[Tensor] = []
        self._known: set[str] = set()

    def params(self, x: Tensor) -> Any:
        """A flat vector as the caller's pytree."""
        return self.tree.rebuild(self.layout.split(x))

    def objective(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The objective's value and its gradient."""
        value, gradient, _ = self._differentiated(x, twice=False)
        return value, gradient

    def with_hessian(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """The objective's value, its gradient, and products with its Hessian."""
        value, gradient, hessian = self._differentiated(x, twice=True)
        assert hessian is not None
        replay = hessian
        return value, gradient, lambda v: self._flat_gradient(replay(self.layout.split(v)), v)

    def curvature(self, x: Tensor, g: Tensor) -> Tensor:
        """``||H v|| / ||v||`` for v along the gradient, by a difference of gradients."""
        reach = torch.finfo(self.layout.precision).eps ** 0.5 * norm(x).clamp(min=1.0)
        size = norm(g)
        along = g / torch.where(size > 0, size, torch.ones_like(size))
        return norm(self.objective(x + reach * along)[1] - g) / reach

    def value(self, x: Tensor) -> Tensor:
        """The objective's value alone."""
        return self._scalar(self.params(x)).detach().to(x.dtype)

    def mapped(self, x: Tensor) -> Tensor:
        """A map's value."""
        return self.plain("T(params, ...)", self.fun, self.params(x), *self.args)

    def plain(self, what: str, fun: Callable[..., Any], *given: Any) -> Tensor:
        """What a function that is not differentiated returned, flat and detached."""
        first = what not in self._known
        with torch.set_grad_enabled(first):
            value = fun(*given)
        if first:
            leaves = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
            self.captured += [leaf for leaf in leaves if carries_derivative(leaf)]
            self._known.add(what)
        return self.layout.flatten(self.tree.match(what, value)).detach()

    def _scalar(self, params: Any) -> Tensor:
        return scalar("objective", self.fun(params, *self.args))

    def _differentiated(self, x: Tensor, *, twice: bool) -> tuple[Tensor, Tensor, Replay | None]:
        def evaluate(aliases: list[Tensor]) -> tuple[Tensor, Any, Replay | None]:
            value = self._scalar(self.tree.rebuild(aliases))
            self._note([value], aliases)
            found: Any = [None] * len(aliases)
            if value.requires_grad:
                found = torch.autograd.grad(value, aliases, create_graph=twice, allow_unused=True)
            for position, part in enumerate(found):
                if part is None:
                    raise NotConnected(
                        f"The objective does not depend on {self.tree.variable_path(position)}. "
                        "Leave that leaf out of init, or use it: a module must be called as torch."
                        "func.functional_call(module, params, args), and a .detach(), .item() or "
                        "torch.no_grad() inside cuts the connection."
                    )
            return value.detach(), found, Replay(found, aliases) if twice else None

        with advice([self.tree]):
            value, found, hessian = trace(evaluate, self.layout.split(x))
        return alive(value).to(x.dtype), self._flat_gradient(found, x), hessian

    def _flat_gradient(self, parts: Any, x: Tensor) -> Tensor:
        found = [
            torch.zeros_like(like) if part is None else alive(part.detach())
            for part, like in zip(parts, self.layout.split(x), strict=True)
        ]
        return self.layout.flatten(found)

    def _note(self, values: list[Tensor], aliases: list[Tensor]) -> None:
        """At the first evaluation, find what is differentiated around the call."""
        if "objective" not in self._known:
            refuse_past_arguments("The inner solver's function", values, aliases, [self.tree])
            self.captured += [t for value in values for t in further_out(value, aliases)]
            self._known.add("objective")
