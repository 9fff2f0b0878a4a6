"""Evaluating a function once so that its derivatives can be taken many times.

In plain autograd the function runs on fresh aliases of its arguments; inside a function
transform a level of `torch.func.vjp` provides them. Either way `torch.autograd.grad` then
replays the recorded graph, with a choice of inputs, as often as is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from .._errors import UnsupportedOperation
from .torch_pytrees import pytree
from .transforms import (
    alive,
    carries_derivative,
    has_tangent,
    is_wrapped,
    layers,
    transforms_active,
    without_saved_tensor_hooks,
)

if TYPE_CHECKING:
    from .._pytrees import Tree
    from .in_place import InPlace

T = TypeVar("T")

# How many traces surround a call: a result from inside one will be differentiated.
_depth: ContextVar[int] = ContextVar("hypergrad_trace_depth", default=0)


@dataclasses.dataclass
class Notes:
    """The notes taken while a user's functions ran.

    Attributes
    ----------
    callers : sequence of Tree
        The caller's arguments, which must not be overwritten.
    moving : list of str
        Modules that moved, without a derivative that knows of it.
    around : callable, optional
        What every product of the recorded graph is to be formed inside of, as a function that
        makes a context manager; None: nothing, which is quick.
    placed : bool
        Whether the arguments are DTensors, and modules may hold such.
    in_place : InPlace, optional
        Who moves the parameters of modules of several processes, which may run then.
    """

    moving: list[str] = dataclasses.field(default_factory=list)
    callers: Sequence[Tree] = ()
    around: Callable[[], AbstractContextManager[Any]] | None = None
    placed: bool = False
    in_place: InPlace | None = None


# The notes of the innermost trace.
_notes: ContextVar[Notes | None] = ContextVar("hypergrad_notes", default=None)


class Graph(NamedTuple):
    """The graph that an output was computed through.

    Attributes
    ----------
    leaves : list of Tensor
        The tensors at its ends.
    edges : set
        Each as ``(t.grad_fn, t.output_nr)``.
    """

    leaves: list[Tensor]
    edges: set[tuple[Any, int]]

    @property
    def nodes(self) -> set[Any]:
        """The functions on the way."""
        return {node for node, _ in self.edges}


# The graphs that have been walked in the innermost trace, by the output's id.
_walked: ContextVar[dict[int, tuple[Tensor, Any, Graph]] | None] = ContextVar(
    "hypergrad_walked_graphs", default=None
)


def trace(fun: Callable[[list[Tensor]], T], variables: Sequence[Tensor]) -> T:
    """Call ``fun(aliases)`` so that what it returns can be differentiated by its aliases.

    The aliases stay connected to `variables` where those carry derivatives of their own: detach
    first where that is not wanted. The caller's grad mode does not matter.

    Parameters
    ----------
    fun : callable
        Called once, with a list of aliases.
    variables : sequence of Tensor
        What the aliases stand for.

    Returns
    -------
    answer
        What `fun` returned.
    """
    depth, walked, notes = _depth.set(_depth.get() + 1), _walked.set({}), _notes.set(Notes())
    try:
        with torch.inference_mode(False), torch.enable_grad(), without_saved_tensor_hooks():
            if not transforms_active():
                return fun([_alias(v) for v in variables])
            results: list[T] = []

            def record(*aliases: Tensor) -> Tensor:
                results.append(fun(list(aliases)))
                return aliases[0]

            torch.func.vjp(record, *variables)
            return pytree.tree_map_only(Tensor, alive, results[0])
    finally:
        _depth.reset(depth)
        _walked.reset(walked)
        _notes.reset(notes)


def notes() -> Notes:
    """Return the notes of the innermost trace."""
    return _notes.get() or Notes()


def refuse_moving() -> None:
    """Raise where a second derivative is to be taken through a module that moves without one.

    Raises
    ------
    UnsupportedOperation
        Naming it.
    """
    moving = notes().moving
    if moving:
        raise UnsupportedOperation(
            f"{moving[0]} is a spectral_norm in train mode: each evaluation moves its vectors, "
            "without a derivative, so that a second derivative would lack their movement. Call "
            "the module until the vectors have converged, and then module.eval()."
        )


def being_traced() -> bool:
    """Say whether the call is made by a function that the library is tracing."""
    return _depth.get() > 0


def _alias(variable: Tensor) -> Tensor:
    if variable.requires_grad:
        return variable.view_as(variable)
    if has_tangent(variable):  # of forward mode, which a detached tensor would lose
        return variable.view_as(variable).requires_grad_()
    return detached(variable).requires_grad_()


def detached(variable: Tensor) -> Tensor:
    """Cut the tensor's values off from every derivative that surrounds the call."""
    if variable.is_inference():
        with torch.inference_mode(False):
            return variable.clone()  # an inference tensor cannot take part in autograd
    return variable.detach()


def versions(tensors: Sequence[Tensor]) -> list[int]:
    """Count how often the memory of each tensor has been changed in place."""
    plain = [layers(t)[-1] if is_wrapped(t) else t for t in tensors]
    return [0 if tensor.is_inference() else tensor._version for tensor in plain]


def further_out(output: Tensor, aliases: Sequence[Tensor]) -> list[Tensor]:
    """Find what an output depends on that is differentiated around the trace (call it there)."""
    own, *further = layers(output)
    if any(carries_derivative(layer) for layer in further):
        return further[:1]
    if has_tangent(own):
        return [own]
    if further or _depth.get() < 2:
        return []
    known = {id(alias) for alias in aliases}
    # The value and not the leaf: a derivative may be taken of something in between.
    return [own] if any(id(leaf) not in known for leaf in graph(own).leaves) else []


def graph(output: Tensor) -> Graph:
    """Look up the graph of an output, which is walked once in a trace."""
    known = _walked.get()
    if known is None:
        return _walk(output)
    entry = known.get(id(output))
    if entry is None or entry[1] is not output.grad_fn:
        entry = known[id(output)] = output, output.grad_fn, _walk(output)
    return entry[2]


def reaches(output: Tensor, alias: Tensor) -> bool:
    """Say whether an output depends on the alias of a variable, as autograd sees it."""
    leaves, edges = graph(output)
    if alias.grad_fn is None:
        return any(leaf is alias for leaf in leaves)
    return (alias.grad_fn, alias.output_nr) in edges


def _walk(output: Tensor) -> Graph:
    leaves: list[Tensor] = []
    edges: set[tuple[Any, int]] = set()
    visited: set[Any] = set()
    for layer in layers(output):
        stack = []
        if layer.grad_fn is not None:
            edges.add((layer.grad_fn, layer.output_nr))
            stack.append(layer.grad_fn)
        elif layer.requires_grad:
            leaves.append(layer)
        while stack:
            node = stack.pop()
            if node in visited:
                continue
            visited.add(node)
            following_edges = node.next_functions
            if not following_edges and (variable := getattr(node, "variable", None)) is not None:
                leaves.append(variable)
            for following, number in following_edges:
                if following is not None:
                    edges.add((following, number))
                    stack.append(following)
    return Graph(leaves, edges)
