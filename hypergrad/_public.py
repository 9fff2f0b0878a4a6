"""The homes of public objects: where a user finds them, not the file that they are written in."""

from __future__ import annotations

import inspect
import sys
import typing
from typing import Any

_PACKAGE = __name__.partition(".")[0]

#: The module that a public object is written in, by its public name: for what reads its source.
WRITTEN_IN: dict[str, str] = {}


def settle(*namespaces: dict[str, Any]) -> None:
    """Make the public objects of modules say that they live there, or in `hypergrad` itself.

    Tracebacks, reprs and pickles name them so. `hypergrad` is the home of all names in its list, by
    whatever module they come.

    Parameters
    ----------
    *namespaces : dict
        Those of the modules. A name of a list that is not there yet is left out.
    """
    top = sys.modules[_PACKAGE].__dict__
    for namespace in namespaces:
        for name in namespace["__all__"]:
            home = _PACKAGE if name in top["__all__"] else namespace["__name__"]
            thing = namespace.get(name)
            if thing is not None and f"{home}.{name}" not in WRITTEN_IN:
                _move(thing, name, home)


def _move(thing: Any, name: str, home: str) -> None:
    if thing.__module__ == home:
        return
    if inspect.isclass(thing):
        # Types that stand as text are looked up where a class says that it lives.
        known = sys.modules[_PACKAGE].__dict__
        hints = typing.get_type_hints(thing, localns=known, include_extras=True)
        thing.__annotations__ = {field: hints[field] for field in inspect.get_annotations(thing)}
    WRITTEN_IN[f"{home}.{name}"] = thing.__module__
    thing.__module__ = home


def written_in(thing: Any) -> str | None:
    """Name the module that a public object is written in; None for what is not public."""
    name = f"{getattr(thing, '__module__', None)}.{getattr(thing, '__qualname__', None)}"
    return WRITTEN_IN.get(name)
