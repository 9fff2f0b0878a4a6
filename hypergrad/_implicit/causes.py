"""Why a number is not finite: the place where it first was not, and its meaning."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .._autograd.products import gradient_of
from .._autograd.random_numbers import unnoticed
from .._autograd.torch_pytrees import pytree
from .._pytrees import Tree
from ..conditions._gradient_step import GradientStep
from .linearisation import Linearisation


class Place(NamedTuple):
    """A number to look at where one is not finite.

    Attributes
    ----------
    where : str
        What it is called in a message.
    tensor : Tensor
        The number.
    cure : callable
        What to do if it is the first that is not finite: called only when it is.
    leaf, argument : str or None
        The path of the leaf that it belongs to, and the name of the argument.
    """

    where: str
    tensor: Tensor
    cure: Callable[[], str]
    leaf: str | None = None
    argument: str | None = None


def of_leaves(
    what: str,
    tree: Tree,
    leaves: Iterable[Tensor | None],
    cure: Callable[[], str],
    argument: str | None = None,
) -> Iterator[Place]:
    """Name the variables of an argument, or numbers that belong to them; `what` comes first."""
    for position, leaf in enumerate(leaves):
        if leaf is not None:
            path = tree.variable_path(position)
            yield Place(what + path, leaf, cure, path, argument)


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
    """Say where to look when a value itself is not finite."""
    return _DATA


def solve() -> str:
    """Say where to look when all that goes into a linear system is finite, and u is not."""
    return (
        "What goes into the system is finite: look at the preconditioner where there is one, take "
        "another solver, such as Exact(), or use float64"
    )


def derivative() -> str:
    """Say the same where only a derivative of a finite value is not."""
    return _DERIVATIVE


def of_value(again: Callable[[], Any]) -> Callable[[], str]:
    """Say the same of a function's value, from one more evaluation of the function."""
    return lambda: _NOTHING if _over_nothing(again) else _DATA


def inner_places(lin: Linearisation) -> Iterator[Place]:
    """Name the numbers of an inner condition, in the order in which they are computed.

    Parameters
    ----------
    lin : Linearisation
        The condition.

    Yields
    ------
    place : Place
        The value of each function, then the condition, then a product with its matrix.
    """
    problem, values = lin.problem, lin.record.values
    condition, P = problem.condition, problem.params
    again = of_value(lambda: condition.probe(problem, lin.tensors))
    of_derivative = condition.of_objective
    if of_derivative:
        for value in values:
            yield Place("the inner loss", value, again, argument="inner")
    elif isinstance(condition, GradientStep):
        smooth, *stepped = values
        yield Place("the smooth part of the inner problem", smooth, again, argument="inner")
        aliases = lin.aliases[: len(problem.inner)]
        gradient = gradient_of(smooth, aliases, create_graph=True)
        yield from of_leaves("the gradient of the smooth part by ", P, gradient, derivative)
        called = condition.called
        what = f"what {called} returned at "
        yield from of_leaves(what, P, stepped, lambda: _of_map(called), called)
    what = "the inner condition (its gradient) at " if of_derivative else "the inner condition at "
    cure = derivative if of_derivative else again
    yield from of_leaves(what, P, lin.layout.split(lin.residual), cure)
    product = lin.layout.split(lin.transposed(torch.ones_like(lin.residual)))
    yield from of_leaves("the product with the inner Hessian at ", P, product, derivative)


def sound_in_value(lin: Linearisation, sound: Tensor) -> Tensor:
    """See whether each task is sound, also where an inner loss is NaN and no derivative is."""
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
        value = func(*args, **(kwargs or {}))
        arguments = pytree.tree_leaves((args, kwargs))
        empty = any(isinstance(t, Tensor) and t.numel() == 0 for t in arguments)
        if empty and isinstance(value, Tensor) and value.is_floating_point() and value.numel():
            self.seen = self.seen or bool(value.detach().isnan().any())
        return value


def _over_nothing(again: Callable[[], Any]) -> bool:
    """See whether a function that is evaluated once more takes a mean over nothing."""
    watch = _Watch()
    try:
        with unnoticed(), torch.no_grad(), watch:
            again()
    except Exception:  # a failure here says nothing about the cause
        return watch.seen
    return watch.seen
