"""Long vectors: which are changed in place, and which are looked at piece by piece."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from .._autograd.shards import cut, is_shards

_LONG = 10_000  # so many unknowns gain nothing by operations that are made together
_VAST = 1_000_000
_PIECE = 2**20


def is_long(v: Tensor) -> bool:
    """Say whether a vector is so long that those of an iteration are changed in place."""
    return v.shape[-1] > _LONG or is_shards(v)


def is_vast(v: Tensor) -> bool:
    """Say whether a vector is so long that no copy of it is made for a figure."""
    return v.shape[-1] > _VAST


def pieces(*vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Cut vast vectors of one shape into pieces; shorter ones are one piece, and so is a number."""
    n = max(v.shape[-1] for v in vectors)
    size = _PIECE if n > _VAST else max(n, 1)
    if any(map(is_shards, vectors)):  # as many in every process
        count = math.ceil(n / size)
        for number in range(count):
            yield tuple(cut(v, number, count) for v in vectors)
        return
    for start in range(0, max(n, 1), size):
        yield tuple(v if v.shape[-1] != n else v[..., start : start + size] for v in vectors)
