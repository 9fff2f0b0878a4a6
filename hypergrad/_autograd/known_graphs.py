"""Evaluating a loss without its guard, where its graph is known from an evaluation with it.

The guard, the search for what is reached past the arguments, and the refusals of operations
without a second derivative cost several times what a small loss does. All of them but the look at
modules depend on the graph alone: on the operations, how they follow on each other, and which
variables they end in. A loop that evaluates one loss again and again compares the graph with those
that have passed, and is guarded again at the first one that has not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .double_backward import advise, changed_in_place
from .module_hooks import unwatch, watch, watching
from .random_numbers import State, generators, same
from .tested_nodes import TESTED_NODES
from .turns import end_turn, take_turn

if TYPE_CHECKING:
    from .._pytrees import Tree

Shape = tuple[Any, ...]

_LEAF = "torch::autograd::AccumulateGrad"
# Operations that change what they are given, in one mode or another.
_GUARDED = ("BatchNorm", "Embedding", "InstanceNorm", "Rrelu")
_MOST = 64  # graphs of one loss
_PATIENCE = 3  # misses more than hits, after which nothing is tried any more


class _Unguarded(Exception):
    """A module runs, or a checkpoint begins, where nobody guards it."""


class _Refuses:
    """Who watches an evaluation in which no module may run."""

    def __init__(self) -> None:
        self.noticed = False

    def enter(self, module: nn.Module) -> None:
        self._refuse()

    def leave(self, module: nn.Module) -> None:
        pass

    def keeps(self) -> bool:
        return False

    def begin(self, again: Callable[..., None]) -> Callable[..., None]:
        self._refuse()
        return again

    def _refuse(self) -> None:
        self.noticed = True  # the loss may catch the exception
        raise _Unguarded


class KnownEvaluations:
    """A context around evaluations of known graphs: the hooks on modules are put there once."""

    def __enter__(self) -> None:
        """Put them there."""
        self._token = watch(None)

    def __exit__(self, *error: object) -> None:
        """Take them away."""
        unwatch(self._token)


class KnownGraphs:
    """The graphs of one loss that evaluations under the guard have passed.

    Attributes
    ----------
    open : bool
        Whether there is any use in them: not for a loss that runs modules, draws random numbers,
        uses operations that are not tested, or has another graph each time.
    """

    def __init__(self) -> None:
        self.open = True
        self._known: set[Shape] = set()
        self._credit = _PATIENCE
        self._before: State | None = None
        self._value: tuple[Any, Sequence[Tensor]] | None = None

    def noting(self, function: Callable[..., Any], aliases: Callable[..., Sequence[Tensor]]) -> Any:
        """Wrap a function so that an evaluation under the guard can be learnt from.

        Parameters
        ----------
        function : callable
            The loss.
        aliases : callable
            What finds the variables among its arguments.

        Returns
        -------
        noted : callable
            Called as the loss is.
        """
        if not self.open:
            return function
        self._before, self._value = generators(), None

        def noted(*args: Any) -> Any:
            value = function(*args)
            watcher = watching()
            self.open = watcher is not None and not watcher.noticed
            self._value = value, aliases(*args)
            return value

        return noted

    def learn(self) -> None:
        """Take in the graph of the evaluation that has just been made under the guard."""
        noted, before, self._value, self._before = self._value, self._before, None, None
        if noted is None or before is None or not self.open:
            return
        value, aliases = noted
        shape = _shape(value, aliases) if type(value) is Tensor else None
        names = [name for name in shape or () if isinstance(name, str)]
        if shape is None or not all(map(_harmless, names)) or not same(generators(), before):
            self.open = False
        elif len(self._known) < _MOST:
            self._known.add(shape)

    def evaluate(
        self, call: Callable[[], Any], aliases: Sequence[Tensor], trees: Sequence[Tree]
    ) -> Tensor | None:
        """Evaluate the loss without the guard.

        Parameters
        ----------
        call : callable
            Calls it.
        aliases : sequence of Tensor
            The variables that it is called with.
        trees : sequence of Tree
            What these are the variables of, to be named in messages.

        Returns
        -------
        value : Tensor or None
            None: it is to be evaluated under the guard.

        Raises
        ------
        UnsupportedOperation
            If it has changed a variable in place, or in place of an error that is known.
        RuntimeError
            Its own.
        ValueError
            The same.
        """
        if not (self._known and _plain()):
            return None
        watcher, turn, before = _Refuses(), take_turn(), [t._version for t in aliases]
        token = watch(watcher)
        try:
            value = call()
        except _Unguarded:
            value = None
        except (RuntimeError, ValueError) as error:
            advise(error, trees)
            raise
        finally:
            unwatch(token)
            if turn:
                end_turn()
        if [t._version for t in aliases] != before:
            _refuse_changed(aliases, before, trees)
        if watcher.noticed:
            self.open = False
            return None
        if type(value) is Tensor and value.ndim == 0 and _shape(value, aliases) in self._known:
            self._credit = min(self._credit + 1, _MOST)
            return value
        self._credit -= 1
        self.open = self._credit > 0
        return None


def _refuse_changed(
    aliases: Sequence[Tensor], before: Sequence[int], trees: Sequence[Tree]
) -> None:
    """Raise for the first variable that a loss has changed in place."""
    paths = [tree.variable_path(i) for tree in trees for i in range(len(tree.variables))]
    moved = [alias._version != was for alias, was in zip(aliases, before, strict=True)]
    path = paths[moved.index(True)]
    raise changed_in_place("A loss", path, leaf=path)


def _plain() -> bool:
    """Say whether nothing surrounds the call that would see or change what is recorded."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is None and not torch._C._is_torch_function_mode_enabled()


def _harmless(name: str) -> bool:
    tested = name == _LEAF or name in TESTED_NODES
    return tested and not any(part in name for part in _GUARDED)


def _shape(value: Tensor, aliases: Sequence[Tensor]) -> Shape | None:
    """Describe the graph of a value; None where it ends in a tensor that is no alias."""
    own = {id(alias): place for place, alias in enumerate(aliases)}
    first = value.grad_fn
    if first is None:
        return None
    shape: list[Any] = [value.dtype]
    places: dict[Any, int] = {first: 0}
    stack = [first]
    while stack:
        node = stack.pop()
        shape.append(node.name())
        following = node.next_functions
        if not following and (leaf := getattr(node, "variable", None)) is not None:
            place = own.get(id(leaf))
            if place is None:
                return None
            shape.append(place)
        for other, number in following:
            if other is None:
                shape.append(None)
                continue
            known = places.get(other)
            if known is None:
                known = places[other] = len(places)
                stack.append(other)
            shape.append((known, number))
    return tuple(shape)
