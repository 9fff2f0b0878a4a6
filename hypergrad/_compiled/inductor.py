"""A graph compiled by Inductor: in pieces that repeat, each compiled once, or as a whole."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from .clean import Form
from .pieces import Boxed, Piece, Pieces, graph_of_piece, is_alone
from .run import runner

aten = torch.ops.aten

#: A piece with fewer operations is not worth a compiler's time.
_FEW = 8
#: Show that something is compiled after so many seconds.
_PATIENCE = 3.0
#: And again after each so many.
_EVERY = 1.0


class NoCompiler(Exception):
    """Inductor cannot compile here; the text says why."""


class Compiled(NamedTuple):
    """A compiled graph: ``run(*inputs) -> outputs``, its pieces, and how many of them differ."""

    run: Callable[..., list[Tensor]]
    pieces: int
    distinct: int


def compiled(
    graph: fx.Graph,
    forms: Mapping[fx.Node, Form],
    constants: Mapping[fx.Node, Tensor],
    examples: Sequence[Tensor],
    whole: bool = False,
) -> Compiled:
    """Compile a graph to a function of its inputs.

    Parameters
    ----------
    graph : Graph
        Of ATen operations, without mutations.
    forms : mapping
        What the tensors are like.
    constants : mapping
        The tensors that stand for nodes.
    examples : sequence of Tensor
        Inputs; others have to have the same shapes, strides, types and devices.
    whole : bool
        Compile the graph as one.

    Returns
    -------
    compiled : Compiled
        The function.

    Raises
    ------
    NoCompiler
        If there is no compiler, or it fails.
    """
    pieces = Pieces(graph, forms, constants, whole=whole)
    known: dict[Hashable, Boxed] = {}
    with _Watch(len(pieces.order)) as watch:

        def call_of(piece: Piece, given: list[Tensor]) -> Boxed:
            watch.next()
            key = piece.key, tuple((t.shape, t.stride(), t.dtype, t.device) for t in given)
            if key not in known:
                known[key] = _compiled(piece, constants, given)
            return known[key]

        run = pieces.assembled(examples, call_of)
    return Compiled(run, len(pieces.order), len(known))


def _compiled(piece: Piece, constants: Mapping[fx.Node, Tensor], given: list[Tensor]) -> Boxed:
    graph = graph_of_piece(piece, constants)
    if len(piece.nodes) < _FEW or is_alone(piece.nodes[0]):
        run = runner(graph, {})
        return lambda inputs: run(*inputs)
    try:
        return _by_inductor(fx.GraphModule(torch.nn.Module(), graph), given)
    except Exception as error:  # of whatever part of a compiler
        raise NoCompiler(_why(error)) from error


def _by_inductor(module: fx.GraphModule, given: list[Tensor]) -> Boxed:
    """Compile operations by Inductor, without guards around them."""
    with warnings.catch_warnings():  # PyTorch's own, at its first import
        warnings.simplefilter("ignore", DeprecationWarning)
        import torch._inductor.config as config
        from torch._inductor.compile_fx import compile_fx_inner
        from torch._inductor.cpp_builder import get_cpp_compiler
        from torch._inductor.decomposition import select_decomp_table

    # On the CPU there is C++ around the kernels too: Python would take as long as they do.
    cpu = all(t.device.type == "cpu" for t in given)
    if cpu:
        get_cpp_compiler()
    table = {**select_decomp_table(), aten.mv.default: _as_matrices}
    ours = {
        "compile_threads": 1, "size_asserts": False, "cpp_wrapper": cpu, "triton.cudagraphs": False,
    }  # fmt: skip
    with torch.no_grad(), config.patch(ours), _quiet("torch._inductor.ir"):
        simple = make_fx(module, decomposition_table=table, tracing_mode="fake")(*given)
        # What a piece returns has the order in memory that it has without a compiler.
        output = next(node for node in simple.graph.nodes if node.op == "output")
        output.meta["user_visible_output_idxs"] = list(range(len(output.args[0])))
        made = compile_fx_inner(simple, given, is_inference=True, cpp_wrapper=cpu)
    run: Boxed = getattr(made, "current_callable", None) or made.__call__
    return run


def _as_matrices(matrix: Tensor, vector: Tensor) -> Tensor:
    """Leave a product with a vector to the library: Inductor's own loops read far memory slowly."""
    return aten.mm.default(matrix, vector.unsqueeze(1)).squeeze(1)


class _Watch:
    """A line on stderr that says how far the compiler is, where that takes long.

    A piece may take a minute, so that a thread writes the line.
    """

    def __init__(self, count: int) -> None:
        self._count, self._piece, self._width = count, 0, 0
        self._begun, self._over = time.monotonic(), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()
        if self._width:
            sys.stderr.write("\n")
            sys.stderr.flush()

    def next(self) -> None:
        """Note that a piece begins."""
        self._piece += 1

    def _watch(self) -> None:
        wait = _PATIENCE
        while not self._over.wait(wait):
            wait = _EVERY
            seconds = time.monotonic() - self._begun
            line = f"hypergrad.compile: piece {self._piece} of {self._count}, {seconds:.0f} s"
            sys.stderr.write("\r" + line.ljust(self._width))
            sys.stderr.flush()
            self._width = len(line)


@contextlib.contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Hide what a logger says of operations that it leaves to the library."""
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def _why(error: BaseException) -> str:
    """Say in a line why a compiler has given up."""
    while isinstance(error, Exception) and error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:1]) or type(error).__name__
