"""Tracing a function of tensors into a graph of ATen operations, without mutations."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakIdKeyDictionary

from .._autograd.branches import following, not_following
from .._autograd.random_numbers import generators, restore
from .._autograd.torch_pytrees import pytree
from .capture import Failed, NotCaptured
from .part import Part, recording

aten = torch.ops.aten
T = TypeVar("T")

_IN_PLACE = "a tensor that was made before the call is changed in place"
_LIFTS = frozenset({aten.lift_fresh.default, aten.lift_fresh_copy.default, aten.lift.default})
#: Zeros that autograd does not write down, which a graph has to.
_WITH_MEMORY = {aten._efficientzerotensor.default: aten.zeros.default}
_OF_MEMORY = frozenset({
    aten.as_strided.default, aten.as_strided_copy.default, aten.as_strided_scatter.default,
})  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Traced:
    """A function as a graph, and the branches that the host has taken in it.

    Attributes
    ----------
    graph : Graph
        The inputs are the function's. The outputs are the function's and, where the host has looked
        at flags, a vector of those.
    constants : dict
        The tensors that stand for some of its nodes.
    seen : tuple of bool
        The values of the flags.
    """

    graph: fx.Graph
    constants: dict[fx.Node, Tensor]
    seen: tuple[bool, ...]


def traced(
    function: Callable[..., Sequence[Tensor]], examples: Sequence[Tensor], *, parts: bool = True
) -> Traced:
    """Trace a function.

    Parameters
    ----------
    function : callable
        Of tensors, to a list of tensors. Values of theirs may be read by `host` alone.
    examples : sequence of Tensor
        Its arguments.
    parts : bool
        Whether a part of it may stay Python.

    Returns
    -------
    traced : Traced
        The graph.

    Raises
    ------
    NotCaptured
        If the graph would not compute the same at the next call.
    Failed
        If an operation fails, also where the function goes on without it.
    """
    # No two of them are one tensor, which a trace could not tell apart.
    own = [_copied(t.detach()) for t in examples]
    recorder, random = Recorder(own, parts), generators()
    try:
        with following(recorder.paused) as branches, recorder.entered():
            outputs = list(function(*own))
            if branches.flags:
                outputs.append(torch.stack(branches.flags))
    except Exception as error:
        recorder.refuse(error)
        raise
    finally:
        restore(random)
    recorder.refuse(recorder.error)
    if not all(map(_equal, own, examples)):
        raise NotCaptured(_IN_PLACE)
    recorder.graph.output([recorder.node_of(output) for output in outputs])
    return Traced(recorder.graph, recorder.constants, tuple(branches.seen))


class Recorder(TorchDispatchMode):
    """Writes each operation that runs into a graph."""

    def __init__(self, inputs: Sequence[Tensor], parts: bool) -> None:
        super().__init__()
        self.parts = parts
        self.graph = fx.Graph()
        self.constants: dict[fx.Node, Tensor] = {}
        #: Why a replay would not repeat the call, which an `except` in it must not hide.
        self.failure = ""
        #: What an operation has raised, for the same reason.
        self.error: Exception | None = None
        self._nodes: Any = WeakIdKeyDictionary()
        self._bases: Any = WeakIdKeyDictionary()
        self._resting = False
        self._memories = {tensor.untyped_storage()._cdata for tensor in inputs}
        for place, tensor in enumerate(inputs):
            self._nodes[tensor] = self.graph.placeholder(f"input_{place}")

    def refuse(self, error: Exception | None) -> None:
        """Raise if a replay would not repeat the call, or an operation has failed."""
        if self.failure:
            raise NotCaptured(self.failure) from error
        if self.error is not None:
            raise Failed(str(self.error)) from error

    def paused(self, call: Callable[[], T]) -> T:
        """Make a call that is not recorded."""
        self._resting = True
        try:
            return call()
        finally:
            self._resting = False

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Record what the body does."""
        token = recording.set(self)
        try:
            with self:
                yield
        finally:
            recording.reset(token)

    def as_it_is(
        self,
        part: Part,
        product: Callable[[Tensor], Tensor],
        vectors: Sequence[Tensor],
        tensors: Sequence[Tensor],
    ) -> list[Tensor]:
        """Leave a part of the call as it is, around a product that is recorded."""
        pairs, own = list[tuple[fx.Node, fx.Node]](), []
        for place, vector in enumerate(vectors):
            v = self.paused(vector.clone)
            begin = self._nodes[v] = self.graph.call_function(part.vector, (place,))
            pairs.append((begin, self.node_of(product(v))))
            own.append(v)
        given = [self.node_of(t) for t in tensors]
        with not_following():
            outcome = self.paused(lambda: list(part.run(product, tensors)))
        part.traced(own, outcome)
        args = pairs, given
        node = self.graph.create_node("call_function", part, args, {}, name="part")
        for place, tensor in enumerate(outcome):
            self._nodes[tensor] = self.graph.call_function(operator.getitem, (node, place))
        return outcome

    def node_of(self, tensor: Tensor) -> fx.Node:
        """Find the node of a tensor that the trace has made."""
        node: fx.Node | None = self._nodes.get(tensor)
        if node is None:
            self.fail(
                "a tensor is used that is no argument and that none of the functions captures"
            )
            node = self.graph.create_node("get_attr", f"constant_{len(self.constants)}")
            self.constants[node] = tensor.detach().clone()
            self._nodes[tensor] = node
        return node

    def fail(self, cause: str) -> None:
        """Note why the call cannot be replayed."""
        self.failure = self.failure or cause

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation, and write it down."""
        kwargs = kwargs or {}
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if self._resting:
            return func(*args, **kwargs)
        if func in _LIFTS and tensors[0] not in self._nodes:  # Python has just made it
            return self._lifted(func(*args, **kwargs))
        if tensors and not any(t in self._nodes for t in tensors):
            return func(*args, **kwargs)  # nothing of the call's, but a generator's state, say
        if torch.Tag.nondeterministic_seeded in func.tags and not _without_dropout(
            func, args, kwargs
        ):
            self.fail(f"random numbers are drawn ({func})")
        if torch.Tag.dynamic_output_shape in func.tags and not _indexes_by_number(func, args):
            self.fail(f"the shape of a result depends on values ({func})")
        if func in _OF_MEMORY:
            self.fail(f"a tensor is read in the order of its memory ({func})")
        if func is aten._local_scalar_dense.default:
            if args[0] in self._nodes and self._nodes[args[0]] not in self.constants:
                self.fail("a value is read on the host in the middle of the call")
            return func(*args, **kwargs)
        mutable = func._schema.is_mutable
        written, pure = self._pure(func, args, kwargs) if mutable else (None, (func, args, kwargs))
        mapped = pytree.tree_map_only(Tensor, self.node_of, pure[1:])
        try:
            result = func(*args, **kwargs)
        except Exception as error:
            self.error = self.error or error
            raise
        node = self.graph.call_function(_WITH_MEMORY.get(pure[0], pure[0]), *mapped)
        if written is not None:
            self._rewritten(written, node)
            return result
        self._keep_bases(result, tensors)
        if isinstance(result, Tensor):
            if result not in self._nodes:  # it may be an argument, as that of view(x, x.shape) is
                self._nodes[result] = node
        elif isinstance(result, tuple | list):
            for place, part in enumerate(result):
                if isinstance(part, Tensor):
                    self._nodes[part] = self.graph.call_function(operator.getitem, (node, place))
        elif isinstance(result, bool | int | float) and node.all_input_nodes:
            self.fail(f"a value is read on the host in the middle of the call ({func})")
        return result

    def _lifted(self, tensor: Tensor) -> Tensor:
        node = self.graph.create_node("get_attr", f"constant_{len(self.constants)}")
        self.constants[node] = tensor.detach().clone()
        self._nodes[tensor] = node
        return tensor

    def _pure(self, func: Any, args: Any, kwargs: Any) -> tuple[Tensor, tuple[Any, Any, Any]]:
        """Find the operation that computes what another one writes in place.

        Returns
        -------
        written : Tensor
            What is written to.
        pure : tuple
            The operation, its arguments and its keywords.
        """
        names = [
            argument.name
            for argument in func._schema.arguments
            if argument.alias_info is not None and argument.alias_info.is_write
        ]
        if names == ["self"] and isinstance(args[0], Tensor):
            written, rest = args[0], kwargs
            target = aten.copy.default if func is aten.copy_.default else _functional(func, names)
        elif names == ["out"]:
            written, rest = kwargs["out"], {k: v for k, v in kwargs.items() if k != "out"}
            target = _functional(func, names)
        else:
            target, written, rest = None, args[0], kwargs
        if target is None:
            self.fail(f"several tensors are changed in place at once ({func})")
        return written, (target or func, args, rest)

    def _keep_bases(self, result: Any, tensors: Sequence[Tensor]) -> None:
        """Keep what a result is a view of for as long as the view is there."""
        if not tensors or tensors[0].layout != torch.strided:
            return
        memory = tensors[0].untyped_storage()._cdata
        for part in result if isinstance(result, tuple | list) else [result]:
            if not isinstance(part, Tensor) or part.layout != torch.strided:
                continue
            if part is not tensors[0] and part.untyped_storage()._cdata == memory:
                self._bases[part] = tensors[0]

    def _rewritten(self, tensor: Tensor, value: fx.Node) -> None:
        """Note that a tensor has got a value in place, and with it all others in its memory."""
        memory = tensor.untyped_storage()
        if memory._cdata in self._memories:
            self.fail(_IN_PLACE)
        others = [
            other
            for other in self._nodes
            if other is not tensor and other.untyped_storage()._cdata == memory._cdata
        ]
        if others:
            size = memory.nbytes() // tensor.element_size()
            whole = [
                t
                for t in (tensor, *others)
                if t.numel() == size and t.is_contiguous() and t.dtype == tensor.dtype
            ]
            if not whole or any(t.dtype != tensor.dtype for t in others):
                self.fail("a part of a tensor is changed in place while another part is in use")
                return
            base, then = whole[0], value
            if base is not tensor:
                args = self._nodes[base], value, *_place(tensor)
                then = self.graph.call_function(aten.as_strided_scatter.default, args)
            for other in (tensor, *others):
                seen = self.graph.call_function(aten.as_strided.default, (then, *_place(other)))
                self._nodes[other] = then if other is base else seen
        else:
            self._nodes[tensor] = value


def _without_dropout(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    """Say whether an operation that may drop entries at random drops none, as attention does."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.name == "dropout_p":
            given = args[place] if place < len(args) else kwargs.get("dropout_p", 0.0)
            return bool(given == 0)
    return False


def _place(tensor: Tensor) -> tuple[list[int], list[int], int]:
    """Say where in its memory a tensor lies."""
    return list(tensor.shape), list(tensor.stride()), int(tensor.storage_offset())


def _equal(one: Tensor, other: Tensor) -> bool:
    same = one == other
    return bool((same | one.isnan() & other.isnan() if one.is_floating_point() else same).all())


def _copied(tensor: Tensor) -> Tensor:
    """Copy a tensor in the order of its memory: a function that changes it changes the copy."""
    steps = zip(tensor.stride(), tensor.shape, strict=True)
    if any(step == 0 and size > 1 for step, size in steps):
        return tensor.view_as(tensor)  # it cannot be changed in place
    shape, strides = tensor.shape, tensor.stride()
    copy = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _indexes_by_number(func: Any, args: Any) -> bool:
    """Say whether an operation picks entries by their numbers, and not by a mask."""
    if func is not aten.index.Tensor:
        return False
    kinds = [index.dtype for index in args[1] if index is not None]
    return not any(kind in (torch.bool, torch.uint8) for kind in kinds)


def _functional(func: Any, written: Sequence[str]) -> Any:
    """Find the operation that returns what another one writes; None: there is none."""
    packet = getattr(aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None)
    wanted = [(a.name, str(a.type)) for a in func._schema.arguments if a.name != "out"]
    for overload in packet.overloads() if packet is not None else ():
        pure = getattr(packet, overload)
        own = [(a.name, str(a.type)) for a in pure._schema.arguments]
        if own == wanted and not pure._schema.is_mutable:
            return pure
    return None
