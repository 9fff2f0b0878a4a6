"""`hypergrad.compile`: a function whose calls of the library are compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from .session import Backend, OnFallback, Session


class CompiledFunction:
    """A function whose calls of the library are compiled, as `compile` makes it.

    Attributes
    ----------
    session : Session
        What lives from one call to the next.
    """

    def __init__(self, function: Callable[..., Any], session: Session) -> None:
        functools.update_wrapper(self, function)
        self._function, self.session = function, session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        with self.session.entered():
            return self._function(*args, **kwargs)


def compile(
    fn: Callable[..., Any] | None = None,
    *,
    backend: Backend = "aten",
    on_fallback: OnFallback = "warn",
    check: int = 0,
) -> Any:
    """Compile the calls of the library that a function makes."""
    if fn is None:
        return functools.partial(compile, backend=backend, on_fallback=on_fallback, check=check)
    return CompiledFunction(fn, Session(backend, on_fallback, check))
