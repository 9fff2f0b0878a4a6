"""A dense factorisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

from .._errors import UnsupportedOperation
from .._info import Status
from .._transforms import any_task
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
        if not any_task(present):
            return _without_system(b, scale)
        tasks = math.prod(b.shape[:-1])
        refuse_if_too_large(n, tasks, b)
        assert system.dense is not None
        A = system.dense()
        if self.damping:
            A = A + self.damping * torch.eye(n, dtype=A.dtype, device=A.device)
        unit = torch.where(present, scale, torch.ones_like(scale))[..., None]
        unit_b = b / unit
        x, regular, solve_transposed = _by_lu(A, unit_b)
        good_enough = max(
            tolerance(None, system.layout.precision), 10 * n * torch.finfo(b.dtype).eps
        )
        sound = torch.isfinite(A).flatten(-2).all(dim=-1) & torch.isfinite(scale)
        if any_task(sound & ~regular):
            fallback = _of_minimum_norm(torch.where(sound[..., None, None], A, 0.0), unit_b)
            # Of minimum norm where that solves the system, else whatever comes closest.
            missed = norm(unit_b - (A @ fallback[..., None])[..., 0])
            other = norm(unit_b - (A @ x[..., None])[..., 0])
            worse = (missed > good_enough) & (other < missed)
            x = torch.where((regular | worse)[..., None], x, fallback)
        size = norm(unit_b - (A @ x[..., None])[..., 0])
        solved = size <= good_enough
        status = torch.where(solved, int(Status.CONVERGED), int(Status.SINGULAR))
        status = torch.where(sound, status, int(Status.NOT_FINITE))
        x = torch.where(sound[..., None], x * unit, torch.full_like(x, math.nan))
        absent = scale == 0
        status = torch.where(absent, int(Status.CONVERGED), status)
        return Solution(
            x=torch.where(absent[..., None], torch.zeros_like(x), x),
            status=status,
            success=status == Status.CONVERGED,
            iterations=torch.zeros_like(status),
            matvecs=n,
            residual_norm=torch.where(absent, torch.zeros_like(size), size),
            negative_curvature=torch.zeros_like(absent),
            eigenvalues=_extreme_eigenvalues(A, sound, known=system.symmetric is True),
            method="Exact",
            **_accuracy(system.condition, A, x, regular, solve_transposed),
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
) -> dict[str, Tensor]:
    """The figures for a system that came with a condition, whose own matrix is the transpose."""
    if condition is None:
        return {}
    size = norm(x)
    direction = x / torch.where(size > 0, size, torch.ones_like(size))[..., None]
    found = {
        # One step of inverse iteration, from an answer in which the lowest modes are large.
        "inverse": norm(solve_transposed(direction)),
        "newton": norm(solve_transposed(condition.expand_as(x))),
        "largest": torch.linalg.matrix_norm(A).expand_as(size),
    }
    return {k: torch.where(regular, v, torch.full_like(v, math.nan)) for k, v in found.items()}


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
        eigenvalues=b.new_full((*scale.shape, 2), math.nan),
        method="Exact",
    )


def _by_lu(A: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """A solution by LU with one step of refinement, whether A is regular, and A^-T."""
    eps = torch.finfo(A.dtype).eps
    factors, pivots, _ = torch.linalg.lu_factor_ex(A)
    diagonal = factors.diagonal(dim1=-2, dim2=-1).abs()
    # Judged by the pivots alone a matrix may look regular; a huge answer gives it away.
    regular = diagonal.amin(dim=-1) > 10 * A.shape[-1] * eps * diagonal.amax(dim=-1)
    safe = torch.where(regular[..., None, None], factors, torch.eye(A.shape[-1]).to(A))
    x = torch.linalg.lu_solve(safe, pivots, b[..., None])
    x = x + torch.linalg.lu_solve(safe, pivots, b[..., None] - A @ x)
    x = x[..., 0]
    largest = A.abs().flatten(-2).amax(dim=-1)

    def solve_transposed(v: Tensor) -> Tensor:
        return torch.linalg.lu_solve(safe, pivots, v[..., None], adjoint=True)[..., 0]

    return x, regular & (norm(x) * largest * 10 * eps < 1), solve_transposed


def _of_minimum_norm(A: Tensor, b: Tensor) -> Tensor:
    """The least-squares solution of minimum norm."""
    U, S, Vh = torch.linalg.svd(A)
    cut = A.shape[-1] * torch.finfo(A.dtype).eps * S.amax(dim=-1, keepdim=True)
    inverse = torch.where(cut < S, 1 / S.clamp(min=torch.finfo(S.dtype).tiny), 0.0)
    return (Vh.mT @ (inverse[..., None] * (U.mT @ b[..., None])))[..., 0]


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
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            for line in lines:
                if line.startswith("MemAvailable:"):
                    return int(line.split()[1]) / 2**20
    except OSError:
        pass
    return math.inf
