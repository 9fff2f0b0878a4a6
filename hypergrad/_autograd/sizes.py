"""The memory that a derivative takes, from the graph that it goes through."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor

from .trace import graph


def bytes_of_product(outputs: Iterable[Tensor | None]) -> int:
    """Add up all that a vector-Jacobian product of some outputs computes on its way.

    Parameters
    ----------
    outputs : iterable of Tensor or None
        What is differentiated.

    Returns
    -------
    size : int
        In bytes, for one vector: more than is held at any one time.
    """
    nodes = {node for part in outputs if part is not None for node in graph(part).nodes}
    return sum(
        math.prod(metadata.shape) * metadata.dtype.itemsize
        for node in nodes
        for metadata in getattr(node, "_input_metadata", ())
    )
