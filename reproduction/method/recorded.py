"""CUDA graphs: the kernels of a meta-step, recorded once and launched as one from then on."""

from collections.abc import Callable
from typing import TypeAlias

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from reproduction.method.episodes import Episodes, Params

Found: TypeAlias = tuple[Params, dict[str, Tensor]]
MetaGradient: TypeAlias = Callable[[Params, Episodes], Found]
Recorder: TypeAlias = Callable[[Callable[[], Found]], tuple[Found, Callable[[], None]]]

WARM_UP_CALLS = 3
TOLERANCE = 1e-2  # between a replay and the same without: kernels add up in another order


class NotRecordable(RuntimeError):
    """A meta-step cannot be recorded, or its replay gives other numbers."""


def record_on_gpu(run: Callable[[], Found]) -> tuple[Found, Callable[[], None]]:
    """Record a function's kernels in a CUDA graph.

    Parameters
    ----------
    run
        Reads and writes tensors that stay where they are.

    Returns
    -------
    found
        What it returned: tensors that each replay writes anew.
    replay
        Launches the kernels again.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # what libraries set up at a first call is not recorded
        for _ in range(WARM_UP_CALLS):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    return found, graph.replay


class RecordedMetaGradient:
    """A meta-gradient whose kernels are recorded at the first call, and replayed at each.

    A meta-step is thousands of small kernels, which take a CPU longer to launch than a GPU to
    run. A record reads the batch from where the first one was put; what a function reads from the
    host, and looks at with the host, is frozen in it. So it is made with other tasks than those
    of the first call, and what a replay gives for these is compared with the function itself.

    Parameters
    ----------
    compute
        ``compute(params, episodes)``, without a look at values on the way.
    method
        The system, for messages.
    record
        What makes the record.
    """

    def __init__(
        self, compute: MetaGradient, method: str, record: Recorder = record_on_gpu
    ) -> None:
        self._compute, self._method, self._record = compute, method, record
        self._replay: Callable[[], None] | None = None
        self._given: list[Tensor] = []
        self._found: Found = {}, {}

    def __call__(self, params: Params, episodes: Episodes) -> Found:
        """Return gradient and measures, which the next call overwrites.

        Parameters
        ----------
        params, episodes
            As `compute` takes them, in the shapes of the first call.

        Returns
        -------
        gradient : Params
            As `compute` returns it.
        measures : dict of Tensor
            As `compute` returns them.

        Raises
        ------
        NotRecordable
            At the first call, if there is no record that gives the same numbers.
        ValueError
            Later on, if the batch is of another size.
        """
        given = [*params.values(), *episodes]
        if self._replay is None:
            self._make(params, episodes)
        elif [t.shape for t in given] != [t.shape for t in self._given]:
            raise ValueError("a recorded meta-gradient takes batches of one size alone")
        self._put(given)
        assert self._replay is not None
        self._replay()
        return self._found

    def _put(self, given: list[Tensor]) -> None:
        for own, tensor in zip(self._given, given, strict=True):
            own.copy_(tensor.detach())

    def _make(self, params: Params, episodes: Episodes) -> None:
        expected = pytree.tree_map(Tensor.clone, self._compute(params, episodes))
        own_params = {name: leaf.detach().clone() for name, leaf in params.items()}
        others = Episodes(*(-p if p.is_floating_point() else p.clone() for p in episodes))
        self._given = [*own_params.values(), *others]
        try:
            self._found, replay = self._record(lambda: self._compute(own_params, others))
        except RuntimeError as error:
            raise NotRecordable(
                f"--cuda-graphs: a meta-step of {self._method} cannot be recorded "
                f"({str(error).splitlines()[0]}): leave the flag out"
            ) from error
        self._put([*params.values(), *episodes])
        replay()
        apart = _distance(self._found[0], expected[0])
        if not apart <= TOLERANCE:
            raise NotRecordable(
                f"--cuda-graphs: a recorded meta-step of {self._method} gives another gradient "
                f"than the same without (relative difference {apart:.1e}): leave the flag out"
            )
        self._replay = replay


def _distance(found: Params, expected: Params) -> float:
    change, size = (
        torch.stack([torch.linalg.vector_norm(part) for part in parts]).norm()
        for parts in ([found[n] - expected[n] for n in expected], list(expected.values()))
    )
    return (change / size).item() if change > 0 else change.item()
