"""Recording one call of a user's functions: here alone, so that every call is guarded alike."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar

import torch
from torch import Tensor

from .._errors import NotConnected, UnsupportedOperation
from .._pytrees import Tree
from .attention import recorded
from .double_backward import advice
from .random_numbers import Draw
from .ranks import run_alike, together
from .refused_modules import WHOLE, RunsOnProcesses, refuse_distributed_tensor
from .shards import agree, group_of, refuse_split, whole_ones
from .trace import Notes, further_out, graph, notes, trace
from .transforms import is_wrapped

T = TypeVar("T")


class Recording:
    """A call of a user's functions that is being recorded.

    Parameters
    ----------
    aliases : list of Tensor
        What the functions are given in place of the variables.
    trees : sequence of Tree
        The caller's arguments, to be named in messages.

    Attributes
    ----------
    values : sequence of Tensor
        What the functions have returned.
    notes : Notes
        What was noticed while they ran.
    group : ProcessGroup, optional
        Who evaluates them together, where variables are DTensors.
    own_backward : bool
        As in `record`.
    """

    def __init__(
        self,
        aliases: list[Tensor],
        trees: Sequence[Tree],
        group: Any = None,
        own_backward: bool = False,
    ) -> None:
        self.aliases, self.trees = aliases, trees
        self.group, self.own_backward = group, own_backward
        self.values: Sequence[Tensor] = ()
        self.notes: Notes = notes()

    def placed(self, tensors: Iterable[Tensor], places: Sequence[int]) -> list[Tensor]:
        """Put the aliases in these places among the tensors of a problem."""
        given = list(tensors)
        for place, alias in zip(places, self.aliases, strict=True):
            given[place] = alias
        return given

    def returned(self, values: Sequence[Tensor]) -> None:
        """Take note of what the functions returned, before anything is differentiated."""
        self.values = values
        if self.own_backward:
            run_alike(False)
        if self.group is not None:
            agree("what a function returns", values, self.group)

    def captured(self) -> list[Tensor]:
        """List what the returned values depend on that is differentiated further out."""
        return [t for value in self.values for t in further_out(value, self.aliases)]

    def refuse_past_arguments(self, what: str, trees: Sequence[Tree] | None = None) -> None:
        """Raise if a function reached a tensor of these trees and not the argument made from it."""
        trees = self.trees if trees is None else trees
        refuse_past_arguments(what, self.values, self.aliases, trees)


def record(
    evaluate: Callable[[Recording], T],
    variables: Sequence[Tensor],
    trees: Sequence[Tree],
    callers: Sequence[Tree] | None = None,
    draw: Draw | None = None,
    in_pieces: bool = False,
    own_backward: bool = False,
) -> T:
    """Call a user's functions so that what they return can be differentiated.

    Whoever calls a user's function in it does so inside a `Guard`, as `Problem` does.

    Parameters
    ----------
    evaluate : callable
        ``evaluate(recording)``: calls the functions with ``recording.aliases``, and
        differentiates what they returned. It is called again where that needs the second derivative
        of attention and a fused kernel ran.
    variables : sequence of Tensor
        What the aliases stand for.
    trees : sequence of Tree
        The caller's arguments, to be named where they do not go together.
    callers : sequence of Tree, optional
        Those of them that are the caller's own memory, where others are not.
    draw : Draw, optional
        The random numbers of the call; None: those that come next.
    in_pieces : bool
        Whether the variables of the first tree may be DTensors.
    own_backward : bool
        Whether the caller knows what to do with `RunsOnProcesses`.

    Returns
    -------
    answer
        What `evaluate` returned.

    Raises
    ------
    UnsupportedOperation
        In place of PyTorch's error about a missing second derivative; or if an argument is split
        over several processes and may not be.
    StructureMismatch
        In place of one about dtypes and devices.
    RunsOnProcesses
        With `own_backward`, if a module of several processes runs.
    """
    group = group_of(trees[0].variables) if in_pieces else None
    for tree in trees if group is None else trees[1:]:
        for position, variable in enumerate(tree.variables):
            if type(variable) not in WHOLE:
                refuse = refuse_distributed_tensor if group is None else refuse_split
                refuse(tree.variable_path(position), variable)

    def noted(aliases: list[Tensor]) -> T:
        notes().callers = trees if callers is None else callers
        notes().placed = group is not None
        return evaluate(Recording(aliases, trees, group, own_backward))

    def once() -> T:
        return trace(noted, variables)

    with advice(trees), nullcontext() if group is None else together(group):
        if group is not None:
            agree("one of the arguments", whole_ones(variables), group)
        try:
            return recorded(once, Draw() if draw is None else draw)
        except RunsOnProcesses as seen:
            if own_backward:
                run_alike(True)
                raise
            raise UnsupportedOperation(*seen.args) from None


def surroundings(devices: Collection[str]) -> Callable[[], AbstractContextManager[None]]:
    """Remember the autocast in force, for evaluations that are made under another one later.

    Parameters
    ----------
    devices : collection of str
        The types of device that are computed on.

    Returns
    -------
    again : callable
        Makes a context in which it is in force.
    """
    in_force = [
        (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        for device in {"cpu", *devices}
        if torch.amp.is_autocast_available(device)
    ]
    # A cache would keep a copy of every alias for as long as the caller's own context lasts.
    cache = torch.is_autocast_cache_enabled() and not any(on for _, _, on in in_force)

    @contextmanager
    def again() -> Iterator[None]:
        with ExitStack() as stack:
            for device, dtype, enabled in in_force:
                stack.enter_context(
                    torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
                )
            yield

    return again


def narrowest(values: Iterable[Tensor], widest: torch.dtype) -> torch.dtype:
    """Find the narrowest floating-point dtype among recorded values and what they came through."""
    dtypes = {widest}
    for value in values:
        dtypes.add(value.dtype)
        for node in graph(value).nodes:
            dtypes |= {made.dtype for made in getattr(node, "_input_metadata", ())}
    real = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(real, key=lambda dtype: torch.finfo(dtype).eps)


def refuse_past_arguments(
    what: str, outputs: Sequence[Tensor], aliases: Sequence[Tensor], trees: Sequence[Tree]
) -> None:
    """Raise if a function reached a caller's tensor and not the argument made from it.

    Raises
    ------
    NotConnected
        Naming the leaf.
    """
    own = {id(alias) for alias in aliases}
    leaves: set[tuple[Any, ...]] = set()
    edges: set[tuple[Any, int]] = set()
    for output in outputs:
        ends, reached = graph(output)
        leaves |= {_memory(leaf) for leaf in ends if id(leaf) not in own}
        edges |= reached
    leaves.discard(())
    for tree in trees:
        for position, variable in enumerate(tree.variables):
            if _memory(variable) in leaves or (variable.grad_fn, variable.output_nr) in edges:
                raise NotConnected(
                    f"{what} reaches {tree.variable_path(position)} past its arguments (a module "
                    "called directly, or a captured tensor), so that its derivative would be lost. "
                    "Call a module as torch.func.functional_call(module, params, args), and use "
                    "the arguments that the function is given.",
                    leaf=tree.variable_path(position),
                )


def _memory(tensor: Tensor) -> tuple[Any, ...]:
    """Identify a plain tensor's memory; nothing for wrapped and empty ones."""
    if is_wrapped(tensor) or tensor.numel() == 0:
        return ()
    return tensor.data_ptr(), tensor.shape, tensor.dtype
