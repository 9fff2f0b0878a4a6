"""Peak memory: the bytes of all tensors that are live at once, saved ones included."""

import gc
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def peak_bytes(function: Callable[[], object]) -> int:
    """Return the most bytes live at once during a call, beyond those live before it.

    Every operation that reaches torch's dispatcher is seen, those of a backward pass too, and each
    storage that one returns counts until it is freed. What a kernel needs for itself does not.
    Garbage in cycles counts as live: when Python's collector frees it depends on everything that
    the process did before, and the figure is to depend on the function alone.

    Parameters
    ----------
    function
        What is called.

    Returns
    -------
    int
        The peak.
    """
    with _without_collector(), _LiveStorages() as live:
        function()
    return live.peak


@contextmanager
def _without_collector() -> Iterator[None]:
    """Collect the garbage of before, and none inside."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class _LiveStorages(TorchDispatchMode):
    """Follows each new storage from the operation that made it to its end."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        self._live = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        self._note((args, kwargs), new=False)  # an output may be a view of what was there before
        outputs = func(*args, **(kwargs or {}))
        self._note(outputs, new=True)
        return outputs

    def _note(self, tensors: Any, *, new: bool) -> None:
        for leaf in tree_leaves(tensors):
            if not isinstance(leaf, Tensor):
                continue
            storage: torch.UntypedStorage = leaf.untyped_storage()
            key = storage._cdata
            if key not in self._known:
                self._known.add(key)
                size = storage.nbytes() if new else 0
                self._live += size
                self.peak = max(self.peak, self._live)
                weakref.finalize(storage, self._release, key, size)

    def _release(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._live -= size
