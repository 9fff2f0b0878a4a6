"""What a long solve shows of itself: a callback after each iteration, and a line on stderr."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .._autograd.host import all_tasks
from .._errors import UnsupportedOperation

if TYPE_CHECKING:
    from ._system import Counted

_PATIENCE = 3.0  # seconds without a line
_EVERY = 0.5  # seconds between two


@dataclasses.dataclass(frozen=True)
class Iteration:
    """An iteration of a linear solve, as a `callback` is told of it.

    Attributes
    ----------
    iteration : int
        Its number, from 1 on, over all passes and methods of the solve.
    residual_norm : float
        The relative residual ``||b - A x|| / ||b||`` by the recursion; of many tasks, the largest.
    products : int
        The products with the matrix that were made so far.

    Examples
    --------
    >>> import torch, hypergrad
    >>> solver = hypergrad.CG(callback=lambda seen: print(seen.iteration, seen.residual_norm))
    >>> x, _ = solver.solve(lambda v: 2.0 * v, torch.ones(4))
    1 0.0
    """

    iteration: int
    residual_norm: float
    products: int


Callback = Callable[[Iteration], object]


class Watched:
    """The fields by which an iterative solver shows that it lives.

    Attributes
    ----------
    callback : callable, optional
        ``callback(iteration)``, called after each iteration with an `Iteration`. What it raises
        ends the solve and reaches the caller.
    progress : bool
        Whether a solve that lasts more than three seconds writes a line to stderr, again and again
        in the same place.
    """

    if TYPE_CHECKING:  # fields of the dataclasses that derive from it, behind their own

        @property
        def callback(self) -> Callback | None: ...
        @property
        def progress(self) -> bool: ...

    def __post_init__(self) -> None:
        """Refuse what cannot be called."""
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable, or None; got {self.callback!r}.")
        if not isinstance(self.progress, bool):
            raise TypeError(f"progress must be True or False; got {self.progress!r}.")


class Watch:
    """The eye on one solve.

    Parameters
    ----------
    fields : Watched
        The solver.
    products : Counted
        Its products.
    """

    def __init__(self, fields: Watched, products: Counted) -> None:
        self._fields, self._products = fields, products
        self._count, self._start, self._last = 0, time.monotonic(), 0.0
        self._width = 0

    def tell(self, size: Tensor | float) -> None:
        """Tell of an iteration, by the relative residual norm of each task."""
        self._count += 1
        if isinstance(size, Tensor):
            size = all_tasks(size.unsqueeze(-1)).max().item()
        seen = Iteration(self._count, size, self._products.count)
        now = time.monotonic()
        if self._fields.progress and now >= max(self._start + _PATIENCE, self._last + _EVERY):
            self._last = now
            self._write(seen, now - self._start)
        if self._fields.callback is not None:
            self._fields.callback(seen)

    def _write(self, seen: Iteration, seconds: float) -> None:
        line = (
            f"{type(self._fields).__name__}: iteration {seen.iteration}, residual "
            f"{seen.residual_norm:.1e}, {seen.products} products, {seconds:.0f} s"
        )
        sys.stderr.write("\r" + line.ljust(self._width))
        sys.stderr.flush()
        self._width = len(line)

    def end(self) -> None:
        """End the line, where one was written."""
        if self._width:
            sys.stderr.write("\n")
            sys.stderr.flush()


@contextmanager
def watching(solver: Any, products: Counted, looks: bool) -> Iterator[Watch | None]:
    """Watch a solve, where its solver wants that.

    Parameters
    ----------
    solver : Solver
        The method.
    products : Counted
        Its products.
    looks : bool
        Whether the host may look at values.

    Yields
    ------
    watch : Watch or None
        None where nothing is wanted, which costs nothing.

    Raises
    ------
    UnsupportedOperation
        Where the host may not look.
    """
    if not isinstance(solver, Watched) or not (solver.callback or solver.progress):
        yield None
        return
    if not looks:
        raise UnsupportedOperation(
            f"{type(solver).__name__}(rtol=0) with on_failure='ignore' reads no value between its "
            "iterations, so that callback and progress have nothing to show. Leave rtol out, pass "
            "on_failure='warn', or leave callback and progress out."
        )
    watch = Watch(solver, products)
    try:
        yield watch
    finally:
        watch.end()
