"""Tracing a function of tensors into a graph of ATen operations, without mutations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .._autograd.branches import following
from .capture import NotCaptured


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function as a graph, and the branches that the host has taken in it.

    Attributes
    ----------
    module : GraphModule
        Its graph. The inputs are the function's, and the outputs are the function's and, where the
        host has looked at flags, a vector of those.
    seen : tuple of bool
        The values of the flags.
    """

    module: fx.GraphModule
    seen: tuple[bool, ...]

    @property
    def graph(self) -> fx.Graph:
        """The graph."""
        return self.module.graph


def traced(function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor]) -> Traced:
    """Trace a function.

    Parameters
    ----------
    function : callable
        Of tensors, to a list of tensors. Values of theirs may be read by `host` alone.
    examples : sequence of Tensor
        Its arguments. No two of them may be one tensor, which a trace could not tell apart.

    Returns
    -------
    traced : Traced
        The graph.

    Raises
    ------
    NotCaptured
        If the graph would not compute the same at the next call.
    """
    own = [t.detach().view_as(t) for t in examples]
    seen: tuple[bool, ...] = ()

    def noted(*inputs: Tensor) -> list[Tensor]:
        nonlocal seen
        with following() as branches:
            outputs = list(function(*inputs))
        seen = tuple(branches.seen)
        return [*outputs, torch.stack(branches.flags)] if seen else outputs

    raw = make_fx(noted)(*own)
    pure = make_fx(torch.func.functionalize(raw, remove="mutations"))(*own)
    _refuse_impure(pure)
    return Traced(pure, seen)


def _refuse_impure(module: fx.GraphModule) -> None:
    """Raise where a replay would not repeat what a call does."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            held = getattr(module, str(node.target))
            if isinstance(held, Tensor) and held.numel() > 1:
                raise NotCaptured("a tensor is made outside of PyTorch's functions")
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in node.target.tags:
            raise NotCaptured(f"random numbers are drawn ({node.target})")
        if node.target._schema.is_mutable:
            raise NotCaptured(f"a tensor is changed in place ({node.target})")
