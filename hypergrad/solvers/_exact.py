"""A dense factorisation."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable

import torch
from torch import Tensor

from .._errors import UnsupportedOperation
from .._info import Status
from .._transforms import any_task, is_wrapped
from ._base import LinearSystem, Solution, Solver, finite, norm, tolerance

_SPECTRUM_BELOW = 128  # most unknowns where all eigenvalues cost next to nothing


@dataclasses.dataclass(frozen=True)
class Exact(Solver):
    """The matrix formed by n products, and one factorisation; for small systems.

    A regular matrix is factorised by LU. Where the factors say that it is singular to the
    precision of the dtype, a singular value decomposition gives the answer of minimum norm, and
    the status is ``SINGULAR`` if that answer does not solve the system.

    Parameters
    ----------
    damping : float
        The system solved is ``(A + damping I) x = b``.

    Raises
    ------
    UnsupportedOperation
        If the matrix does not fit into the free memory: the text says how much it needs.

    Examples
    --------
    >>> import torch, hypergrad
    >>> A = torch.tensor([[1.0, 1.0], [1.0, 1.0]], dtype=torch.float64)  # singular, consistent
    >>> x, info = hypergrad.Exact().solve(lambda v: A @ v, A.sum(dim=1))
    >>> torch.allclose(x, torch.ones(2, dtype=torch.float64))  # of minimum norm
    True
    """

    damping: float = 0.0

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        finite("damping", self.damping)

    def run(self, system: LinearSystem) -> Solution:
        """Form, factorise, solve, and measure the residual."""
        b = system.b
        n = b.shape[-1]
        scale = norm(b)
        present = (scale > 0) & torch.isfinite(scale)
        if system.looks and not any_task(present):
            return _without_system(b, scale)
        tasks = math.prod(b.shape[:-1])
        refuse_if_too_large(n, tasks // system.shared, b)
        assert system.dense is not None
        A = system.dense()
        if self.damping:
            A = A + self.damping * torch.eye(n, dtype=A.dtype, device=A.device)
        A = _batched_like(A, b, system.condition)
        unit = torch.where(present, scale, torch.ones_like(scale))[..., None]
        unit_b = b / unit
        x, regular, solve_transposed = _by_lu(A, unit_b)
        precision = system.layout.precision
        good_enough = max(tolerance(None, precision), 10 * n * torch.finfo(b.dtype).eps)
        sound = torch.isfinite(A).flatten(-2).all(dim=-1) & torch.isfinite(scale)
        if system.looks and any_task(sound & ~regular):
            finite_A = torch.isfinite(A).flatten(-2).all(dim=-1)[..., None, None]
            fallback = _of_minimum_norm(torch.where(finite_A, A, 0.0), unit_b)
            # Of minimum norm where that solves the system, else whatever comes closest.
            missed = norm(unit_b - _times(A, fallback))
            other = norm(unit_b - _times(A, x))
            worse = (missed > good_enough) & (other < missed)
            x = torch.where((regular | worse)[..., None], x, fallback)
        size = norm(unit_b - _times(A, x))
        solved = size <= good_enough
        # As close as the dtype can come to the answer of a matrix that is nearly singular.
        largest = A.abs().flatten(-2).amax(dim=-1)
        floor = 10 * n * torch.finfo(A.dtype).eps * largest * norm(x)
        near = regular & (size <= floor.clamp(max=30 * tolerance(None, precision)))
        status = torch.where(near, int(Status.STAGNATED), int(Status.SINGULAR))
        status = torch.where(solved, int(Status.CONVERGED), status)
        status = torch.where(sound, status, int(Status.NOT_FINITE))
        x = torch.where(sound[..., None], x * unit, torch.full_like(x, math.nan))
        absent = scale == 0
        status = torch.where(absent, int(Status.CONVERGED), status)
        inverse, newton, extent = _accuracy(system.condition, A, x, regular, solve_transposed)
        return Solution(
            x=torch.where(absent[..., None], torch.zeros_like(x), x),
            status=status,
            success=(status == Status.CONVERGED) | (status == Status.STAGNATED),
            iterations=torch.zeros_like(status),
            matvecs=n,
            residual_norm=torch.where(absent, torch.zeros_like(size), size),
            negative_curvature=torch.zeros_like(absent),
            method="Exact",
            spectrum=lambda: _extreme_eigenvalues(A, sound, known=system.symmetric is True),
            inverse=inverse,
            newton=newton,
            largest=extent,
        )


def _extreme_eigenvalues(A: Tensor, sound: Tensor, *, known: bool) -> Tensor:
    """The lowest and highest eigenvalue where A is known to be symmetric and small."""
    nan = A.new_full((*sound.shape, 2), math.nan)
    if not known or not 0 < A.shape[-1] <= _SPECTRUM_BELOW:
        return nan
    finite = torch.isfinite(A).flatten(-2).all(dim=-1)[..., None, None]
    values = torch.linalg.eigvalsh(torch.where(finite, A, torch.zeros_like(A)))
    return torch.where(
        sound[..., None], torch.stack([values[..., 0], values[..., -1]], dim=-1), nan
    )


def _accuracy(
    condition: Tensor | None,
    A: Tensor,
    x: Tensor,
    regular: Tensor,
    solve_transposed: Callable[[Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The last figures of a `Solution`, for a system whose transpose the condition belongs to."""
    if condition is None:
        return None, None, None
    size, nan = norm(x), torch.full_like(x[..., 0], math.nan)
    direction = x / torch.where(size > 0, size, torch.ones_like(size))[..., None]
    # One step of inverse iteration, from an answer in which the lowest modes are large.
    inverse = norm(solve_transposed(direction))
    newton = norm(solve_transposed(condition.expand_as(x)))
    extent = torch.linalg.matrix_norm(A).expand_as(size)
    return (
        torch.where(regular, inverse, nan),
        torch.where(regular, newton, nan),
        torch.where(regular, extent, nan),
    )


def _without_system(b: Tensor, scale: Tensor) -> Solution:
    """The answer where no task has a right-hand side: zeros, or NaN for a NaN."""
    zero = scale == 0
    nan = torch.full_like(scale, math.nan)
    return Solution(
        x=torch.where(zero[..., None], torch.zeros_like(b), torch.full_like(b, math.nan)),
        status=torch.where(zero, int(Status.CONVERGED), int(Status.NOT_FINITE)),
        success=zero,
        iterations=torch.zeros_like(zero, dtype=torch.int64),
        matvecs=0,
        residual_norm=torch.where(zero, torch.zeros_like(scale), nan),
        negative_curvature=torch.zeros_like(zero),
        method="Exact",
    )


def _batched_like(A: Tensor, *vectors: Tensor | None) -> Tensor:
    """The matrix, with a batch at every level of a nested vmap at which a vector has one."""
    # Where it has not, torch.linalg.lu_solve is wrong in PyTorch 2.13.
    for v in vectors:
        if v is not None and is_wrapped(v):
            A = A + torch.zeros_like(v)[..., None]
    return A


def _by_lu(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A solution by LU with one step of refinement, whether A is regular, and A^-T."""
    # Right-hand sides that share a matrix are columns of one system, not copies of the matrix.
    eps = torch.finfo(A.dtype).eps
    factors, pivots, _ = torch.linalg.lu_factor_ex(A)
    diagonal = factors.diagonal(dim1=-2, dim2=-1).abs()
    # Judged by the pivots alone a matrix may look regular; a huge answer gives it away.
    regular = diagonal.amin(dim=-1) > 10 * A.shape[-1] * eps * diagonal.amax(dim=-1)
    safe = torch.where(
        regular[..., None, None], factors, torch.eye(A.shape[-1], dtype=A.dtype, device=A.device)
    )

    def solved(columns: Tensor) -> Tensor:
        return torch.linalg.lu_solve(safe, pivots, columns)

    x = _by_columns(A, solved, b)
    x = x + _by_columns(A, solved, b - _times(A, x))
    largest = A.abs().flatten(-2).amax(dim=-1)

    def solve_transposed(v: Tensor) -> Tensor:
        return _by_columns(
            A, lambda columns: torch.linalg.lu_solve(safe, pivots, columns, adjoint=True), v
        )

    return x, regular & (norm(x) * largest * 10 * eps < 1), solve_transposed


def _by_columns(A: Tensor, apply: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
    """A linear function of columns ``(*tasks, n, k)``, of vectors that may share A."""
    if v.ndim < A.ndim:
        return apply(v[..., None])[..., 0]
    return apply(v.movedim(0, -1)).movedim(-1, 0)


def _times(A: Tensor, v: Tensor) -> Tensor:
    return _by_columns(A, A.__matmul__, v)


def _of_minimum_norm(A: Tensor, b: Tensor) -> Tensor:
    """The least-squares solution of minimum norm."""
    U, S, Vh = torch.linalg.svd(A)
    cut = A.shape[-1] * torch.finfo(A.dtype).eps * S.amax(dim=-1, keepdim=True)
    inverse = torch.where(cut < S, 1 / S.clamp(min=torch.finfo(S.dtype).tiny), 0.0)
    return _by_columns(A, lambda columns: Vh.mT @ (inverse[..., None] * (U.mT @ columns)), b)


def refuse_if_too_large(n: int, tasks: int, b: Tensor) -> None:
    """Raise before a matrix is formed that the memory cannot hold."""
    need, free = gib_needed(n, tasks, b), free_gib(b.device)
    if need > free:
        raise UnsupportedOperation(
            f"Exact would form {tasks} x {n} x {n} entries: about {need:.3g} GiB, and {free:.3g} "
            "GiB are free. Use CG(), or GMRES() where the matrix is not symmetric."
        )


def gib_needed(n: int, tasks: int, b: Tensor) -> float:
    """The memory that a factorisation takes, in GiB."""
    copies = 4  # the columns, the matrix, its factors, one temporary
    return copies * tasks * n * n * b.element_size() / 2**30


def free_gib(device: torch.device) -> float:
    """The memory that is free on a device, in GiB; infinite where it cannot be known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] / 2**30
    if device.type == "mps":
        return (torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()) / 2**30
    if device.type != "cpu":
        return math.inf
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) / 2**20
    except OSError:
        pass
    for pages in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):  # free, or where that is not known, all
        try:
            return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") / 2**30
        except (AttributeError, OSError, ValueError):
            continue
    return math.inf
