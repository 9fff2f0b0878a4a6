"""A program recorded once as CUDA graphs, and replayed on tensors that stay where they are."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from .clean import Form
from .pieces import Boxed, Piece, Pieces, graph_of_piece, is_alone
from .run import runner

aten = torch.ops.aten

#: Operations that wait for the device, so that they cannot be recorded: they run between graphs.
WAITING = frozenset({
    aten._linalg_eigh.default, aten._linalg_svd.default, aten.linalg_eig.default,
    aten._linalg_eigvals.default, aten.linalg_eigvals.default, aten._linalg_solve_ex.default,
    aten.linalg_lstsq.default, aten.linalg_qr.default, aten.linalg_cholesky_ex.default,
    aten.linalg_inv_ex.default, aten.linalg_lu_factor_ex.default, aten._linalg_det.default,
    aten._linalg_slogdet.default, aten.nonzero.default, aten.masked_select.default,
})  # fmt: skip
#: Runs before the recording, in which libraries make what they keep.
_WARM_UPS = 3


class NoRecorder(Exception):
    """The program cannot be recorded; the text says why."""


class Recorder(Protocol):
    """What records operations, and does them again on the same tensors."""

    def record(self, body: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Record a body, and return its tensors, which each replay fills anew."""

    def replay(self) -> None:
        """Do what was recorded."""


class Device(Protocol):
    """Where a program is recorded."""

    def recorder(self) -> Recorder:
        """Make a recorder for one stretch of operations."""

    def in_order(self) -> Any:
        """Enter a replay, which begins where the one before it is over."""


class Cuda:
    """A CUDA device; its recorders are CUDA graphs.

    Parameters
    ----------
    inputs : sequence of Tensor
        What is recorded: all on one such device. A number on the CPU would be recorded with its
        value.

    Raises
    ------
    NoRecorder
        If they are not.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        devices = {t.device for t in inputs}
        if len(devices) != 1 or next(iter(devices)).type != "cuda":
            names = ", ".join(sorted(map(str, devices)))
            raise NoRecorder(f"the tensors are on {names}, not all on one CUDA device")
        (self._device,) = devices
        self._over: torch.cuda.Event | None = None

    def recorder(self) -> Recorder:
        """Make a recorder for one stretch of operations."""
        return _CudaGraph(self._device)

    @contextmanager
    def in_order(self) -> Iterator[None]:
        """Enter a replay, which begins where the one before it is over, on whatever stream."""
        stream = torch.cuda.current_stream(self._device)
        if self._over is not None:
            stream.wait_event(self._over)
        with torch.cuda.device(self._device):
            yield
        self._over = stream.record_event()


class _CudaGraph:
    def __init__(self, device: torch.device) -> None:
        self._device, self._graph = device, torch.cuda.CUDAGraph()

    def record(self, body: Callable[[], list[Tensor]]) -> list[Tensor]:
        """Run a body on a stream of its own, then record it."""
        now, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(now)
        with torch.cuda.stream(aside):
            for _ in range(_WARM_UPS):
                body()
        now.wait_stream(aside)
        with torch.cuda.graph(self._graph, capture_error_mode="thread_local"):
            outputs = body()
        self._graph.replay()
        return outputs

    def replay(self) -> None:
        """Do what was recorded."""
        self._graph.replay()


class _Recorded:
    """A piece on tensors that stay where they are."""

    def __init__(
        self, run: Callable[..., list[Tensor]], given: list[Tensor], fixed: set[int], device: Device
    ) -> None:
        self._places = [i for i, t in enumerate(given) if id(t) not in fixed]
        moved = set(self._places)
        self._inputs = [t.clone() if i in moved else t for i, t in enumerate(given)]
        self._recorder = device.recorder()
        self._outputs = self._recorder.record(lambda: run(*self._inputs))
        fixed.update(map(id, self._outputs))

    def again(self, given: list[Tensor]) -> list[Tensor]:
        """Copy in what is new, and replay."""
        if self._places:
            own = [self._inputs[i] for i in self._places]
            torch._foreach_copy_(own, [given[i] for i in self._places])
        self._recorder.replay()
        return self._outputs


def recorded(
    graph: fx.Graph,
    forms: Mapping[fx.Node, Form],
    constants: Mapping[fx.Node, Tensor],
    inputs: Sequence[Tensor],
    device: Device | None = None,
) -> Callable[..., list[Tensor]]:
    """Record a graph.

    Parameters
    ----------
    graph : Graph
        Of ATen operations, without mutations, random numbers, or values that the host reads.
    forms : mapping
        What the tensors are like.
    constants : mapping
        The tensors that stand for nodes.
    inputs : sequence of Tensor
        Examples.
    device : Device, optional
        None: the CUDA device of the inputs.

    Returns
    -------
    run : callable
        ``run(*inputs) -> outputs``, which are tensors of their own at each call.

    Raises
    ------
    NoRecorder
        If it cannot be recorded.
    """
    where = Cuda(inputs) if device is None else device
    fixed = {id(t) for t in constants.values()}

    def call_of(piece: Piece, given: list[Tensor]) -> Boxed:
        run = runner(graph_of_piece(piece, constants), {})
        if is_alone(piece.nodes[0], WAITING):
            return lambda inputs: run(*inputs)
        return _Recorded(run, given, fixed, where).again

    try:
        replay = Pieces(graph, forms, constants, apart=WAITING).assembled(inputs, call_of)
    except RuntimeError as error:
        raise NoRecorder(f"it is refused: {str(error).splitlines()[0]}") from error
    one_at_a_time = threading.Lock()

    def run(*inputs: Tensor) -> list[Tensor]:
        with one_at_a_time, where.in_order():
            outputs = replay(*inputs)
            copies = [torch.empty_like(t) for t in outputs]
            torch._foreach_copy_(copies, outputs)
            return copies

    return run
