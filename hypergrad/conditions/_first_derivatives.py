"""First derivatives of an inner objective, which difference products are made of."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

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
    ``slopes(tensors, outer=False) -> Slopes``:

    - `tensors` are those of ``problem.tensors``, in their order: detached, with other values for
      the inner variables (at ``problem.inner``) or for the differentiated arguments (at
      ``problem.outer``). They may be kept by the caller, and are not changed.
    - Every call sees the same random numbers and the same buffers, and runs under the autocast
      that was in force when the object was made, whatever is in force at the call. The first call
      draws from the caller's generators as any evaluation would; later ones leave them as they are.
    - The gradients are detached, each like its variable (dtype, shape, and for sharded variables
      the placement), and are not changed by whoever gets them. No graph survives the call.
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

    def __call__(self, tensors: Sequence[Tensor], *, outer: bool = False) -> Slopes:
        """Evaluate the objective and its gradient by the inner variables, and by the outer ones."""


class RecordedSlopes:
    """First derivatives by recording each evaluation: functional, nothing is moved in place.

    With `passes` over batches a call is one pass: the mean over the batches, in the memory of one.

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
    own_backward : bool
        Whether the caller knows what to do with `RunsOnProcesses`.
    """

    def __init__(
        self,
        problem: Problem,
        draw: Draw,
        passes: Passes,
        of_batch: Callable[[Any], Condition],
        *,
        own_backward: bool = False,
    ) -> None:
        self._own_backward = own_backward
        self.problem, self.narrowest = problem, problem.layout().precision
        self.captured: list[Tensor] = []
        self._draw, self._passes, self._of_batch = draw, passes, of_batch
        self._around = surroundings([t.device.type for t in problem.tensors])
        self._first = True

    def __call__(self, tensors: Sequence[Tensor], *, outer: bool = False) -> Slopes:
        """Evaluate once, or once for each batch."""
        total: Slopes | None = None
        count = 0
        with self._around(), self._draw.evaluation():
            for batch in self._passes:
                slopes = self._of_one(self._of_batch(batch), tensors, outer)
                total = slopes if total is None else _joined(total, slopes, own=count > 1)
                count, self._first = count + 1, False
        assert total is not None
        by_inner, by_outer = (times(parts, 1 / count) for parts in (total.inner, total.outer))
        return Slopes(total.value / count, by_inner, by_outer)

    def _of_one(self, condition: Condition, tensors: Sequence[Tensor], outer: bool) -> Slopes:
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
        return record(
            evaluate, variables, problem.trees, draw=Draw(),
            in_pieces=True, own_backward=self._own_backward,
        )  # fmt: skip


def _joined(one: Slopes, other: Slopes, *, own: bool) -> Slopes:
    return Slopes(
        one.value + other.value,
        added(one.inner, other.inner, own=own),
        added(one.outer, other.outer, own=own),
    )


def added(total: Parts, parts: Parts, *, own: bool) -> list[Tensor | None]:
    """Add leaves, None standing for zero: into the memory of a sum that is its `own`."""

    def one(a: Tensor | None, b: Tensor | None) -> Tensor | None:
        if a is None or b is None:
            return (b if b is None else b.clone()) if a is None else a
        return a.add_(b) if own and not (is_wrapped(a) or is_wrapped(b)) else a + b

    return [one(a, b) for a, b in zip(total, parts, strict=True)]


def times(parts: Parts, factor: float) -> list[Tensor | None]:
    """Multiply leaves by a number; None stands for zero."""
    if factor == 1:
        return list(parts)
    return [None if part is None else part * factor for part in parts]
