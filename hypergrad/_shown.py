"""Pytrees and records as text: shapes in place of tensors."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_MOST = 2  # leaves of a pytree that are shown one by one


def shown(value: Any) -> str:
    """Write a number, or a pytree with shapes in place of its tensors."""
    if isinstance(value, Tensor):
        if value.ndim == 0 and value.device.type != "meta" and not _wrapped(value):
            number = value.item()
            return f"{number:.4g}" if isinstance(number, float) else str(number)
        return _shape(value)
    leaves, spec = pytree.tree_flatten(value)
    if sum(isinstance(leaf, Tensor) for leaf in leaves) > _MOST:
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        entries = sum(t.numel() for t in tensors)
        return f"<{len(tensors)} tensors of {entries} entries>"
    return repr(pytree.tree_unflatten([_Leaf(leaf) for leaf in leaves], spec))


def fields_of(record: Any) -> str:
    """Write the ``repr`` of a dataclass."""
    fields = [f"{f.name}={_field(getattr(record, f.name))}" for f in dataclasses.fields(record)]
    return f"{type(record).__name__}({', '.join(fields)})"


def _field(value: Any) -> str:
    plain = isinstance(value, str | int | float | dict | type(None))
    tensors = any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value))
    if dataclasses.is_dataclass(value) or (plain and not tensors):
        return repr(value)
    return shown(value)


def _shape(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"


def _wrapped(tensor: Tensor) -> bool:
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


class _Leaf:
    """A leaf of a pytree, whose repr is its shape."""

    def __init__(self, leaf: Any) -> None:
        self._text = _shape(leaf) if isinstance(leaf, Tensor) else repr(leaf)

    def __repr__(self) -> str:
        return self._text
