"""A dense matrix factorised in units of its own: its rank, sign and inverse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task, every_task
from .._autograd.shards import is_shards, numbers_of
from .._autograd.transforms import is_wrapped
from ._equilibration import equilibrated

# Pivots and singular values below so many roundings of the largest are zero. No bound grows with
# n: that of a backward error does so in theory alone.
_AT_ONCE = 2**20  # numbers in general position
_ZERO = 30
# So many roundings below zero an eigenvalue is negative.
_NEGATIVE = 100
# Rows that are so many roundings of the largest, or smaller, may be what cancelled terms left.
_SUSPECT = 1e3
_REPEATS = 1e-3  # ... and are, where they do not come out again to this


class Factorisation:
    """``A x = b`` for a matrix ``(*tasks, n, n)`` and vectors ``(*shared, *tasks, n)``.

    Everything is judged in the equilibrated matrix, so that no verdict depends on the units of a
    variable or an equation.

    Parameters
    ----------
    A : Tensor
        The matrix, finite.
    symmetric : bool
        Whether it is known to be symmetric.
    looks : bool
        Whether the host may look at values: a matrix that lacks rank needs it.
    noise : Tensor or float
        The relative error of the matrix beside rounding, below which nothing is negative.

    Attributes
    ----------
    regular : Tensor
        bool, for each task: the matrix has full rank to the precision of the dtype.
    negative : Tensor
        bool: it has a negative eigenvalue; false where it is not known to be symmetric.
    rows, columns : Tensor
        The scales ``(*tasks, n)`` of the equilibrated matrix ``B = rows * A * columns``.
    """

    def __init__(
        self, A: Tensor, *, symmetric: bool, looks: bool, noise: Tensor | float = 0.0
    ) -> None:
        self._noise = noise
        self._A = (A + A.mT) / 2 if symmetric else A
        self._B, self.rows, self.columns = equilibrated(self._A, symmetric=symmetric)
        self._looks = looks
        self._eps = torch.finfo(A.dtype).eps
        self._svd: tuple[Tensor, Tensor, Tensor] | None = None
        tasks = A.shape[:-2]
        self.negative = torch.zeros(tasks, dtype=torch.bool, device=A.device)
        self._lower: Tensor | None = None
        if symmetric:
            lower, failed = torch.linalg.cholesky_ex(self._B)
            self.negative = (failed != 0) & self._indefinite()
            if looks and every_task(failed == 0) and not is_wrapped(A):
                self._lower = lower
        if self._lower is None:
            self._factors, self._pivots, _ = torch.linalg.lu_factor_ex(self._B)
            pivots = self._factors.diagonal(dim1=-2, dim2=-1).abs()
        else:
            pivots = self._lower.diagonal(dim1=-2, dim2=-1).square()
        self.regular = pivots.amin(dim=-1) > _ZERO * self._eps * pivots.amax(dim=-1)
        if self._lower is None:
            unit = torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
            self._factors = torch.where(self.regular[..., None, None], self._factors, unit)

    def _indefinite(self) -> Tensor:
        """Say whether the matrix stays indefinite when it is moved up by more than rounding."""
        shift = torch.eye(self._B.shape[-1], dtype=self._B.dtype, device=self._B.device)
        least: Any = _NEGATIVE * self._eps
        if isinstance(self._noise, Tensor):
            least = (2 * self._noise).clamp(min=least)[..., None, None]
        return torch.linalg.cholesky_ex(self._B + least * shift)[1] != 0

    def solve(self, b: Tensor) -> Tensor:
        """Solve, and refine once; where A lacks rank, by the least-squares answer of least norm.

        Parameters
        ----------
        b : Tensor
            Right-hand sides.

        Returns
        -------
        x : Tensor
            The answers.
        """
        x = self._once(b)
        x = x + self._once(b - times(self._A, x))
        # Judged by pivots alone a matrix may look regular; a huge answer gives it away.
        y, c = x / self.columns, self.rows * b
        size = torch.linalg.vector_norm(c, torch.inf, dim=-1)
        huge = torch.linalg.vector_norm(y, torch.inf, dim=-1) * 10 * self._eps >= size
        huge = huge & (size > 0)
        while huge.ndim > self.regular.ndim:
            huge = huge.any(dim=0)
        self.regular = self.regular & ~huge
        if not self._looks or not any_task(~self.regular):
            return x
        least = self._of_least_norm(b)
        # Where that does not solve the system either, whatever comes closest to the caller's b.
        missed = torch.linalg.vector_norm(self.rows * (b - times(self._A, least)), dim=-1)
        closest = self._of_least_squares(b)
        least = torch.where((missed > self._eps**0.5 * size)[..., None], closest, least)
        return torch.where(self.regular[..., None], x, least)

    def further(self, b: Tensor, *, transposed: bool = False) -> Tensor:
        """Solve for another right-hand side, or with the transpose: in one go, unrefined."""
        x = self._once(b, transposed=transposed)
        if not self._looks or every_task(self.regular):
            return x
        least = self._of_least_norm(b, transposed=transposed)
        return torch.where(self.regular[..., None], x, least)

    def null(self) -> Tensor | None:
        """Find a vector ``(*tasks, n)`` in general position in the null space; zero for full rank.

        Returns
        -------
        vector : Tensor or None
            None where every task has full rank, as far as the host may know.
        """
        if not self._looks or not any_task(~self.regular):
            return None
        _, S, Vh = self._singular_values()
        missing = (~self._kept(S)).to(S.dtype) * signs(S)
        vector = self.columns * (Vh.mT @ missing[..., None])[..., 0]
        return torch.where(self.regular[..., None], 0.0, vector)

    def _once(self, b: Tensor, *, transposed: bool = False) -> Tensor:
        rows, columns = (self.columns, self.rows) if transposed else (self.rows, self.columns)

        def apply(v: Tensor) -> Tensor:
            if self._lower is not None:
                return torch.cholesky_solve(v, self._lower)
            return torch.linalg.lu_solve(self._factors, self._pivots, v, adjoint=transposed)

        return columns * by_columns(self._B, apply, rows * b)

    def _singular_values(self) -> tuple[Tensor, Tensor, Tensor]:
        if self._svd is None:
            self._svd = torch.linalg.svd(self._B)
        return self._svd

    def _kept(self, S: Tensor) -> Tensor:
        return _ZERO * self._eps * S.amax(dim=-1, keepdim=True) < S

    def _of_least_norm(self, b: Tensor, *, transposed: bool = False) -> Tensor:
        """Find the least-squares answer in the units of B, of least norm in those of the caller."""
        U, S, Vh = self._singular_values()
        left, right = (Vh.mT, U) if transposed else (U, Vh.mT)
        rows, columns = (self.columns, self.rows) if transposed else (self.rows, self.columns)
        kept = self._kept(S)
        inverse = torch.where(kept, 1 / torch.where(kept, S, 1.0), 0.0)
        x = by_columns(self._B, lambda v: right @ (inverse[..., None] * (left.mT @ v)), rows * b)
        x = columns * x
        free = columns[..., None] * right
        free = free / torch.linalg.vector_norm(free, dim=-2, keepdim=True)
        free = free * (~kept)[..., None, :]
        return x - times(free @ torch.linalg.pinv(free), x)

    def _of_least_squares(self, b: Tensor) -> Tensor:
        """Find the least-squares answer in the caller's units, of the rank that B has."""
        rank = self._kept(self._singular_values()[1]).sum(dim=-1, keepdim=True)
        U, S, Vh = torch.linalg.svd(self._A)
        kept = torch.arange(S.shape[-1], device=S.device) < rank
        inverse = torch.where(kept & (S > 0), 1 / torch.where(S > 0, S, 1.0), 0.0)
        return by_columns(self._A, lambda v: Vh.mT @ (inverse[..., None] * (U.mT @ v)), b)


def without_noise(
    A: Tensor, product: Callable[[Tensor], Tensor], *, symmetric: bool, looks: bool
) -> Tensor:
    """Free a matrix from the rows and columns that are the rounding of cancelled terms.

    Such a row would become as large as the others in an equilibrated matrix. It does not come out
    again where the same product is formed with other digits.

    Parameters
    ----------
    A : Tensor
        ``(*tasks, n, n)``, made by products with unit vectors.
    product : callable
        ``v -> A v``.
    symmetric : bool
        Whether A is known to be symmetric.
    looks : bool
        Whether the host may look at values.

    Returns
    -------
    matrix : Tensor
        With zeros in place of noise.
    """
    size = A.abs()
    rows, columns = size.amax(dim=-1), size.amax(dim=-2)
    least = _SUSPECT * torch.finfo(A.dtype).eps * rows.amax(dim=-1, keepdim=True)
    small_rows, small_columns = (rows <= least) & (rows > 0), (columns <= least) & (columns > 0)
    if not looks or not any_task((small_rows | small_columns).any(dim=-1)):
        return A
    scale = torch.where(columns > 0, columns, 1.0).rsqrt()

    def missed(among: Tensor) -> tuple[Tensor, Tensor]:
        v = torch.where(among, scale * signs(scale), 0.0)
        v = v / v.abs().amax(dim=-1, keepdim=True).clamp(min=torch.finfo(A.dtype).tiny)
        terms = size * v.abs()[..., None, :]
        return (product(v) - times(A, v)).abs() > _REPEATS * terms.sum(dim=-1), terms

    again, terms = missed(small_columns)
    leading = terms > terms.sum(dim=-1, keepdim=True) / 2
    noise = ((leading & again[..., None]).any(dim=-2) & small_columns)[..., None, :]
    if symmetric:
        noise = noise | noise.mT
    else:
        noise = noise | (missed(torch.ones_like(small_rows))[0] & small_rows)[..., None]
    return torch.where(noise, 0.0, A)


def signs(like: Tensor) -> Tensor:
    """Make fixed numbers from 0.5 to 1.5 of either sign with all digits in use, one an entry."""
    n, parts = like.shape[-1], []
    if is_shards(like):
        return numbers_of(like, lambda numbers: _signs(numbers, like.dtype))
    for start in range(0, max(n, 1), _AT_ONCE):  # the whole numbers take twice the memory
        stop = min(start + _AT_ONCE, n)
        parts.append(_signs(torch.arange(start, stop, device=like.device), like.dtype))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _signs(numbers: Tensor, dtype: torch.dtype) -> Tensor:
    # A multiplicative hash, so that the caller's random numbers stay as they are.
    number = (numbers + 1) * 2654435761
    size = 0.5 + (number % 2**24).to(dtype) / 2**24
    return torch.where((number >> 27) % 2 == 0, size, -size)


def by_columns(A: Tensor, apply: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """Apply a linear function of columns ``(*tasks, n, k)``, of vectors that may share A."""
    if v.ndim < A.ndim:
        return apply(v[..., None])[..., 0]
    return apply(v.movedim(0, -1)).movedim(-1, 0)


def times(A: Tensor, v: Tensor) -> Tensor:
    """Form ``A v``, for vectors that may share A."""
    return by_columns(A, A.__matmul__, v)
