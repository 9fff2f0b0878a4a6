"""How projections and proximal maps are called: with all arguments, or with those they take."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from .._errors import StructureMismatch
from .schemas import positional_names

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


@dataclasses.dataclass(frozen=True)
class Taken:
    """The arguments that a projection or proximal map takes by position.

    Attributes
    ----------
    function : callable
        The map.
    first : int
        How many arguments come before those of the inner problem: 1 or, with the step, 2.
    most : int or None
        How many it takes; None where there is no bound, or none is known.
    options : tuple of (str or None)
        The name of each that is optional; None for the others.
    """

    function: Callable[..., Any]
    first: int
    most: int | None
    options: tuple[str | None, ...] = ()

    @property
    def _passed_on(self) -> Taken:
        """The map itself, or the projection that `hypergrad.prox.from_projection` was given."""
        projection = getattr(self.function, "projection", None)
        return projection if isinstance(projection, Taken) else self

    def unclear(self, objective: Callable[..., Any], given: int) -> list[int]:
        """List the arguments of the inner problem that an optional one of another name would take.

        Where the objective uses one of these, it may not have been meant for the map.

        Parameters
        ----------
        objective : callable
            ``objective(params, *args)``, which names them.
        given : int
            How many there are.

        Returns
        -------
        places : list of int
            Their places among ``args``.
        """
        own = self._passed_on
        options = own.options[own.first : own.first + given]
        if not any(options) or (own.most is not None and own.most < own.first + given):
            return []
        names = _names(objective, given)
        return [i for i, option in enumerate(options) if option not in (None, names[i])]

    def unclear_error(
        self, objective: Callable[..., Any], given: int, place: int
    ) -> StructureMismatch:
        """Make the error about one of those that are `unclear`, with a cure for either meaning."""
        own = self._passed_on
        called, lead = ("project", ["v"]) if own.first == 1 else ("prox", ["v", "step_size"])
        name = getattr(own.function, "__name__", called)
        name = name if name.isidentifier() else called
        names = _names(objective, given)
        before, every = ", ".join([*lead, *names[:place]]), ", ".join([*lead, *names])
        without = every if place else before
        option, meant = own.options[own.first + place], names[place]
        return StructureMismatch(
            f"{called} would get {meant} as its optional argument {option!r}, and the objective "
            f"uses {meant} too. Write which is meant: lambda {without}: {name}({before}), with "
            f"the default of {option}, or lambda {every}: {name}({every}).",
            argument=called,
        )


def taken(function: Callable[..., Any], first: int) -> Taken:
    """Look at the arguments that a function takes by position, from its signature.

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
    taken : Taken
        What it takes.

    Raises
    ------
    StructureMismatch
        If one of `hypergrad.projections` is to take the step.
    """
    called = function.forward if isinstance(function, nn.Module) else function
    try:
        parameters = list(inspect.signature(called, follow_wrapped=False).parameters.values())
        kinds = {parameter.kind for parameter in parameters}
        if inspect.Parameter.VAR_POSITIONAL in kinds and kinds.isdisjoint(_POSITIONAL):
            parameters = list(inspect.signature(called).parameters.values())  # of what is wrapped
    except (TypeError, ValueError):
        return Taken(function, first, _most_of_operation(called))
    most = _count(parameters, first)
    if first == 2 and most != 1 and _is_own_projection(function):
        name = function.__name__
        raise StructureMismatch(
            f"prox is the projection {name}, which would take the length of the step for its "
            f"argument {parameters[1].name!r}. Pass it to argmin as project={name}, to "
            f"ProjectedGradient, or as hypergrad.prox.from_projection({name}).",
            argument="prox",
        )
    options = [
        None if p.default is p.empty or p.kind not in _POSITIONAL else p.name
        for p in parameters[:most]
    ]
    return Taken(function, first, most, tuple(options))


def most_positional(function: Callable[..., Any], first: int) -> int | None:
    """Count the arguments that a function takes by position, as `taken` looks at them."""
    return taken(function, first).most


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


def _is_own_projection(function: Callable[..., Any]) -> bool:
    home = str(getattr(function, "__module__", None))
    return home.startswith("hypergrad.projections") and not hasattr(function, "projection")


def _names(objective: Callable[..., Any], given: int) -> list[str]:
    """Name the arguments of the inner problem as its objective does, or by their numbers."""
    try:
        _, *others = inspect.signature(objective).parameters.values()
    except (TypeError, ValueError):
        others = []
    names = [p.name for p in others if p.kind in _POSITIONAL][:given]
    return names + [f"arg{i}" for i in range(len(names), given)]


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
