"""A dense factorisation."""

from __future__ import annotations

import dataclasses
import math
import os
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._autograd.transforms import is_wrapped
from .._errors import UnsupportedOperation
from .._info import Status
from ._base import Solver
from ._factorisation import Factorisation, signs, times, without_noise
from ._fields import finite, tolerance
from ._ritz import outermost
from ._system import LinearSystem, NewtonStep, Solution, Units, graded
from ._vectors import norm

_TYPICAL = 0.1  # rounding errors that add up, over what they might come to
_SPECTRUM_BELOW = 128  # most unknowns where all eigenvalues cost next to nothing


@dataclasses.dataclass(frozen=True)
class Exact(Solver):
    """The matrix formed by n products, and one factorisation; for small systems.

    Rows and columns are scaled to one size first, so that no verdict depends on the units of a
    variable. A symmetric positive definite matrix is factorised by Cholesky, any other by LU.
    Where the factors say that it is singular to the precision of the dtype, a singular value
    decomposition gives the answer of minimum norm, and the status is ``SINGULAR`` if that answer
    does not solve the system. A matrix that is known to be symmetric and has a negative eigenvalue
    is solved, and ``info.negative_curvature`` says so.

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
        units, n = Units(system.b), system.b.shape[-1]
        if system.looks and not any_task(units.present):
            nothing = torch.zeros_like(units.present, dtype=torch.int64)
            x, status, size = units.settled(system.b, nothing, units.scale)
            return Solution(x, status, residual_norm=size, method="Exact")
        A, symmetric = self._matrix(system), system.symmetric is True
        finite_A = torch.isfinite(A).flatten(-2).all(dim=-1)
        safe_A = torch.where(finite_A[..., None, None], A, 0.0)
        b = torch.where(units.present[..., None], units.b, 0.0)
        factors = Factorisation(safe_A, symmetric=symmetric, looks=system.looks, noise=system.noise)
        x = factors.solve(b)
        residual = b - times(safe_A, x)
        # In the units of the equilibrated matrix, so that it is the same in all units.
        missed, size, length = (
            torch.linalg.vector_norm(v, dim=-1)
            for v in (factors.rows * residual, factors.rows * b, x / factors.columns)
        )
        tol, eps = tolerance(None, system.layout.precision), torch.finfo(b.dtype).eps
        # As close as the dtype can come to the answer of a matrix that is nearly singular.
        near = factors.regular & (missed <= (100 * eps * length).minimum(30 * tol * size))
        ends = {Status.STAGNATED: near, Status.CONVERGED: missed <= tol * size}
        status = graded({**ends, Status.NOT_FINITE: ~finite_A}, Status.SINGULAR)
        sound = finite_A & torch.isfinite(units.scale)
        x, status, size = units.settled(x * units.unit, status, norm(residual))
        return Solution(
            x=x,
            status=status,
            success=(status == Status.CONVERGED) | (status == Status.STAGNATED),
            matvecs=n,
            residual_norm=size,
            negative_curvature=factors.negative.expand_as(status),
            method="Exact",
            spectrum=lambda: _extreme_eigenvalues(A, sound, known=symmetric),
            null=factors.null(),
            **_accuracy(system, factors, A, x),
        )

    def _matrix(self, system: LinearSystem) -> Tensor:
        """Form the matrix, if the memory holds it."""
        b, n, looks = system.b, system.b.shape[-1], system.looks
        refuse_if_too_large(n, math.prod(b.shape[:-1]) // system.shared, b)
        assert system.dense is not None
        symmetric = system.symmetric is True
        A = without_noise(system.dense(), system.matvec, symmetric=symmetric, looks=looks)
        if self.damping:
            A = A + self.damping * torch.eye(n, dtype=A.dtype, device=A.device)
        return _batched_like(A, b, system.condition)


def _accuracy(system: LinearSystem, factors: Factorisation, A: Tensor, x: Tensor) -> dict[str, Any]:
    """Say what the factors show beside the answer, by three more solves: a Solution's fields."""
    if system.condition is None:
        return {}
    eps = torch.finfo(system.layout.precision).eps
    residual = system.b - times(A, x)
    terms = times(A.abs(), x.abs()) + system.b.abs()
    # The error that is left, and that of an answer to entries that are rounded themselves.
    left = factors.further(residual)
    rounding = factors.further(eps * _TYPICAL * signs(terms) * terms)
    size = torch.linalg.vector_norm(x / factors.columns, dim=-1)
    error = sum(torch.linalg.vector_norm(e / factors.columns, dim=-1) for e in (left, rounding))
    error = torch.where(size > 0, error / size, 0.0)
    symmetric = system.symmetric is True
    turned = system.transposed and not symmetric
    again = partial(factors.further, transposed=turned)
    step = again(system.condition)
    none = torch.zeros_like(step)
    return {
        "linear_error": error,
        "newton": NewtonStep(step, none, none[..., 0], again),
        "metric": 1 / (factors.rows if turned else factors.columns),
        "further": factors.further,
    }


def _extreme_eigenvalues(A: Tensor, sound: Tensor, *, known: bool) -> Tensor:
    """Find the lowest and highest eigenvalue where A is known to be symmetric and small."""
    nan = A.new_full((*sound.shape, 2), math.nan)
    if not known or not 0 < A.shape[-1] <= _SPECTRUM_BELOW:
        return nan
    finite = torch.isfinite(A).flatten(-2).all(dim=-1)[..., None, None]
    values = torch.linalg.eigvalsh(torch.where(finite, A, 0.0))
    return torch.where(sound[..., None], outermost(values), nan)


def _batched_like(A: Tensor, *vectors: Tensor | None) -> Tensor:
    """Give the matrix a batch at every level of a nested vmap at which a vector has one."""
    # Where it has not, torch.linalg.lu_solve is wrong in PyTorch 2.13.
    for v in vectors:
        if v is not None and is_wrapped(v):
            A = A + torch.zeros_like(v)[..., None]
    return A


def refuse_if_too_large(n: int, tasks: int, b: Tensor) -> None:
    """Raise before a matrix is formed that the memory cannot hold."""
    need, free = gib_needed(n, tasks, b), free_gib(b.device)
    if need > free:
        raise UnsupportedOperation(
            f"Exact would form {tasks} x {n} x {n} entries: about {need:.3g} GiB, and {free:.3g} "
            "GiB are free. Use CG(), or GMRES() where the matrix is not symmetric."
        )


def gib_needed(n: int, tasks: int, b: Tensor) -> float:
    """Say how much memory a factorisation takes, in GiB."""
    copies = 4  # the columns, the matrix, its factors, one temporary
    return copies * tasks * n * n * b.element_size() / 2**30


def free_gib(device: torch.device) -> float:
    """Say how much memory is free on a device, in GiB; infinite where it cannot be known."""
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
