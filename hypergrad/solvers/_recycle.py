"""What a loop keeps of a linear system from one step to the next."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .._autograd.shards import is_shards
from .._autograd.transforms import is_wrapped
from .._errors import UnsupportedOperation


@dataclasses.dataclass
class Memory:
    """What the solves of one system, which changes from step to step, have shown of it.

    A loop, or a compiled step, holds one for each linear system that it solves, and enters it by
    `recycling` around the call: a solver with ``recycle=True`` reads it and writes to it. Of a
    system with another shape or dtype it keeps nothing.

    Attributes
    ----------
    solution : Tensor, optional
        The last solution, ``(*tasks, n)``; zero for a task whose solve failed.
    inner_residual : Tensor, optional
        How well the inner problem was solved at the last step, for each task.
    inverse : Tensor, optional
        About how long ``A^-1 r`` is for a residual of length one, for each task.
    extremes : Tensor, optional
        The lowest and the highest eigenvalue that were seen, ``(*tasks, 2)``.
    rows : Tensor, optional
        About the sizes of the rows of A, ``(*tasks, n)``, `age` solves ago.
    diagonal, square : Tensor, optional
        The means over `probes` products of an estimate of A's diagonal, and of its square.
    probes : int
        How many products the diagonal was estimated by.
    made : int
        How many probes were made in all, by which the next one differs.
    scaling : int
        Whether the diagonal scales the system: 0 no, 1 on trial, 2 yes.
    trials : int
        The solves of the trial.
    wait, patience : int
        For how many solves it is not tried again, and for how many after the next failure.
    plain, scaled : list of float
        Steps, and the logarithm of what they have reduced residuals by, without and with it.
    since, age : int
        The solves since one went far enough to meet negative curvature, and since `rows`.
    """

    solution: Tensor | None = None
    inner_residual: Tensor | None = None
    inverse: Tensor | None = None
    extremes: Tensor | None = None
    rows: Tensor | None = None
    diagonal: Tensor | None = None
    square: Tensor | None = None
    probes: int = 0
    made: int = 0
    scaling: int = 0
    trials: int = 0
    wait: int = 0
    patience: int = 32
    plain: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    scaled: list[float] = dataclasses.field(default_factory=lambda: [0.0, 0.0])
    since: int = 0
    age: int = 0

    def export(self) -> dict[str, Any]:
        """Copy all of it: tensors, numbers and lists of them, for `load`."""
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {name: _copy(value) for name, value in known.items() if value is not None}

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from what `export` gave; from nothing where it is empty.

        Parameters
        ----------
        state : mapping
            What was exported. Tensors are copied, and moved to where the next system lives.
        """
        known = {f.name for f in dataclasses.fields(self)}
        self.__dict__.update(Memory().__dict__)
        self.__dict__.update({k: _copy(v) for k, v in state.items() if k in known})

    def note(self, inner_residual: Tensor, rows: Tensor | None) -> None:
        """Keep what the evidence has measured: of the inner problem, and of the rows of A."""
        if is_wrapped(inner_residual):  # that of one task, whose transform will end
            return
        self.inner_residual = inner_residual.clone()
        if rows is not None and not is_shards(rows):
            self.rows, self.age = rows, 0

    def fit(self, b: Tensor) -> None:
        """Forget everything where the right-hand side is that of another system."""
        if self.solution is None:
            return
        if self.solution.shape != b.shape or self.solution.dtype != b.dtype:
            self.load({})
        elif self.solution.device != b.device:
            known = {k: v.to(b.device) for k, v in vars(self).items() if isinstance(v, Tensor)}
            self.__dict__.update(known)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone()
    return list(value) if isinstance(value, list) else value


_CURRENT: ContextVar[Memory | None] = ContextVar("hypergrad_memory", default=None)


@contextmanager
def recycling(memory: Memory | None) -> Iterator[None]:
    """Let the next hypergradient of this thread read a memory, and write to it.

    Parameters
    ----------
    memory : Memory or None
        That of its linear system.
    """
    token = _CURRENT.set(memory)
    try:
        yield
    finally:
        _CURRENT.reset(token)


@contextmanager
def claimed() -> Iterator[Memory | None]:
    """Take the memory that was entered; what is solved within finds none."""
    memory = _CURRENT.get()
    with recycling(None):
        yield memory


def refuse_recycling(solver: Any) -> None:
    """Raise where a solver wants a memory, and there is no next step to keep one for.

    Raises
    ------
    UnsupportedOperation
        Naming what has one.
    """
    if getattr(solver, "recycle", False):
        raise UnsupportedOperation(
            f"{type(solver).__name__}(recycle=True) keeps from step to step what it learns of a "
            "matrix, and this call has no next step to keep it for. It works as the solver of a "
            "hypergrad.Bilevel and in a step of hypergrad.compile. Leave recycle out here; "
            "implicit_grad(x0=last_info.solution) starts from the last answer.",
            argument="solver",
        )


def dropped(memory: Memory) -> None:
    """Solve without the diagonal from now on, and for the longer the more often it failed."""
    memory.scaling, memory.trials, memory.probes = 0, 0, 0
    memory.diagonal = memory.square = None
    memory.scaled = [0.0, 0.0]
    memory.wait, memory.patience = memory.patience, min(2 * memory.patience, 1024)


def moved_on(old: Tensor | None, new: Tensor) -> Tensor:
    """Take a new figure where it is one, else what was known."""
    return new if old is None else torch.where(torch.isfinite(new), new, old)
