"""Conjugate gradients for many right-hand sides that share a matrix, in one block."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from .._autograd.transforms import transforms_active
from .._info import Status
from ._krylov import Correction, Pass, curves_down
from ._observer import Observer
from ._ritz import widest
from ._system import graded
from ._vectors import norm

# A direction that makes up less than this part of what each right-hand side may be left with is
# let go: the block shrinks as combinations of its right-hand sides are solved.
_LET_GO = 0.1
_DEPENDENT = 10  # roundings by which dependent right-hand sides differ
_LARGEST = 256  # rows of the matrix that Ritz values are taken of; above it, of its blocks


def shares(start: Pass) -> bool:
    """Say whether all tasks of a pass have one matrix, so that they can be solved together."""
    # The size of the block depends on the values; products with errors of their own spoil it.
    plain = start.looks and not isinstance(start.noise, Tensor) and not transforms_active()
    return plain and start.shared > 1 and start.r.ndim == 2


def in_a_block(start: Pass, alone: Callable[[Pass], Correction]) -> Correction:
    """Correct all answers together, over the sum of their Krylov spaces.

    The residuals are ``R = Q C`` with orthonormal Q (here the right-hand sides are rows, and so is
    Q), so that equal, dependent and zero right-hand sides, and combinations of them that are
    solved, leave the block in place of making it singular. Where the matrix turns out not to be
    positive definite, each right-hand side goes on by itself.

    Parameters
    ----------
    start : Pass
        The pass, of vectors ``(k, n)``.
    alone : callable
        The same pass with each right-hand side by itself.

    Returns
    -------
    correction : Correction
        The outcome, for each of the k.

    References
    ----------
    O'Leary, The block conjugate gradient algorithm and related methods, 1980; Dubrulle, Retooling
    the method of block conjugate gradients, 2001, algorithm BCGrQ; Ji and Li, A breakdown-free
    block conjugate gradient method, 2017, algorithm 2, for blocks that lose rank.
    """
    run = _Block(start)
    while run.goes_on():
        run.step()
    return run.ended(alone)


class _Block:
    """The iteration; the names are those of Dubrulle (2001), with vectors in rows.

    Matrices of the size of the block are kept on the host, in float64.
    """

    def __init__(self, start: Pass) -> None:
        self.start, self.steps = start, 0
        r = torch.where(start.active[:, None], start.r, 0.0)
        self.x = torch.zeros_like(r)
        self.tol = _small(torch.where(start.active, start.tol, math.inf))
        self.sizes = _small(norm(r))
        least = _DEPENDENT * torch.finfo(r.dtype).eps * self.sizes
        least = torch.maximum(_LET_GO * self.tol, least)
        self.weight = torch.where(least > 0, 1 / least, 0.0)
        self.lost = torch.zeros_like(self.sizes)  # what was let go of each residual, at most
        self.iterations = torch.zeros_like(self.sizes, dtype=torch.int64)
        self.active = self.sizes > self.tol
        self.broken = not bool(torch.isfinite(self.sizes).all())
        self.negative, self.largest = False, 0.0
        self.pivots: list[Tensor] = []  # S A S^T of each step ...
        self.zetas: list[Tensor] = []  # ... and what leads from it to the next
        self.observer = None if start.condition is None else _Observer(start.condition, r)
        self.Q, self.C = r, torch.eye(len(r), dtype=torch.float64)
        self.S = r
        if not self.broken:
            self.S, _ = self._orthonormal(r)

    def goes_on(self) -> bool:
        """Count a step, if another one is made."""
        if self.steps and self.start.watch is not None:
            self.start.watch.tell(self.sizes)
        on = not self.broken and len(self.Q) > 0 and self.steps < self.start.limit
        on = on and bool(self.active.any())
        self.steps += on
        return on

    def step(self) -> None:
        """Make one step of BCGrQ, with the directions that are left."""
        T = self.start.matvec(self.S)
        M = _small(self.S @ T.mT)
        M = (M + M.mT) / 2
        if not self._is_definite(M, T):
            self.broken = True
            return
        xi = torch.cholesky_inverse(torch.linalg.cholesky(M))
        if self.observer is not None:
            self.observer.along_all(self.S, T, self._large(xi))
        self.x = torch.addmm(self.x, self._large((xi @ self.C).mT), self.S)
        self.iterations += self.active
        Z, zeta = self._orthonormal(torch.addmm(self.Q, self._large(xi), T, alpha=-1))
        self.zetas.append(zeta)
        self.S = torch.addmm(Z, self._large(zeta), self.S)
        if self.observer is not None and self.observer.is_due():
            active = self.active.to(self.x.device)
            self.observer.keep(self.x, self._large(self.sizes), active)

    def _is_definite(self, M: Tensor, T: Tensor) -> bool:
        """Say whether the curvature is positive along all combinations of the directions."""
        if not bool(torch.isfinite(M).all()):
            return False
        self.pivots.append(M)
        curvature = M.diagonal() / _small(torch.linalg.vecdot(self.S, self.S))
        self.largest = max(self.largest, float(curvature.abs().max()))
        size = M.diagonal().abs().clamp(min=torch.finfo(M.dtype).tiny).rsqrt()
        scaled = size[:, None] * M * size
        if _exceeds(scaled, len(M) * self.start.flat):
            return True
        lowest = self._large(torch.linalg.eigh(scaled).eigenvectors[:, 0] * size)
        self.negative = bool(curves_down(lowest @ self.S, lowest @ T))
        return False

    def _orthonormal(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Take ``W = zeta^T Q`` apart, without the directions that no residual needs any more.

        With a preconditioner P the rows of Q are orthonormal in its inner product.

        Returns
        -------
        Z, zeta : Tensor
            P Q, and the factor.
        """
        basis, factor = torch.linalg.qr(W.mT)
        self.Q, zeta = basis.mT, _small(factor)
        self.C = zeta @ self.C
        if not bool(torch.isfinite(self.C).all()):
            self.broken = True
            return self.Q, zeta
        weighted = self.C * self.weight
        if not len(zeta) or not _exceeds(weighted @ weighted.mT, 1.0):
            U, size, _ = torch.linalg.svd(weighted, full_matrices=False)
            self.lost += torch.linalg.vector_norm(U[:, size <= 1].mT @ self.C, dim=0)
            turn = U[:, size > 1].mT
            self.Q, zeta, self.C = self._large(turn) @ self.Q, turn @ zeta, turn @ self.C
        self.sizes = torch.linalg.vector_norm(self.C, dim=0)
        self.active = self.sizes + self.lost > self.tol
        if self.start.precondition is None or not len(self.Q):
            return self.Q, zeta
        return self._preconditioned(zeta)

    def _preconditioned(self, zeta: Tensor) -> tuple[Tensor, Tensor]:
        """Make Q orthonormal in the inner product of the preconditioner."""
        Z = self.start.preconditioned(self.Q)
        gram = _small(self.Q @ Z.mT)
        L, failed = torch.linalg.cholesky_ex((gram + gram.mT) / 2)
        if bool(failed) or not bool(torch.isfinite(L).all()):
            self.broken = True
            return Z, zeta
        inverse = self._large(torch.linalg.inv(L))
        self.Q, self.C = inverse @ self.Q, L.mT @ self.C
        return inverse @ Z, L.mT @ zeta

    def ended(self, alone: Callable[[Pass], Correction]) -> Correction:
        """Say how each right-hand side ended; those that a breakdown has left go on alone."""
        active, left = self.active.to(self.x.device), self.start.limit - self.steps
        ran_out = active & (left <= 0) if len(self.Q) else torch.zeros_like(active)
        part = Correction(
            x=self.x,
            status=graded({Status.MAX_ITERATIONS: ran_out}),
            iterations=self.iterations.to(active.device),
            steps=self.steps,
            negative=torch.full_like(active, self.negative),
            largest=torch.full_like(self.start.tol, self.largest),
            ritz=partial(_ritz, self.pivots, self.zetas, self.x) if self.pivots else None,
            observer=self.observer,
            spanned=sum(map(len, self.pivots)) >= self.x.shape[-1],
        )
        if not self.broken or left <= 0 or not bool(self.active.any()):
            return part
        r = torch.where(active[:, None], self._large(self.C.mT) @ self.Q, 0.0)
        rest = replace(self.start, r=r, active=active, limit=left, condition=None)
        further = alone(rest)
        part.x = part.x + torch.where(active[:, None], further.x, 0.0)
        part.status = torch.where(active, further.status, part.status)
        part.iterations = part.iterations + further.iterations
        part.steps += further.steps
        part.negative = part.negative | further.negative
        part.largest = torch.maximum(part.largest, further.largest)
        part.ritz = widest(part.ritz, further.ritz)
        return part

    def _large(self, small: Tensor) -> Tensor:
        return small.to(self.x.device, self.x.dtype)


class _Observer(Observer):
    """Follows the block, whose directions all share the one condition."""

    def __init__(self, condition: Tensor, residual: Tensor) -> None:
        super().__init__(condition, residual)
        self.left, self.step = condition, torch.zeros_like(condition)

    def along_all(self, directions: Tensor, images: Tensor, inverse: Tensor) -> None:
        """Project F on conjugate blocks, where `inverse` is that of directions . images."""
        part = inverse @ (directions @ self.left)
        self.step = self.step + part @ directions
        self.left = self.left - part @ images


def _ritz(pivots: list[Tensor], zetas: list[Tensor], x: Tensor) -> Tensor:
    """Find the extreme eigenvalues of the block tridiagonal matrix ``Q A Q^T``, for each task.

    Since ``Q_i = S_i - zeta_i S_(i-1)`` and the S are conjugate, its blocks are
    ``M_i + zeta_i M_(i-1) zeta_i^T`` and ``-zeta_i M_(i-1)``.

    Returns
    -------
    extremes : Tensor
        ``(tasks, 2)``.
    """
    low, high, first = math.inf, -math.inf, 0
    while first < len(pivots):
        count, last = 0, first
        while last < len(pivots) and (last == first or count + len(pivots[last]) <= _LARGEST):
            count, last = count + len(pivots[last]), last + 1
        matrix, row = torch.zeros(count, count, dtype=torch.float64), 0
        for i in range(first, last):
            here = slice(row, row + len(pivots[i]))
            matrix[here, here] = pivots[i]
            if i:
                zeta, before = zetas[i - 1], pivots[i - 1]
                matrix[here, here] += zeta @ before @ zeta.mT
                if i > first:
                    matrix[here, row - len(before) : row] = -zeta @ before
            row = here.stop
        values = torch.linalg.eigvalsh(matrix)
        low, high = min(low, float(values[0])), max(high, float(values[-1]))
        first = last
    return x.new_tensor([low, high]).expand(len(x), 2)


def _exceeds(matrix: Tensor, least: float) -> bool:
    """Say whether all eigenvalues of a small symmetric matrix are larger than a number."""
    return not bool(torch.linalg.cholesky_ex(matrix - least * torch.eye(len(matrix))).info)


def _small(matrix: Tensor) -> Tensor:
    return matrix.to("cpu", torch.float64)
