"""First derivatives of an inner objective, which difference products are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, NamedTuple, Protocol

import torch
from torch import Tensor

from .._autograd.products import Parts, gradient_of
from .._autograd.random_numbers import Draw
from .._autograd.recording import Recording, narrowest, record, surroundings
from .._autograd.shards import placed_like
from .._autograd.transforms import is_wrapped
from ._base import Condition
from ._inner_problem import Problem
from ._passes import Passes

#: Leaves like the inner variables, and the multiple of them that is added.
Displacement = tuple[Parts, float]


class Slopes(NamedTuple):
    """An objective at a point, and its gradients.

    Attributes
    ----------
    value : Tensor
        The objective, detached: with task axes the sum over the tasks.
    inner : list of Tensor or None
        The gradient by each inner variable, in the order of ``problem.inner``; None: the objective
        does not depend on it.
    outer : list of Tensor or None
        The same by each differentiated argument, in the order of ``problem.outer``; empty where it
        was not asked for.
    """

    value: Tensor
    inner: list[Tensor | None]
    outer: list[Tensor | None]


class FirstDerivatives(Protocol):
    """The objective of an inner problem and its first derivatives, at any tensors.

    Everything that `products="difference"` knows of an inner problem comes from here. A call is
    ``slopes(tensors, outer=False, by=None) -> Slopes``:

    - `tensors` are those of ``problem.tensors``, in their order: detached, with other values for
      the inner variables (at ``problem.inner``) or for the differentiated arguments (at
      ``problem.outer``). They may be kept by the caller, and are not changed.
    - With ``by=(v, h)`` the inner variables are moved by h times the leaves v from there.
    - Every call sees the same random numbers and the same buffers, and runs under the autocast
      that was in force when the object was made, whatever is in force at the call. The first call
      draws from the caller's generators as any evaluation would; later ones leave them as they are.
    - The gradients are detached, each like its variable (dtype, shape, and for sharded variables
      the placement), and are not changed by whoever gets them; the lists are theirs, to be emptied
      where the memory is wanted. No graph survives the call.
    - Nothing of the caller's is changed once the call has returned or raised: parameters, ``.grad``
      and buffers are as before, bit for bit.
    - With task axes the gradients are those of the sum over tasks, so that each task finds its own
      at its place. An implementation that knows no tasks refuses ``problem.axes``.

    Attributes
    ----------
    narrowest : torch.dtype
        The narrowest floating-point dtype of the arithmetic, as far as the first call has shown it;
        a first step size is chosen by it.
    captured : list of Tensor
        What the objective depends on beside its arguments that is differentiated further out, as
        the first call has shown it.
    """

    narrowest: torch.dtype
    captured: list[Tensor]

    def __call__(
        self, tensors: Sequence[Tensor], *, outer: bool = False, by: Displacement | None = None
    ) -> Slopes:
        """Evaluate the objective and its gradient by the inner variables, and by the outer ones."""


class SlopesOfPasses(ABC):
    """First derivatives whose evaluation is a pass over batches: their mean, in the memory of one.

    Parameters
    ----------
    problem : Problem
        The inner problem.
    draw : Draw
        Its random numbers.
    passes : Passes
        Over its batches.
    of_batch : callable
        ``batch -> condition`` whose values add up to the objective of one batch.
    """

    #: Whether the gradients of one batch are in memory of their own, and may be added to.
    _own: ClassVar[bool] = False

    def __init__(
        self,
        problem: Problem,
        draw: Draw,
        passes: Passes,
        of_batch: Callable[[Any], Condition],
    ) -> None:
        self.problem, self.narrowest = problem, problem.layout().precision
        self.captured: list[Tensor] = []
        self._draw, self._passes, self._of_batch = draw, passes, of_batch
        self._around = surroundings([t.device.type for t in problem.tensors])
        self._first = True

    def __call__(
        self, tensors: Sequence[Tensor], *, outer: bool = False, by: Displacement | None = None
    ) -> Slopes:
        """Evaluate once, or once for each batch."""
        value: Tensor | None = None
        sums: list[list[Tensor | None]] = []
        count = 0
        with self._around(), self._draw.evaluation():
            for batch in self._passes:
                slopes = self._of_one(self._of_batch(batch), tensors, outer, by)
                parts = [slopes.inner, slopes.outer]
                if value is None:
                    value, sums = slopes.value, parts
                else:
                    value, own = value + slopes.value, self._own or count > 1
                    sums = [added(a, b, own=own) for a, b in zip(sums, parts, strict=True)]
                count, self._first = count + 1, False
                del slopes, parts
        assert value is not None
        own = self._own or count > 1
        return Slopes(value / count, *(times(total, 1 / count, own=own) for total in sums))

    @abstractmethod
    def _of_one(
        self,
        condition: Condition,
        tensors: Sequence[Tensor],
        outer: bool,
        by: Displacement | None,
    ) -> Slopes:
        """Evaluate the objective of one batch, and differentiate it."""


class RecordedSlopes(SlopesOfPasses):
    """First derivatives by recording each evaluation: functional, nothing is moved in place.

    Parameters
    ----------
    problem, draw, passes, of_batch
        As in `SlopesOfPasses`.
    own_backward : bool
        Whether the caller knows what to do with `RunsOnProcesses`.
    """

    def __init__(self, *arguments: Any, own_backward: bool = False) -> None:
        super().__init__(*arguments)
        self._own_backward = own_backward

    def _of_one(
        self,
        condition: Condition,
        tensors: Sequence[Tensor],
        outer: bool,
        by: Displacement | None,
    ) -> Slopes:
        problem = self.problem
        inner = problem.inner
        places = [*inner, *(problem.outer if outer else ())]

        def evaluate(recording: Recording) -> Slopes:
            values = condition.probe(problem, recording.placed(tensors, places))
            recording.returned(values)
            if self._first:
                recording.refuse_past_arguments("inner")
                self.captured = recording.captured()
                self.narrowest = narrowest([*values, *recording.aliases], self.narrowest)
            value = torch.stack(values).sum() if len(values) > 1 else values[0]
            slopes = gradient_of(value, recording.aliases, create_graph=False)
            by_outer = placed_like(slopes[len(inner) :], variables[len(inner) :], variables)
            return Slopes(value.detach(), slopes[: len(inner)], by_outer)

        # Draws follow each other from batch to batch, in the same way in every pass.
        variables = [tensors[i] for i in places]
        if by is not None:
            dtype = problem.layout().dtype
            variables[: len(inner)] = displaced(variables[: len(inner)], *by, dtype)
        return record(
            evaluate, variables, problem.trees, draw=Draw(),
            in_pieces=True, own_backward=self._own_backward,
        )  # fmt: skip


def displaced(
    variables: Sequence[Tensor], v: Parts, h: float, dtype: torch.dtype
) -> Iterator[Tensor]:
    """Move variables along leaves, one after the other, in the dtype of the vectors.

    Parameters
    ----------
    variables : sequence of Tensor
        Whence.
    v : sequence of Tensor or None
        The leaves; None stands for zero.
    h : float
        By which multiple of them.
    dtype : torch.dtype
        What is computed in.

    Yields
    ------
    target : Tensor
        Each variable's other value.
    """
    for at, part in zip(variables, v, strict=True):
        if part is None:
            yield at
        else:
            yield torch.add(at.to(dtype), part.to(dtype), alpha=h).to(at.dtype)


def added(total: Parts, parts: Parts, *, own: bool) -> list[Tensor | None]:
    """Add leaves, None standing for zero: into the memory of a sum that is its `own`."""

    def one(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            known = b if a is None else a
            return known if known is None or (own and known is a) else known.clone()
        return a.add_(b) if own and not (is_wrapped(a) or is_wrapped(b)) else a + b

    return [one(a, b) for a, b in zip(total, parts, strict=True)]


def times(parts: Parts, factor: float, *, own: bool = False) -> list[Tensor | None]:
    """Multiply leaves by a number, in memory that is its `own`; None stands for zero."""
    if factor == 1:
        return list(parts)

    def one(part: Tensor) -> Tensor:
        return part.mul_(factor) if own and not is_wrapped(part) else part * factor

    return [None if part is None else one(part) for part in parts]
