"""Units taken out of a matrix before its rank is judged: scales of rows and columns."""

from __future__ import annotations

import torch
from torch import Tensor

_PASSES = 8  # an imbalance of 2^k is 2^(k / 2^passes) after so many


def equilibrated(A: Tensor, *, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Scale a matrix so that rows and columns have largest entries near one.

    A matrix measured in other units comes out as the same matrix, so that pivots, singular values
    and lengths can be judged. The scales are powers of two: multiplying by them rounds nothing.

    Parameters
    ----------
    A : Tensor
        ``(*tasks, n, n)``.
    symmetric : bool
        Whether rows and columns get the same scales.

    Returns
    -------
    B : Tensor
        The scaled matrix.
    rows, columns : Tensor
        The scales ``(*tasks, n)``; one where a row or a column is zero.

    References
    ----------
    Ruiz, A scaling algorithm to equilibrate both rows and columns norms in matrices, 2001.
    """
    size = A.detach().abs()
    size = torch.where(torch.isfinite(size), size, 0.0)
    rows = columns = torch.zeros_like(size[..., 0])  # exponents
    log = torch.log2(size)  # -inf for zero
    for _ in range(_PASSES):
        scaled = log + rows[..., None] + columns[..., None, :]
        of_rows = _half(scaled.amax(dim=-1))
        of_columns = of_rows if symmetric else _half(scaled.amax(dim=-2))
        rows, columns = rows - of_rows, columns - of_columns
    rows, columns = torch.exp2(torch.round(rows)), torch.exp2(torch.round(columns))
    return rows[..., None] * A * columns[..., None, :], rows, columns


def _half(exponent: Tensor) -> Tensor:
    return torch.where(torch.isfinite(exponent), exponent / 2, 0.0)
