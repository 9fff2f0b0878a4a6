"""Watching a user's function while it is evaluated, for what would change the caller's state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from ._errors import UnsupportedOperation

_NORMS = frozenset({functional.batch_norm, functional.instance_norm})
_EMBEDDINGS = frozenset({functional.embedding, torch.embedding})
_WATCHED = frozenset({torch.Tensor.add_, *_NORMS, *_EMBEDDINGS})
_RUNNING = (
    "A loss runs a batch-norm layer in train mode with running statistics, which would be changed "
    "by evaluating it. Call module.eval(), or build the layer with track_running_stats=False "
    "(batch statistics alone), or use GroupNorm."
)


class Guard(TorchFunctionMode):
    """Refuses norm layers that would update their running statistics.

    The counter of batches, which such a layer moves on first, is put back.
    """

    def __init__(self) -> None:
        super().__init__()
        self._counters: list[Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every other operation on, with as little in between as may be."""
        kwargs = kwargs or {}
        if func in _WATCHED:
            if func in _EMBEDDINGS:
                args, kwargs = _densely(func, args, kwargs)
            elif func in _NORMS:
                self._refuse_updates(func, args, kwargs)
            elif _is_counter(args[0]):
                return self._counted(func, args, kwargs)
        return func(*args, **kwargs)

    def _refuse_updates(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if _updates_statistics(func, args, kwargs):
            for counter in self._counters:
                counter.sub_(1)
            raise UnsupportedOperation(_RUNNING)

    def _counted(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        try:
            found = func(*args, **kwargs)
        except RuntimeError as error:
            if "mutate a captured Tensor" in str(error):  # inside a function transform
                raise UnsupportedOperation(_RUNNING) from error
            raise
        self._counters.append(args[0])
        return found


def _densely(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """An embedding's arguments without the sparse gradient, from which no product is formed."""
    names: tuple[str, ...] = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    if func is functional.embedding:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", *names[3:])
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not given.get("sparse"):
        return args, kwargs
    return (), {**given, "sparse": False}


def _is_counter(tensor: Any) -> bool:
    return isinstance(tensor, Tensor) and tensor.ndim == 0 and tensor.dtype == torch.int64


def _updates_statistics(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    training = "training" if func is functional.batch_norm else "use_input_stats"
    default = func is not functional.batch_norm
    names = ("input", "running_mean", "running_var", "weight", "bias", training)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get(training, default)) and given.get("running_mean") is not None
