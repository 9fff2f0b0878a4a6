"""Tracing a function of tensors into a graph of ATen operations, without mutations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .._autograd.branches import following
from .._autograd.random_numbers import generators, restore
from .capture import NotCaptured

aten = torch.ops.aten


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
    own = [_copied(t.detach()) for t in examples]
    seen: tuple[bool, ...] = ()

    def noted(*inputs: Tensor) -> list[Tensor]:
        nonlocal seen
        with following() as branches:
            outputs = list(function(*inputs))
        seen = tuple(branches.seen)
        return [*outputs, torch.stack(branches.flags)] if seen else outputs

    random = generators()
    try:
        raw = make_fx(noted)(*own)
        _refuse_impure(raw)
        if not all(map(_equal, own, examples)):
            raise NotCaptured("a tensor that was made before the call is changed in place")
        pure = make_fx(torch.func.functionalize(raw, remove="mutations"))(*own)
        _refuse_impure(pure)
    finally:
        restore(random)
    for node in pure.graph.nodes:
        if node.op == "call_function" and _is_mutable(node.target):
            raise NotCaptured(f"a tensor is changed in place ({node.target})")
    return Traced(pure, seen)


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one == other
    return bool((same | one.isnan() & other.isnan() if one.is_floating_point() else same).all())


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor in the order of its memory: a function that changes it changes the copy."""
    if any(
        step == 0 and size > 1 for step, size in zip(tensor.stride(), tensor.shape, strict=True)
    ):
        return tensor.view_as(tensor)  # it cannot be changed in place
    copy = torch.empty_strided(
        tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return copy.copy_(tensor)


def _refuse_impure(module: fx.GraphModule) -> None:
    """Raise where a replay would not repeat what a call does."""
    for node in module.graph.nodes:
        if node.op == "get_attr":
            # A tensor that is written down in code is copied before its first use.
            fresh = all(user.target in _COPIES for user in node.users)
            if isinstance(getattr(module, str(node.target)), Tensor) and not fresh:
                raise NotCaptured(
                    "a tensor is used that is no argument and that none of the functions captures"
                )
        target = node.target
        if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
            continue
        if torch.Tag.nondeterministic_seeded in target.tags:
            raise NotCaptured(f"random numbers are drawn ({target})")
        if torch.Tag.dynamic_output_shape in target.tags and not _indexes_by_number(node):
            raise NotCaptured(f"the shape of a result depends on values ({target})")
        if target in _OF_MEMORY:
            raise NotCaptured(f"a tensor is read in the order of its memory ({target})")


def _is_mutable(target: object) -> bool:
    return isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable


def _indexes_by_number(node: fx.Node) -> bool:
    """Say whether a node picks entries by their numbers, and not by a mask."""
    if node.target is not aten.index.Tensor:
        return False
    indices: Any = node.args[1]
    kinds = [index.meta["val"].dtype for index in indices if index is not None]
    return not any(kind in (torch.bool, torch.uint8) for kind in kinds)


_COPIES = frozenset({aten.lift_fresh.default, aten.lift_fresh_copy.default})
_OF_MEMORY = frozenset({
    aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default,
})  # fmt: skip
