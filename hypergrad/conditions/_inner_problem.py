"""An inner problem: a condition, the structure of its arguments, and its task axes.

Here a batch of tasks becomes one problem: the user's functions are mapped over the task axes
with `torch.func.vmap` innermost, and derivatives are taken of the sum (of an objective) or of
the stacked values (of an equation), never of a mapped derivative.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._autograd.guard import Guard
from .._autograd.random_numbers import Draw
from .._autograd.shards import whole
from .._autograd.torch_pytrees import pytree
from .._autograd.watch import WatchForDerivatives
from .._errors import HypergradError, StructureMismatch, UnsupportedOperation, argument_of
from .._pytrees import Layout, Tree

if TYPE_CHECKING:
    from .._autograd.vmaps import Vmaps
    from ._base import Condition


@dataclasses.dataclass(frozen=True)
class TaskAxis:
    """A batch dimension that a surrounding vmap has put in front of a problem's tensors.

    Attributes
    ----------
    in_dims : tuple of (0 or None)
        For each tensor of the problem, whether it has the dimension.
    randomness : str
        What `torch.func.vmap` is told about random numbers.
    """

    in_dims: tuple[int | None, ...]
    randomness: str = "different"

    @property
    def shared(self) -> bool:
        """Whether all tasks along this axis share one matrix and differ in b alone."""
        return all(dim is None for dim in self.in_dims)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A condition and the structure of ``(params, *args)``.

    The tensors of a problem are those of `params` followed by those of `args`.

    Attributes
    ----------
    condition : Condition
        What an inner solution satisfies.
    params : Tree
        The inner variables.
    args : tuple of Tree
        The arguments that follow.
    outer : tuple of int
        Positions, among the tensors, of those of `args` that derivatives are taken of.
    axes : tuple of TaskAxis
        The task axes, outermost first.
    vmaps : Vmaps, optional
        The caller's vmaps that the axes stand for, where the functions close over their batches.
    """

    condition: Condition
    params: Tree
    args: tuple[Tree, ...]
    outer: tuple[int, ...]
    axes: tuple[TaskAxis, ...] = ()
    vmaps: Vmaps | None = None

    @classmethod
    def of(cls, condition: Condition, params: Tree, args: Sequence[Tree]) -> Problem:
        """Pose a problem in which every variable of `args` is differentiated."""
        outer, start = [], len(params.tensors)
        for tree in args:
            outer += [start + i for i in tree.variables_among_tensors]
            start += len(tree.tensors)
        return cls(condition, params, tuple(args), tuple(outer))

    def restricted(self, arguments: Collection[int]) -> Problem:
        """Restrict the problem: only the variables of some of `args` are differentiated."""
        owner = [i for i, tree in enumerate(self.args) for _ in tree.tensors]
        first = len(self.params.tensors)
        outer = tuple(place for place in self.outer if owner[place - first] in arguments)
        return dataclasses.replace(self, outer=outer)

    @property
    def trees(self) -> tuple[Tree, ...]:
        """`params` and the arguments that follow."""
        return (self.params, *self.args)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that the problem was made from."""
        return [t for tree in (self.params, *self.args) for t in tree.tensors]

    def path(self, place: int) -> str:
        """Name the tensor at a position of `tensors`, for messages."""
        names = [tree.path(i) for tree in (self.params, *self.args) for i in tree.places]
        return names[place]

    @property
    def inner(self) -> list[int]:
        """Positions of the inner variables among the tensors."""
        return self.params.variables_among_tensors

    @property
    def own_axes(self) -> tuple[TaskAxis, ...]:
        """The axes along which tasks have matrices of their own."""
        return tuple(axis for axis in self.axes if not axis.shared)

    def layout(self) -> Layout:
        """Lay one task's inner variables out in a vector."""
        return Layout(self.params, self.params.variables)

    def outside(self, vmaps: Vmaps) -> Problem:
        """Pose the problem of all tasks of the caller's vmaps, each with a matrix of its own."""
        axis = TaskAxis((0,) * len(self.tensors))
        return dataclasses.replace(self, axes=(axis,) * len(vmaps.sizes), vmaps=vmaps)

    def with_axis(self, axis: TaskAxis) -> Problem:
        """Put the problem under one more vmap, around those that there are."""
        return dataclasses.replace(self, axes=(axis, *self.axes))

    def with_own_axes(self) -> Problem:
        """Pose the problem in which every task has inner variables, and so a matrix, of its own."""
        axes = []
        for axis in self.axes:
            in_dims = list(axis.in_dims)
            for place in self.inner:
                in_dims[place] = 0
            axes.append(dataclasses.replace(axis, in_dims=tuple(in_dims)))
        return dataclasses.replace(self, axes=tuple(axes))

    def one_for_each(self, tensor: Tensor, tasks: Sequence[int]) -> Tensor:
        """Repeat an inner variable along the axes whose tasks share it."""
        for place, axis in enumerate(self.axes):
            if axis.shared:
                tensor = tensor.unsqueeze(place)
        return tensor.expand((*tasks, *tensor.shape[len(tasks) :]))

    def arguments(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        """Build ``(params, *args)`` from their tensors."""
        given, start = [], 0
        for tree in (self.params, *self.args):
            stop = start + len(tree.tensors)
            given.append(tree.rebuild_tensors(tensors[start:stop]))
            start = stop
        return tuple(given)

    def objective(
        self, what: str, fun: Callable[..., Any], tensors: Sequence[Tensor], first: Any = None
    ) -> Tensor:
        """Sum a scalar function over tasks; `first` may take the place of `params`."""

        def one(first: Any, tensors: Sequence[Tensor]) -> Tensor:
            params, *args = self.arguments(tensors)
            return scalar(what, fun(params if first is None else first, *args))

        return self._over_tasks(one, first, tensors).sum()

    def equation(
        self,
        what: str,
        fun: Callable[..., Any],
        tensors: Sequence[Tensor],
        cure: str = "",
        first: tuple[Tensor, ...] | None = None,
    ) -> list[Tensor]:
        """Evaluate a function shaped like ``params``; `cure` is for one that is not.

        Parameters
        ----------
        what, fun : str, callable
            The function, and what it is called in messages.
        tensors : sequence of Tensor
            Its arguments, as tensors of the problem.
        cure : str
            What a message ends with.
        first : tuple of Tensor, optional
            With task dimensions: what the function takes before ``params``.

        Returns
        -------
        values : list of Tensor
            With task dimensions, one for each inner variable.
        """

        def one(first: Any, tensors: Sequence[Tensor]) -> list[Tensor]:
            return self.params.match(what, fun(*(first or ()), *self.arguments(tensors)), cure)

        values: list[Tensor] = self._over_tasks(one, first, tensors)
        return values

    def outputs(self, fun: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
        """Evaluate any function of ``(params, *args)``, with task dimensions in front."""
        return self._over_tasks(lambda _, tensors: fun(*self.arguments(tensors)), None, tensors)

    def _over_tasks(
        self, one: Callable[[Any, Sequence[Tensor]], Any], first: Any, tensors: Sequence[Tensor]
    ) -> Any:
        if not self.own_axes:
            with Guard():
                return one(first, list(tensors))

        def guarded(first: Any, tensors: Sequence[Tensor]) -> Any:
            with Guard():
                return one(first, tensors)

        if self.vmaps is not None:
            return self.vmaps.inside(guarded, first, list(tensors))
        watch = WatchForDerivatives()

        def watched(first: Any, tensors: Sequence[Tensor]) -> Any:
            with watch:
                return guarded(first, tensors)

        mapped = watched
        for axis in reversed(self.own_axes):
            in_dims = (None if first is None else 0, list(axis.in_dims))
            mapped = torch.func.vmap(mapped, in_dims=in_dims, randomness=axis.randomness)
        draw = Draw()
        some = 0 not in tensors[self.inner[0]].shape[: len(self.own_axes)]
        try:
            with draw.evaluation():
                results = mapped(first, list(tensors))
        except HypergradError:
            raise
        except Exception:  # a function that leaves PyTorch, or one that fails by itself too
            if not some:
                raise
        else:
            if not (watch.seen and some):
                return results
        with draw.evaluation():
            return self._looped(one, first, tensors)

    def _looped(
        self, one: Callable[[Any, Sequence[Tensor]], Any], first: Any, tensors: Sequence[Tensor]
    ) -> Any:
        """Call the same task by task, for functions that take derivatives themselves."""
        # A derivative of a mapped derivative is wrong in PyTorch 2.13 through affine norm layers.
        if not self.own_axes:
            with Guard():
                return one(first, list(tensors))
        axis, *rest = self.own_axes
        inside = dataclasses.replace(self, axes=tuple(rest))
        size = next(t.shape[0] for t, d in zip(tensors, axis.in_dims, strict=True) if d == 0)

        draw = Draw()

        def task(i: int) -> Any:
            part = pytree.tree_map(lambda t: t[i] if isinstance(t, Tensor) else t, first)
            given = [t if d is None else t[i] for t, d in zip(tensors, axis.in_dims, strict=True)]
            if axis.randomness != "same":
                return inside._looped(one, part, given)
            with draw.evaluation():
                return inside._looped(one, part, given)

        return pytree.tree_map(lambda *parts: torch.stack(parts), *[task(i) for i in range(size)])


def scalar(what: str, value: Any) -> Tensor:
    """Take a loss as a 0-d tensor, or raise an error that says what it is instead."""
    if not isinstance(value, Tensor):
        cures = {
            "float": " Leave out .item() and float(), which cut the connection.",
            "NoneType": " Is a return missing?",
        }
        if what == "outer":
            cures["tuple"] = " Pass has_aux=True where it returns (loss, aux)."
        kind = type(value).__name__
        raise StructureMismatch(
            f"{what} must return a scalar tensor; it returned {kind}.{cures.get(kind, '')}",
            argument=argument_of(what),
        )
    if value.is_complex():
        raise UnsupportedOperation(
            f"{what} returned a complex number ({value.dtype}); a loss must be real. Take .real or "
            ".abs() of it.",
            argument=argument_of(what),
        )
    if value.numel() != 1:
        raise StructureMismatch(
            f"{what} must return a scalar tensor; it returned one of shape {tuple(value.shape)}. "
            "Reduce it with .mean() or .sum().",
            argument=argument_of(what),
        )
    return whole(value).reshape(())


def without_aux(what: str, returned: Any, has_aux: bool, first: str) -> tuple[Any, Any]:
    """Split what a function returned from the aux beside it: None without `has_aux`."""
    if not has_aux:
        return returned, None
    if not (isinstance(returned, tuple) and len(returned) == 2):
        raise StructureMismatch(
            f"With has_aux=True {what} must return ({first}, aux).", argument=argument_of(what)
        )
    return returned
