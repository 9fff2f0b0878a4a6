"""How projections and proximal maps are called: with all arguments, or with those they take."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .schemas import positional_names

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


def most_positional(function: Callable[..., Any], first: int) -> int | None:
    """Count the arguments that a function takes by position, from its signature.

    Where the step, or the first argument of the inner problem, would be passed for a flag (an
    argument whose default is True or False, as the `inplace` of `torch.nn.functional.relu` is),
    the count ends: it is not meant for that.

    Parameters
    ----------
    function : callable
        A function, a `functools.partial`, a module, an operation of PyTorch's, or any other object
        that can be called.
    first : int
        How many arguments come before those of the inner problem: 1 or, with the step, 2.

    Returns
    -------
    count : int or None
        None where there is no bound, or none is known.
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = inspect.signature(called, follow_wrapped=False).parameters.values()
        kinds = {parameter.kind for parameter in parameters}
        if inspect.Parameter.VAR_POSITIONAL in kinds and kinds.isdisjoint(_POSITIONAL):
            parameters = inspect.signature(called).parameters.values()  # that of what is wrapped
    except (TypeError, ValueError):
        return _most_of_operation(called)
    return _count(parameters, first)


def selected(most: int | None, first: Sequence[Any], others: Sequence[Any]) -> tuple[Any, ...]:
    """Select the arguments of a map that takes `most` by position.

    Parameters
    ----------
    most : int or None
        As `most_positional` has counted them.
    first : sequence
        The point and, of a proximal map, the step.
    others : sequence
        The arguments of the inner problem.

    Returns
    -------
    arguments : tuple
        The first ones alone for a map that takes no others; else all.

    Raises
    ------
    TypeError
        If the map takes some of the others, and not all.
    """
    wanted = len(first) + len(others)
    if most is None or not 1 <= most < wanted:
        return (*first, *others)
    if most > len(first):
        raise TypeError(
            f"A projection or proximal map takes {most} arguments by position, and is passed "
            f"{wanted}: {'v' if len(first) == 1 else 'v, step_size'}, and those of the inner "
            f"problem. Write a function that takes them all, or v alone: lambda v: ..."
        )
    return tuple(first[:most])


def _count(parameters: Iterable[inspect.Parameter], first: int) -> int | None:
    count = 0
    for parameter in parameters:
        if parameter.kind is inspect.Parameter.VAR_POSITIONAL:
            return None
        flag = count <= first and isinstance(parameter.default, bool)
        if parameter.kind not in _POSITIONAL or flag:
            break
        count += 1
    return count


def _most_of_operation(operation: Any) -> int | None:
    """Count those of an operation of PyTorch's, or of a partial one."""
    fixed, named = 0, set[str]()
    if isinstance(operation, functools.partial):
        fixed, named = len(operation.args), set(operation.keywords)
        operation = operation.func
    counts = []
    for names in positional_names(operation):
        free = next((i for i, name in enumerate(names) if name in named), len(names))
        counts.append(free - fixed)
    return max(counts, default=None)
