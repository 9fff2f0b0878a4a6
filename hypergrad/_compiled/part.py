"""A part of a traced call that runs as it is at each replay, around a product that is traced.

An iteration that ends by what it sees takes another number of steps in each call, and for one
system its numbers are quicker than tensors. So the iteration stays Python; the product that it
forms is cut out of the graph as a function of the vector, with all that does not depend on the
vector computed before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from .clean import drop_dead, is_check
from .run import runner

if TYPE_CHECKING:
    from .trace import Recorder

Product = Callable[[Tensor], Tensor]
#: ``run(product, tensors) -> tensors``
Run = Callable[[Product, Sequence[Tensor]], Sequence[Tensor]]

recording: ContextVar[Recorder | None] = ContextVar("hypergrad_recorder", default=None)


class Changed(Exception):
    """A part has another outcome than the trace has seen, so that the rest does not go on it."""


class Part:
    """The part, in the place of an operation of the graph.

    Parameters
    ----------
    run : callable
        ``run(product, tensors) -> tensors``. It holds no tensor of one call.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._vectors: Sequence[Tensor] = ()
        self._outcome: Sequence[Tensor] = ()
        self._products: list[Callable[..., Sequence[Tensor]]] = []
        self._shapes: list[torch.Size] = []

    def traced(self, vectors: Sequence[Tensor], outcome: Sequence[Tensor]) -> None:
        """Keep, until the products have been cut out, what the trace has seen."""
        self._vectors, self._outcome = vectors, outcome

    def vector(self, place: int) -> Tensor:
        """Give a vector of the product."""
        return self._vectors[place]

    def __call__(
        self, held: Sequence[Sequence[Tensor]], tensors: Sequence[Tensor]
    ) -> Sequence[Tensor]:
        """Run it; `held` is what the products read beside their vectors."""
        if not self._products:
            return self._outcome

        def product(v: Tensor) -> Tensor:
            for run, shape, known in zip(self._products, self._shapes, held, strict=True):
                if v.shape == shape:
                    return run(v, *known)[0]
            # More rows than were traced, or fewer, as of a block that has lost some.
            run, most, known = self._products[0], self._shapes[0][0], held[0]
            rows = v.new_zeros(-(-len(v) // most) * most, *v.shape[1:])
            rows[: len(v)] = v
            return torch.cat([run(part, *known)[0] for part in rows.split(most)])[: len(v)]

        return self.run(product, tensors)

    def cut_out(self, node: fx.Node) -> None:
        """Cut the products out of the graph."""
        given: Any = node.args
        pairs, tensors = given
        self._shapes = [vector.shape for vector in self._vectors]
        cut = [_cut_out(node, vector, image) for vector, image in pairs]
        self._products = [product for product, _ in cut]
        self._vectors, self._outcome = (), ()
        node.args = [held for _, held in cut], tensors


def _cut_out(
    node: fx.Node, vector: fx.Node, image: fx.Node
) -> tuple[Callable[..., Sequence[Tensor]], list[fx.Node]]:
    """Cut a product out of the graph; `node` comes after it.

    Returns
    -------
    product : callable
        Of the vector, and of what it reads beside it.
    held : list of Node
        That.
    """
    live, order = {vector}, list(node.graph.nodes)
    for one in order:
        if any(used in live for used in one.all_input_nodes):
            live.add(one)
    before = order[: order.index(node)]
    checks = {one for one in before if one in live and is_check(one)}
    wanted, inside = {image, *checks}, []
    for one in reversed(before):
        if one in wanted and one in live and one is not vector:
            inside.append(one)
            wanted.update(one.all_input_nodes)
    inside.reverse()
    read = {used for one in inside for used in one.all_input_nodes}
    held = [n for n in order if n in read and n not in live]
    if image not in live:
        held.append(image)
    graph = fx.Graph()
    places = {n: graph.placeholder(f"input_{i}") for i, n in enumerate((vector, *held))}
    for one in inside:
        places[one] = graph.node_copy(one, places.__getitem__)
    graph.output([places[image]])
    for one in checks:
        node.graph.erase_node(one)
    return runner(graph, {}), held


def may_stay_python() -> bool:
    """Say whether a part of the call that is being traced may run as it is at each replay."""
    recorder = recording.get()
    return recorder is not None and recorder.parts


def as_it_is(
    run: Run, product: Product, vectors: Sequence[Tensor], tensors: Sequence[Tensor]
) -> list[Tensor]:
    """Run a part of a call that is being traced, and have it run at each replay.

    Parameters
    ----------
    run : callable
        ``run(product, tensors) -> tensors``. It holds no tensor of this call.
    product : callable
        What it forms.
    vectors : sequence of Tensor
        Of what: any vectors of the shapes that it is formed of. Where the first has several rows,
        blocks of another number of rows are formed by it too.
    tensors : sequence of Tensor
        What else it reads.

    Returns
    -------
    outcome : list of Tensor
        What it returned.
    """
    recorder = recording.get()
    assert recorder is not None
    return recorder.as_it_is(Part(run), product, vectors, tensors)


def cut_out_parts(graph: fx.Graph) -> None:
    """Cut the products of all parts out of a graph."""
    for node in list(graph.nodes):
        if isinstance(node.target, Part):
            node.target.cut_out(node)
    drop_dead(graph)
