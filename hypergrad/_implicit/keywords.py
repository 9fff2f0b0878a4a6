"""Arguments that a decorated solver is called with by keyword."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any

from .._errors import UnsupportedOperation

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """A call of a decorated solver, taken apart.

    Attributes
    ----------
    init : Any
        The initial guess.
    positional : tuple
        What was passed by position after it.
    named : dict
        What was passed by keyword and is an argument of the inner problem.
    keywords : dict
        What reaches the solver alone.
    args : tuple
        The arguments of the inner problem, in its order.
    names : list of str
        What they are called, for messages.
    places : list of int
        Their positions in the decorated function.
    """

    init: Any
    positional: tuple[Any, ...]
    named: dict[str, Any]
    keywords: dict[str, Any]
    args: tuple[Any, ...]
    names: list[str]
    places: list[int]


def bound(
    fit: Callable[..., Any],
    function: Callable[..., Any],
    given: tuple[Any, ...],
    keywords: dict[str, Any],
) -> Arguments:
    """Bind the arguments of a call to the parameters of the inner problem.

    A keyword is the inner problem's where its function has a parameter of that name, or where it
    stands for a parameter that the function takes by position and that nothing else was passed for.
    Any other keyword reaches the solver alone.

    Parameters
    ----------
    fit : callable
        ``fit(init, *args)``.
    function : callable
        ``function(params, *args)``, of the inner problem.
    given : tuple
        What was passed by position.
    keywords : dict
        What was passed by keyword.

    Returns
    -------
    arguments : Arguments
        The call.

    Raises
    ------
    TypeError
        If an argument is missing or passed twice.
    UnsupportedOperation
        If the function takes one of them by keyword alone.
    """
    name = getattr(fit, "__name__", "the inner solver")
    of_fit, of_inner = _parameters(fit), _parameters(function)[1:]
    keywords = dict(keywords)
    if given:
        init, positional = given[0], given[1:]
    else:
        first = of_fit[0].name if of_fit and of_fit[0].name in keywords else "init"
        if first not in keywords:
            raise TypeError(f"{name}() misses its first argument, the initial guess.")
        init, positional = keywords.pop(first), ()
    own = {p.name: place for place, p in enumerate(of_fit[1:]) if p.kind in _POSITIONAL}
    taken = {p.name: place for place, p in enumerate(of_inner) if p.kind in _POSITIONAL}
    held: dict[int, str] = {}
    for key in keywords:
        place = taken.get(key)
        if place is None and any(p.name == key and p.kind == p.KEYWORD_ONLY for p in of_inner):
            raise UnsupportedOperation(
                f"The inner problem takes {key} by keyword alone, and is called with its arguments "
                f"by position: move {key} in front of the * in its parameters.",
                argument=key,
            )
        if place is not None:
            held[place] = key
    for key in keywords:
        place = own.get(key, -1)
        unmet = len(positional) <= place < len(taken) and place not in held
        if key not in taken and unmet and of_inner[place].default is inspect.Parameter.empty:
            held[place] = key
    for place, key in held.items():
        if place < len(positional):
            raise TypeError(f"{name}() got {key} by position and by keyword.")
    args, names, places = list(positional), _names(of_fit[1:], len(positional)), []
    places = [i + 1 for i in range(len(positional))]
    for place in range(len(positional), max(held, default=-1) + 1):
        key = held.get(place, of_inner[place].name)
        if place not in held and of_inner[place].default is inspect.Parameter.empty:
            raise TypeError(f"{name}() misses {key}, which the inner problem takes.")
        args.append(keywords[key] if place in held else of_inner[place].default)
        names.append(key)
        places.append(own.get(key, place) + 1)
    named = {key: keywords.pop(key) for key in held.values()}
    return Arguments(init, positional, named, keywords, tuple(args), names, places)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        return []


def _names(parameters: list[inspect.Parameter], count: int) -> list[str]:
    """Name the arguments after the initial guess, for messages."""
    names = [f"args[{i}]" for i in range(count)]
    for i, parameter in enumerate(parameters[:count]):
        if parameter.kind in _POSITIONAL:
            names[i] = parameter.name
    return names
