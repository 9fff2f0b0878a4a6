"""Tensors that a user's function reaches past its arguments: found, named, and refused."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._errors import UnsupportedOperation
from .random_numbers import unnoticed
from .recording import Recording, record
from .torch_pytrees import pytree
from .trace import detached, graph
from .transforms import (
    carries_derivative,
    first_slice,
    forward_mode_active,
    has_tangent,
    is_batched,
    layers,
    transforms_active,
)

if TYPE_CHECKING:
    from ..conditions._inner_problem import Problem


def captured_by(problem: Problem) -> list[Tensor]:
    """Find the values of an inner problem that capture a derivative or a batch.

    The condition is evaluated once, unless no derivative can be taken.

    Returns
    -------
    values : list of Tensor
        Values of the problem's functions that depend on it.
    """
    transformed = transforms_active() or forward_mode_active()
    if not transformed and not torch.is_grad_enabled():
        return []
    plain = [first_slice(t) if transformed else detached(t) for t in problem.tensors]
    places = [*problem.inner, *problem.outer]

    def past_arguments(recording: Recording) -> list[Tensor]:
        values = problem.condition.probe(problem, recording.placed(plain, places))
        recording.returned(values)
        return [value for value in values if _reaches_past(value, recording.aliases)]

    with unnoticed():
        variables = [plain[i] for i in places]
        return record(past_arguments, variables, problem.trees, in_pieces=True)


def _reaches_past(value: Tensor, aliases: Sequence[Tensor]) -> bool:
    """Say whether a value depends on a derivative or a batch beyond the traced aliases."""
    own, *further = layers(value)
    if any(carries_derivative(layer) for layer in further) or is_batched(value):
        return True
    if further:
        return False
    known = {id(alias) for alias in aliases}
    return has_tangent(own) or any(id(leaf) not in known for leaf in graph(own).leaves)


def carries_something(tensor: Tensor) -> bool:
    """Say whether a tensor carries a derivative or a batch."""
    return carries_derivative(tensor) or is_batched(tensor)


def names_of_captured(
    functions: Sequence[Callable[..., Any]], wanted: Callable[[Tensor], bool]
) -> str:
    """Name, for a message, the wanted ones among the tensors that functions capture."""
    names: list[str] = []
    for function in functions:
        for name, tensor in _captured(function):
            if wanted(tensor) and name not in names:
                names.append(name)
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def refuse_one_level_reduced(
    inner: Sequence[Callable[..., Any]], outer: Callable[..., Any]
) -> None:
    """Raise where one of the two losses is reduced over processes and the other is not.

    Parameters
    ----------
    inner : sequence of callables
        The functions of the inner problem.
    outer : callable
        The outer loss.

    Raises
    ------
    UnsupportedOperation
        If one level alone is.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    several = torch.distributed.get_world_size() > 1
    if several and _is_reduced(outer) != any(_is_reduced(f) for f in inner):
        raise UnsupportedOperation(
            "One of the two losses is reduced over processes and the other is not, so that every "
            "process would solve another system. Wrap both in hypergrad.all_reduced; one that all "
            "processes compute alike is divided by their number first.",
            argument="outer",
        )


def _is_reduced(function: Callable[..., Any]) -> bool:
    """Say whether a function is, or has hold of, one that `all_reduced` has made."""
    if isinstance(function, functools.partial):
        return any(_is_reduced(part) for part in (function.func, *function.args) if callable(part))
    held = [function, *(value for _, value in _closure(function))]
    return any(getattr(value, "is_sum_over_processes", False) is True for value in held)


def _captured(function: Callable[..., Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in _closure(function):
        yield from _tensors_in(name, value)


def _closure(function: Callable[..., Any]) -> Iterator[tuple[str, Any]]:
    """List what a function holds, by name: bound arguments, its owner's attributes, its closure."""
    while isinstance(function, functools.partial):
        yield "partial", [function.args, function.keywords]
        function = function.func
    if isinstance(function, nn.Module):
        yield "module", function
        return
    owner = getattr(function, "__self__", None)
    if owner is not None:
        yield "self", getattr(owner, "__dict__", {})
    try:
        variables = inspect.getclosurevars(function)
    except TypeError:
        return
    yield from {**variables.globals, **variables.nonlocals}.items()


def _tensors_in(name: str, value: Any) -> Iterator[tuple[str, Tensor]]:
    if isinstance(value, nn.Module):
        for key, tensor in value.named_parameters():
            yield f"{name}.{key}", tensor
        return
    for path, leaf in pytree.tree_flatten_with_path(value)[0]:
        if isinstance(leaf, Tensor):
            yield name + str(pytree.keystr(path)), leaf
        elif isinstance(leaf, nn.Module):
            yield from _tensors_in(name + str(pytree.keystr(path)), leaf)
