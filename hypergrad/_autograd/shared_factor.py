"""Products of matrices under a vmap in which one factor is the same for all rows."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .trace import graph

_PRODUCTS = ("MmBackward", "AddmmBackward", "LinearBackward")


class SharedFactor(TorchDispatchMode):
    """Forms products with a shared factor as one, where `torch.func.vmap` would form one a row.

    PyTorch repeats a factor that is not mapped and multiplies row by row, which takes many times
    as long for matrices with few columns.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Rewrite a batched product whose left or right factor is repeated."""
        if func is torch.ops.aten.bmm.default:
            left, right = args
            if _repeated(left):
                rows, columns = left.shape[1], right.shape[2]
                wide = right.transpose(0, 1).reshape(right.shape[1], -1)
                return (left[0] @ wide).reshape(rows, -1, columns).transpose(0, 1)
            if _repeated(right):
                return (left.reshape(-1, left.shape[2]) @ right[0]).reshape(
                    *left.shape[:2], right.shape[2]
                )
        return func(*args, **(kwargs or {}))


def _repeated(factor: Tensor) -> bool:
    return factor.shape[0] > 1 and factor.stride(0) == 0


def multiplies_matrices(outputs: Iterable[Tensor | None]) -> bool:
    """Say whether a derivative of these outputs multiplies matrices, on the CPU."""
    return any(
        node.name().startswith(_PRODUCTS)
        for part in outputs
        if part is not None and part.device.type == "cpu"
        for node in graph(part).nodes
    )
