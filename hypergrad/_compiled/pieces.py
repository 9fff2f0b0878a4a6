"""A graph in pieces that repeat: an unrolled iteration is one piece, computed again and again.

The graph of a whole call holds each step of its solvers anew. The steps are the same operations on
tensors of the same forms, so that a compiler needs to see one of them. They are found in the graph
itself, as the stretches of operations that come several times in a row; whatever loop made them,
the library's or the user's.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from .clean import Form, is_check
from .run import runner

aten = torch.ops.aten

#: Takes its inputs in a list, which it may empty, and returns its outputs.
Boxed = Callable[[list[Tensor]], Sequence[Tensor]]

_VIEWS = (aten.view.default, aten._unsafe_view.default)
#: A shorter stretch is not worth a call of its own.
_SHORT = 12
#: What a call of a piece costs, in operations to compile.
_CALL = 12
#: What a compiler takes for a piece beside its operations, in these.
_PIECE = 100


@dataclasses.dataclass(eq=False)
class Piece:
    """Operations of a graph that follow one another.

    Attributes
    ----------
    nodes : list of Node
        These.
    inputs : list of Node
        What they read of earlier ones, and of the graph's inputs, in the order of their use.
    outputs : list of Node
        What later ones read of them.
    key : hashable
        Pieces with equal keys compute the same of their inputs, if these have the same forms.
    """

    nodes: list[fx.Node]
    inputs: list[fx.Node]
    outputs: list[fx.Node]
    key: Hashable


class Pieces:
    """A graph cut where its iterations begin.

    Parameters
    ----------
    graph : Graph
        Of ATen operations, without mutations.
    forms : mapping
        What the tensors are like.
    constants : mapping
        The tensors that stand for nodes.
    whole : bool
        Leave the graph in one piece.
    apart : set of OpOverload
        Operations that are pieces of their own; the graph is cut nowhere else.

    Attributes
    ----------
    order : list of Piece
        The pieces, in their order.
    """

    def __init__(
        self,
        graph: fx.Graph,
        forms: Mapping[fx.Node, Form],
        constants: Mapping[fx.Node, Tensor],
        *,
        whole: bool = False,
        apart: frozenset[Any] = frozenset(),
    ) -> None:
        self._graph, self._forms, self._constants = graph, forms, constants
        self._numbers = {node: uniform(tensor) for node, tensor in constants.items()}
        units = _units(graph, constants)
        self._last = _last_readers(units)
        alone = [i for i, unit in enumerate(units) if is_alone(unit[0], apart)]
        cuts = [0, len(units)] if whole or apart else self._cuts(units)
        cuts = sorted({*cuts, *alone, *(i + 1 for i in alone)})
        self.order = [
            self._piece([n for unit in units[start:end] for n in unit])
            for start, end in pairwise(cuts)
        ]
        self._last_piece: dict[fx.Node, int] = {
            node: i for i, piece in enumerate(self.order) for node in piece.inputs
        }
        output = next(node for node in graph.nodes if node.op == "output")
        self._last_piece.update(dict.fromkeys(output.all_input_nodes, len(self.order)))

    def assembled(
        self, examples: Sequence[Tensor], call_of: Callable[[Piece, list[Tensor]], Boxed]
    ) -> Callable[..., list[Tensor]]:
        """Make a function of the graph's inputs that calls one piece after the other.

        Parameters
        ----------
        examples : sequence of Tensor
            Inputs, at which each piece is called once.
        call_of : callable
            ``call_of(piece, inputs)``: what computes a piece, at inputs like these.

        Returns
        -------
        run : callable
            ``run(*inputs) -> outputs``.
        """
        rough, new, held = fx.Graph(), dict[fx.Node, fx.Node](), dict[fx.Node, Tensor]()
        values = dict(self._constants)
        given = iter(examples)
        for node in self._graph.nodes:
            if node.op == "placeholder":
                new[node], values[node] = rough.placeholder(node.name), next(given)
            elif node in values:
                new[node] = rough.get_attr(node.name)
                held[new[node]] = values[node]
        for number, piece in enumerate(self.order):
            inputs = [values[node] for node in piece.inputs]
            call = call_of(piece, inputs)
            values.update(zip(piece.outputs, call(list(inputs)), strict=True))
            made = rough.call_function(call, ([new[node] for node in piece.inputs],))
            for place, node in enumerate(piece.outputs):
                new[node] = rough.call_function(operator.getitem, (made, place))
            for node in piece.inputs:
                if self._last_piece[node] == number:
                    del values[node]
        output = next(node for node in self._graph.nodes if node.op == "output")
        rough.output([new[node] for node in output.args[0]])
        return runner(rough, held)

    def _cuts(self, units: list[list[fx.Node]]) -> list[int]:
        """Find where to cut: around each stretch that comes several times."""
        known: dict[Hashable, int] = {}
        words = [known.setdefault(self._word(unit), len(known)) for unit in units]
        alive = self._alive(units)
        cuts, cost = [0, len(units)], _cost(words, [0, len(units)])
        left, free = torch.tensor(words), -1
        while True:
            tried = [
                (_cost(words, around), around, places, length)
                for places, length in _repeated(left, alive)
                for around in [_with(cuts, places, length)]
            ]
            best = min(tried, key=operator.itemgetter(0), default=None)
            if best is None or best[0] >= cost:
                return cuts
            cost, cuts, places, length = best
            for start in places:
                left[start : start + length] = torch.arange(free, free - length, -1)
                free -= length

    def _alive(self, units: list[list[fx.Node]]) -> list[int]:
        """Count the tensors that are made before a place and read after it."""
        change = [0] * (len(units) + 2)
        for i, unit in enumerate(units):
            for node in unit:
                change[i + 1] += 1
                change[self._last.get(node, i) + 1] -= 1
        alive, count = [], 0
        for step in change[: len(units) + 1]:
            count += step
            alive.append(count)
        return alive

    def _word(self, unit: list[fx.Node]) -> Hashable:
        """Describe an operation and the forms of what it reads, but not which tensors these are."""
        node = unit[0]
        return node.target, self._described(node, lambda n: self._form(n)), len(unit)

    def _form(self, node: fx.Node) -> Hashable:
        number = self._numbers.get(node)
        return self._forms.get(node, node.target), number

    def _described(self, node: fx.Node, name: Any) -> Hashable:
        return _hashable((node.args, dict(node.kwargs)), name)

    def _piece(self, nodes: list[fx.Node]) -> Piece:
        inside = set(nodes)
        names: dict[fx.Node, Hashable] = {}
        inputs: list[fx.Node] = []

        def name(node: fx.Node) -> Hashable:
            if self._numbers.get(node) is not None:
                return self._form(node)
            if node not in names:
                inputs.append(node)
                names[node] = "input", len(inputs), self._forms[node]
            return names[node]

        text = []
        for i, node in enumerate(nodes):
            text.append((node.target, self._described(node, name)))
            names[node] = i
        outputs = [n for n in nodes if any(user not in inside for user in n.users)]
        key = tuple(text), tuple(names[n] for n in outputs)
        return Piece(nodes, inputs, outputs, key)


def is_alone(node: fx.Node, apart: frozenset[Any] = frozenset()) -> bool:
    """Say whether an operation is a piece of its own, as Python in the middle of a graph is."""
    operation = isinstance(node.target, torch._ops.OpOverload)
    return node.target in apart or not operation or is_check(node)


def graph_of_piece(piece: Piece, constants: Mapping[fx.Node, Tensor]) -> fx.Graph:
    """Write a piece as a graph of its inputs."""
    graph = fx.Graph()
    new = {node: graph.placeholder(f"i{place}") for place, node in enumerate(piece.inputs)}

    def renewed(node: fx.Node) -> fx.Node:
        if node not in new:
            new[node] = _number(graph, constants[node])
        return new[node]

    for node in piece.nodes:
        new[node] = graph.node_copy(node, renewed)
        if node.target in _VIEWS:  # of tensors whose order in memory is another here
            new[node].target = aten.reshape.default
    graph.output([new[node] for node in piece.outputs])
    return graph


def _number(graph: fx.Graph, tensor: Tensor) -> fx.Node:
    """Write a constant as its number, which a compiler folds into what reads it."""
    _, number = uniform(tensor) or ("", 0)
    form: dict[str, Any] = {"dtype": tensor.dtype, "device": tensor.device}
    return graph.call_function(aten.full.default, (list(tensor.shape), number), form)


def uniform(tensor: Tensor) -> tuple[str, Any] | None:
    """Give the number that all entries of a tensor are; None: they differ."""
    if not tensor.numel() or tensor.is_complex():
        return None
    number = tensor.flatten()[0]
    same = (tensor == number).all() & (tensor.signbit() == number.signbit()).all()
    return (repr(number.item()), number.item()) if bool(same) else None


def _units(graph: fx.Graph, constants: Mapping[fx.Node, Tensor]) -> list[list[fx.Node]]:
    """List the operations; what takes the parts of several results stays with the operation."""
    units: list[list[fx.Node]] = []
    of: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op != "call_function" or node in constants:
            continue
        parent = node.args[0] if _takes_a_part(node) else None
        if parent in of:
            of[node] = of[parent]
            of[parent].append(node)
        else:
            units.append([node])
            of[node] = units[-1]
    return units


def _takes_a_part(node: fx.Node) -> bool:
    return getattr(node.target, "__name__", "") == "getitem"


def _last_readers(units: list[list[fx.Node]]) -> dict[fx.Node, int]:
    """Find the last operation that reads each node; the graph's outputs are read at the end."""
    places = {node: i for i, unit in enumerate(units) for node in unit}
    return {
        node: max((places.get(user, len(units)) for user in node.users), default=i)
        for node, i in places.items()
    }


def _cost(words: Sequence[int], cuts: Sequence[int]) -> int:
    """Estimate what pieces cost to compile and to call, in operations."""
    pieces = {tuple(words[start:end]) for start, end in pairwise(cuts)}
    return sum(map(len, pieces)) + _PIECE * len(pieces) + _CALL * (len(cuts) - 1)


def _with(cuts: Sequence[int], starts: Sequence[int], length: int) -> list[int]:
    """Add the cuts around stretches."""
    return sorted({*cuts, *starts, *(start + length for start in starts)})


def _repeated(words: Tensor, alive: Sequence[int]) -> Iterator[tuple[list[int], int]]:
    """Find stretches that come several times.

    A word below zero is never repeated.

    Yields
    ------
    starts : list of int
        Where a stretch begins each time.
    length : int
        How many words it has.
    """
    seen: set[tuple[int, ...]] = set()
    for shift in range(1, len(words)):
        same = (words[shift:] == words[:-shift]) & (words[shift:] >= 0)
        edges = torch.nn.functional.pad(same.int(), (1, 1)).diff()
        starts, ends = (edges == 1).nonzero()[:, 0], (edges == -1).nonzero()[:, 0]
        if not len(starts):
            continue
        longest = int((ends - starts).argmax())
        start, run = int(starts[longest]), int(ends[longest] - starts[longest])
        length = min(run, shift)
        if length < _SHORT:
            continue
        if run >= shift:  # where a loop's body begins is free: where the fewest tensors are alive
            start += min(range(run % shift + 1), key=lambda i: alive[start + i])
        stretch = tuple(words[start : start + length].tolist())
        if stretch in seen:
            continue
        seen.add(stretch)
        yield _places(words, start, length), length


def _places(words: Tensor, start: int, length: int) -> list[int]:
    """Find where a stretch of words stands, without overlaps."""
    windows = words.unfold(0, length, 1)
    places, end = list[int](), 0
    for place in (windows == windows[start]).all(dim=1).nonzero()[:, 0].tolist():
        if place >= end:
            places.append(place)
            end = place + length
    return places


def _hashable(value: Any, name: Any) -> Hashable:
    """Make a key of an argument; `name` says what stands for a node."""
    if isinstance(value, fx.Node):
        key: Hashable = name(value)
        return key
    if isinstance(value, list | tuple):
        return tuple(_hashable(v, name) for v in value)
    if isinstance(value, dict):
        return tuple((k, _hashable(v, name)) for k, v in sorted(value.items()))
    if isinstance(value, bool | int | float):  # 1, 1.0 and True are not the same argument
        return type(value), value
    if isinstance(value, slice):
        return value.start, value.stop, value.step
    return value if isinstance(value, Hashable) else id(value)
