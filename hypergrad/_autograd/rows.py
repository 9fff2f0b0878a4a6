"""A product of one vector, formed of many: mapped, or one by one where it cannot be mapped."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._C import _functorch
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]

from .shared_factor import SharedFactor
from .torch_pytrees import pytree
from .transforms import transforms_active

_CHUNK = 128
_mapping: ContextVar[bool] = ContextVar("hypergrad_mapping_rows", default=False)


def by_rows(product: Callable[..., Any], *vectors: Tensor, matrices: bool = False) -> Any:
    """Form the product for every row of some tensors, stacked along the first axis.

    A function of the caller's that leaves PyTorch, for NumPy or SciPy say, cannot be mapped by
    `torch.func.vmap`. It is then called once a row, as is a product that `refuse_mapping`.

    Parameters
    ----------
    product : callable
        Of one row of each of `vectors`; it returns a tensor or a pytree of them.
    *vectors : Tensor
        Shape ``(rows, ...)``.
    matrices : bool
        Whether matrices are multiplied on the way, one of which is the same for all rows.

    Returns
    -------
    products : pytree of Tensor
        What `product` returns, with an axis of rows in front.
    """
    count = vectors[0].shape[0]
    before = _mapping.set(True)
    try:
        with SharedFactor() if matrices and not transforms_active() else nullcontext():
            if 0 < count <= _CHUNK:
                return _mapped(product, vectors, count)
            return torch.func.vmap(product, chunk_size=_CHUNK if count else None)(*vectors)
    except Exception:  # the caller's; where it is at fault itself it raises again
        if not count:
            raise
    finally:
        _mapping.reset(before)
    rows = [product(*row) for row in zip(*(v.unbind() for v in vectors), strict=True)]
    return pytree.tree_map(lambda *parts: torch.stack(parts), *rows)


def _mapped(product: Callable[..., Any], vectors: tuple[Tensor, ...], count: int) -> Any:
    """Do as `torch.func.vmap` does, without a walk over pytrees that takes as long as a product."""
    lazy_load_decompositions()
    level = _functorch._vmap_increment_nesting(count, "error")
    try:
        mapped = product(*(_functorch._add_batch_dim(v, 0, level) for v in vectors))
        return pytree.tree_map(lambda t: _functorch._remove_batch_dim(t, level, count, 0), mapped)
    finally:
        _functorch._vmap_decrement_nesting()


def refuse_mapping() -> None:
    """Have `by_rows` call the product that is being formed once a row.

    Raises
    ------
    NotImplementedError
        Inside `by_rows`, while it maps.
    """
    if _mapping.get():
        raise NotImplementedError("A product that PyTorch does not map, or maps wrongly.")
