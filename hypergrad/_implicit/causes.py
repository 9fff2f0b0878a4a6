"""Why a number is not finite: where it first was not, and what that says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

from .._autograd.products import gradient_of
from .._autograd.random_numbers import unnoticed
from ..conditions._gradient_step import GradientStep
from .linearisation import Linearisation

#: What is called something in a message, the tensor to look at, and what to do if it is the one.
Place = tuple[str, Tensor, Callable[[], str]]

_DERIVATIVE = (
    "Its function has a finite value and an infinite derivative, as sqrt and a norm have at 0, or "
    "a power, a log or a division: keep away from such a point, as sqrt(v + eps) does in place of "
    "sqrt(v) + eps in Adam"
)
_NOTHING = (
    "It is a mean over nothing, a tensor without entries: is a batch empty? Leave empty batches "
    "out, or divide a sum by the number of samples, at least 1"
)
_DATA = "Look at the data and the step size of the inner solver"


def data() -> str:
    """What to look at where a value itself is not finite."""
    return _DATA


def derivative() -> str:
    """The same where only a derivative of a finite value is not."""
    return _DERIVATIVE


def of_value(again: Callable[[], Any]) -> Callable[[], str]:
    """The same of a function's value, from one more evaluation of the function."""
    return lambda: _NOTHING if _over_nothing(again) else _DATA


def inner_places(lin: Linearisation, tensors: Sequence[Tensor]) -> Iterator[Place]:
    """The parts of an inner condition, in the order in which they are computed.

    Parameters
    ----------
    lin : Linearisation
        The condition.
    tensors : sequence of Tensor
        Those that it was linearised at.

    Yields
    ------
    place : Place
        The value of each function, then the condition, then a product with its matrix.
    """
    problem, values = lin.problem, lin.record.values
    condition, name = problem.condition, problem.params.variable_path
    again = of_value(lambda: condition.probe(problem, tensors))
    of_derivative = condition.of_objective
    if of_derivative:
        for value in values:
            yield "the inner loss", value, again
    elif isinstance(condition, GradientStep):
        smooth, *stepped = values
        yield "the smooth part of the inner problem", smooth, again
        aliases = lin.aliases[: len(problem.inner)]
        for i, part in enumerate(gradient_of(smooth, aliases, create_graph=True)):
            if part is not None:
                yield f"the gradient of the smooth part by {name(i)}", part, derivative
        called = condition.outer_map[0]
        for i, part in enumerate(stepped):
            yield f"what {called} returned at {name(i)}", part, lambda: _of_map(called)
    for i, part in enumerate(lin.layout.split(lin.residual)):
        what = "the inner condition (its gradient)" if of_derivative else "the inner condition"
        yield f"{what} at {name(i)}", part, derivative if of_derivative else again
    ones = torch.ones_like(lin.residual)
    for i, part in enumerate(lin.layout.split(lin.transposed(ones))):
        yield f"the product with the inner Hessian at {name(i)}", part, derivative


def sound_in_value(lin: Linearisation, sound: Tensor) -> Tensor:
    """Whether each task is sound, also where an inner loss is NaN and its derivatives hide it."""
    # A loss is summed over the tasks, so that it counts where no task gives itself away.
    for value in lin.record.values:
        if value.ndim == 0:
            sound = sound & ~(torch.isnan(value.detach()) & sound.all())
    return sound


def _of_map(called: str) -> str:
    return (
        f"What {called} was given is finite, so that the map itself is at fault: a division by "
        "zero, a root of a negative number, a bound or a threshold that is NaN"
    )


class _Watch(TorchFunctionMode):
    """Notices an operation on a tensor without entries that returned NaN."""

    seen = False

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every operation on."""
        found = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        empty = any(isinstance(t, Tensor) and t.numel() == 0 for t in given)
        if empty and isinstance(found, Tensor) and found.is_floating_point() and found.numel():
            self.seen = self.seen or bool(found.detach().isnan().any())
        return found


def _over_nothing(again: Callable[[], Any]) -> bool:
    """Whether a function that is evaluated once more takes a mean over nothing."""
    watch = _Watch()
    try:
        with unnoticed(), torch.no_grad(), watch:
            again()
    except Exception:  # what cannot be evaluated here says nothing about the cause
        return watch.seen
    return watch.seen
