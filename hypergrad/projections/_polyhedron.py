"""The projection onto a polyhedron."""

from __future__ import annotations

import torch
from torch import Tensor

from .._autograd.search import search
from .._errors import NotConverged
from ._arguments import described, vector, widest

_MET = 1e3  # units of rounding within which a constraint counts as met
_DEPENDENT = 1e-11  # of a row of length one: the rest of it beside those before
_APART = 1e-6  # the same for a row that touches without a multiplier


def polyhedron(v: Tensor, A: Tensor, b: Tensor, G: Tensor, h: Tensor) -> Tensor:
    """Project onto the x with ``A x = b`` and ``G x <= h``.

    It is exact, by the dual active-set method. Rows may depend on each other.

    Parameters
    ----------
    v : Tensor
        ``(n,)``, what is projected.
    A, b : Tensor
        ``(p, n)`` and ``(p,)``; p may be 0.
    G, h : Tensor
        ``(q, n)`` and ``(q,)``; q may be 0.

    Returns
    -------
    x : Tensor
        ``(n,)``.

    Raises
    ------
    StructureMismatch
        If the shapes do not go together.

    References
    ----------
    Goldfarb and Idnani, A numerically stable dual method for solving strictly convex quadratic
    programs, 1983.

    Examples
    --------
    >>> import torch
    >>> from hypergrad import projections
    >>> A, b, G, h = torch.ones(1, 3), torch.ones(1), -torch.eye(3), torch.zeros(3)
    >>> x = projections.polyhedron(torch.tensor([0.9, 0.6, -0.2]), A, b, G, h)  # the simplex
    >>> torch.allclose(x, torch.tensor([0.65, 0.35, 0.0]))
    True
    """
    v = vector(v)
    wide, n = widest(v), v.shape[0]
    rows, levels = [], []
    for (name, matrix), (its, level) in ((("A", A), ("b", b)), (("G", G), ("h", h))):
        count = matrix.shape[0] if isinstance(matrix, Tensor) and matrix.ndim else 0
        rows.append(described(name, matrix, (count, n), wide))
        levels.append(described(its, level, (count,), wide))
    C, d = torch.cat(rows), torch.cat(levels)
    # The length of a row says nothing. A row of zeros stays one.
    largest = C.detach().abs().amax(dim=1, keepdim=True) if n else torch.zeros_like(C[:, :0])
    largest = torch.where(largest > 0, largest, 1.0)
    length = largest * torch.linalg.vector_norm(C.detach() / largest, dim=1, keepdim=True)
    length = torch.where(length > 0, length, 1.0)
    C, d = C / length, d / length[:, 0]
    eps, equal = torch.finfo(v.dtype).eps, rows[0].shape[0]

    def find(v: Tensor, C: Tensor, d: Tensor) -> tuple[Tensor, ...]:
        active = [_Active(*task, equal, eps).rows() for task in zip(v, C, d, strict=True)]
        most = max(map(len, active), default=0)
        index = torch.zeros(len(active), most, dtype=torch.int64, device=v.device)
        used = torch.zeros(len(active), most, dtype=v.dtype, device=v.device)
        for i, rows in enumerate(active):
            index[i, : len(rows)] = torch.tensor(rows, dtype=torch.int64, device=v.device)
            used[i, : len(rows)] = 1
        return index, used

    index, used = search(find, wide, C, d)
    if not index.shape[-1]:
        return v.clone()
    # A row that stands for none is made independent of the others by a coordinate of its own.
    N = C[index].mT * used
    Q, R = torch.linalg.qr(torch.cat([N, torch.diag(1 - used)]))
    target = torch.linalg.solve_triangular(R.mT, (d[index] * used)[:, None], upper=False)[:, 0]
    Q = Q[:n]
    return (wide - Q @ (Q.mT @ wide - target)).to(v.dtype)


class _Active:
    """The dual active-set method for one point, on rows of length one.

    It starts at the point and takes in one violated row after another; rows whose multiplier would
    become negative are let go. ``columns`` and ``triangle`` are the QR factors of the active rows.
    """

    def __init__(self, v: Tensor, C: Tensor, d: Tensor, equal: int, eps: float) -> None:
        self.x, self.C, self.d, self.equal = v.clone(), C, d, equal
        self.eps, self.coarse = torch.finfo(v.dtype).eps, eps
        self.working: list[int] = []
        self.multipliers = v.new_zeros(0)
        self.columns, self.triangle = v.new_zeros(len(v), 0), v.new_zeros(0, 0)
        self.largest = float(v.abs().max()) if len(v) else 0.0

    def rows(self) -> list[int]:
        """Find the active rows, independent of each other.

        Returns
        -------
        rows : list of int
            Their numbers.

        Raises
        ------
        NotConverged
            If rounding keeps the method from ending.
        """
        for k in range(self.equal):
            self._meet(k)
        for _ in range(100 + 20 * sum(self.C.shape)):
            beyond = (self._excess() / self._rounding())[self.equal :]
            if self.working:
                taken = [k - self.equal for k in self.working if k >= self.equal]
                beyond[taken] = 0
            if not len(beyond) or not float(beyond.max()) > 1:
                return self._with_touching()
            self._take(self.equal + int(beyond.argmax()))
        beyond = self._excess()[self.equal :] / self._rounding()[self.equal :]
        if float(beyond.max()) * self.eps < 10 * self.coarse:
            return self._with_touching()
        raise NotConverged("polyhedron: the rows of G are too close to dependent for its method.")

    def _excess(self) -> Tensor:
        return self.C @ self.x - self.d

    def _rounding(self) -> Tensor:
        size = self.d.abs() + self.C.abs() @ self.x.abs() + self.largest
        return _MET * self.eps * size + torch.finfo(size.dtype).tiny

    def _beside(self, k: int) -> tuple[Tensor, Tensor]:
        """Split a row into its coordinates along the active ones, and what is left of it."""
        along = self.columns.mT @ self.C[k]
        left = self.C[k] - self.columns @ along
        again = self.columns.mT @ left  # once more, for orthogonality
        return along + again, left - self.columns @ again

    def _split(self, k: int) -> tuple[Tensor, Tensor]:
        """Find the weights of the active rows in a row, and what is left of it."""
        along, left = self._beside(k)
        weights = torch.linalg.solve_triangular(self.triangle, along[:, None], upper=True)[:, 0]
        if float(torch.linalg.vector_norm(left)) <= max(_DEPENDENT, 100 * self.coarse):
            left = torch.zeros_like(left)
        return weights, left

    def _add(self, k: int, multiplier: float) -> None:
        along, left = self._beside(k)
        size = torch.linalg.vector_norm(left)
        q = len(self.working)
        triangle = along.new_zeros(q + 1, q + 1)
        triangle[:q, :q], triangle[:q, q], triangle[q, q] = self.triangle, along, size
        self.triangle = triangle
        self.columns = torch.cat([self.columns, (left / size)[:, None]], dim=1)
        self.multipliers = torch.cat([self.multipliers, along.new_tensor([multiplier])])
        self.working.append(k)

    def _drop(self, place: int) -> None:
        del self.working[place]
        keep = [i for i in range(len(self.multipliers)) if i != place]
        self.multipliers = self.multipliers[keep]
        self.columns, self.triangle = torch.linalg.qr(self.C[self.working].mT)

    def _meet(self, k: int) -> None:
        """Take in an equation, unless it follows from those before."""
        excess = float(self._excess()[k])
        _, left = self._split(k)
        square = float(left.dot(left))
        if square == 0:
            if abs(excess) > float(self._rounding()[k]) * max(1.0, self.coarse / self.eps):
                raise ValueError("A x = b has no solution: the set is empty.")
            return
        self.x = self.x - excess / square * left
        self._add(k, 0.0)

    def _take(self, k: int) -> None:
        """Take in a violated row, and let go of those whose multipliers would become negative."""
        multiplier = 0.0
        while True:
            weights, left = self._split(k)
            square = float(left.dot(left))
            full = float(self._excess()[k]) / square if square else float("inf")
            leaving, step = -1, full
            for place, row in enumerate(self.working):
                weight = float(weights[place])
                if row >= self.equal and weight > 1e-14:
                    ratio = float(self.multipliers[place]) / weight
                    if ratio < step:
                        leaving, step = place, ratio
            if step == float("inf"):
                raise ValueError("A x = b and G x <= h have no common point: the set is empty.")
            if square:
                self.x = self.x - step * left
            self.multipliers = self.multipliers - step * weights
            multiplier += step
            if leaving < 0:
                self._add(k, multiplier)
                return
            self._drop(leaving)

    def _with_touching(self) -> list[int]:
        """List the active rows, with those met without a multiplier, which count as active."""
        touching = (self._excess().abs() <= self._rounding()).nonzero()[:, 0].tolist()
        for k in touching:
            if k in self.working or len(self.working) >= len(self.x):
                continue
            _, left = self._split(k)
            if float(torch.linalg.vector_norm(left)) > _APART:
                self._add(k, 0.0)
        return self.working
