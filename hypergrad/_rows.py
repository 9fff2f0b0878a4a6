"""A product of one vector, formed of many: mapped, or one by one where it cannot be mapped."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

_CHUNK = 128


def by_rows(product: Callable[..., Any], *vectors: Tensor) -> Any:
    """The product for every row of some tensors, stacked along the first axis.

    A function of the caller's that leaves PyTorch, for NumPy or SciPy say, cannot be mapped by
    `torch.func.vmap`. It is then called once a row.

    Parameters
    ----------
    product : callable
        Of one row of each of `vectors`; it returns a tensor or a pytree of them.
    *vectors : Tensor
        Shape ``(rows, ...)``.

    Returns
    -------
    products : pytree of Tensor
        What `product` returns, with an axis of rows in front.
    """
    count = vectors[0].shape[0]
    try:
        return torch.func.vmap(product, chunk_size=_CHUNK if count else None)(*vectors)
    except Exception:  # the caller's; where it is at fault itself it raises again
        if not count:
            raise
    rows = [product(*row) for row in zip(*(v.unbind() for v in vectors), strict=True)]
    return pytree.tree_map(lambda *parts: torch.stack(parts), *rows)
