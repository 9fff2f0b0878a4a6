"""`hypergrad.compile`: a function whose calls of the library are compiled."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
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

    def __get__(self, owner: object, of: type | None = None) -> Any:
        """Bind it as a method: all instances share what was compiled."""
        return self if owner is None else MethodType(self, owner)

    def explain(self) -> str:
        """Say what was compiled, and why something was not."""
        return self.session.explain()


def compile(
    fn: Callable[..., Any] | None = None,
    *,
    backend: Backend = "aten",
    on_fallback: OnFallback = "warn",
    check: int = 0,
    fixed: bool = False,
) -> Any:
    """Compile the calls of the library that a function makes.

    The function runs as it is. Inside, each `implicit_grad` is traced once into one graph, from the
    losses to the evidence, and replayed in later calls: with new closures, batches and numbers, as
    Dynamo's guards find them. So are each `jacobian` of up to four blocks, the steps of inner
    solvers with a `step_size` and ``tol=0``, and the derivatives of a step of `Bilevel`:
    ``hypergrad.compile(loop.step)``. A loss with other shapes or another branch gets another graph.
    What cannot be captured runs as it does without this function, with one warning that names the
    cause.

    Parameters
    ----------
    fn : callable, optional
        The function. None: a decorator is returned.
    backend : {"aten", "inductor", "cudagraphs"}
        What runs the graphs. ``"aten"`` calls PyTorch's operations one by one, without autograd
        and without Python between them; it needs no compiler. ``"inductor"`` compiles them, which
        takes tens of seconds and pays for small networks; without a C++ compiler, or without
        Triton on a GPU, ``"aten"`` is used and a warning says so. ``"cudagraphs"`` records
        them once, on a CUDA device.
    on_fallback : {"warn", "raise", "ignore"}
        What to do where a call cannot be compiled.
    check : int
        Each so many calls of a graph are compared with the call as it is, which takes as long as
        that. 0: the first call of each graph alone.
    fixed : bool
        With ``"inductor"``: compile a graph as one. By default steps that repeat, of a solver say,
        are compiled once; in one piece they run faster and take longer to compile.

    Returns
    -------
    compiled : CompiledFunction
        It takes and returns what `fn` does. ``compiled.explain()`` says what was compiled.

    Raises
    ------
    NotCompiled
        With ``on_fallback="raise"``, in the call.
    CompileMismatch
        In the call, if a graph does not compute what the call as it is does.
    TypeError
        If `fn` cannot be called.
    ValueError
        If an argument is none of its values.

    Examples
    --------
    >>> import torch, hypergrad
    >>> @hypergrad.compile
    ... def step(w, lam, x):
    ...     inner = lambda w, lam: ((w - x) ** 2).sum() + lam * (w**2).sum()
    ...     return hypergrad.implicit_grad(
    ...         lambda w, lam: (w**2).sum(), inner, w, lam, solver=hypergrad.CG(maxiter=3)
    ...     )
    >>> x, lam = torch.tensor([1.0, 2.0]), torch.tensor(1.0)
    >>> for _ in range(2):  # traced, and replayed
    ...     print(step(x / 2, lam, x))  # -2 x^2 / (1 + lam)^3, added up
    tensor(-1.2500)
    tensor(-1.2500)
    """
    for name, value, known in (
        ("backend", backend, ("aten", "inductor", "cudagraphs")),
        ("on_fallback", on_fallback, ("warn", "raise", "ignore")),
    ):
        if value not in known:
            words = ", ".join(map(repr, known))
            raise ValueError(f"{name} must be one of {words}; got {value!r}.")
    if not isinstance(check, int) or check < 0:
        raise ValueError(f"check must be a number of calls, 0 or more; got {check!r}.")
    if fixed and backend != "inductor":
        raise ValueError(f"fixed=True belongs to backend='inductor'; got backend={backend!r}.")
    if fn is None:
        return functools.partial(
            compile, backend=backend, on_fallback=on_fallback, check=check, fixed=fixed
        )
    if not callable(fn):
        cure = " Pass its step: hypergrad.compile(loop.step)." if hasattr(fn, "step") else ""
        raise TypeError(f"fn must be a function; got an object of type {type(fn).__name__}.{cure}")
    return CompiledFunction(fn, Session(backend, on_fallback, check, fixed))
