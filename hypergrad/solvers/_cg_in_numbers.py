"""Conjugate gradients for one system on the CPU, where numbers are quicker than 0-d tensors.

`CG._iterate` says what is done and why; this is the same for one system, and the tests hold the
two against each other.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .._autograd.transforms import transforms_active
from .._info import Status
from ._base import Product
from ._iterative import Part
from ._observer import Observer
from ._ritz import ritz_values_of_cg

#: Curvature below so many roundings of the largest is none.
FLAT = 10
_TOGETHER = 32  # short directions that are kept and added at once
_SHORT = 10_000  # ... up to this many unknowns: longer ones gain nothing and fill the memory


def suits(b: Tensor) -> bool:
    """Whether this is one system, on the CPU, whose values the host may look at."""
    return b.ndim == 1 and b.device.type == "cpu" and not transforms_active()


def in_numbers(
    matvec: Product,
    precondition: Product | None,
    r: Tensor,
    tol: float,
    limit: int,
    condition: Tensor | None,
) -> Part:
    """One pass of the iteration; with a `limit` of zero, nothing."""
    target = tol * tol
    x = _Sum(r)
    z = r if precondition is None else precondition(r)
    p = z
    rz = _number(r, z)
    rr = rz if precondition is None else _number(r, r)
    pp = rr if precondition is None else _number(p, p)
    best_rr, steepest = rr, 0.0
    flat = FLAT * torch.finfo(r.dtype).eps
    curvatures, sizes, betas = [], [], []
    observer = None if condition is None else Observer(condition, r)
    true = torch.tensor(True, device="cpu")
    status = Status.MAX_ITERATIONS if limit else Status.CONVERGED
    steps = moves = 0
    while steps < limit:
        steps += 1
        Ap = matvec(p)
        pAp = _number(p, Ap)
        quotient = pAp / pp if pp else math.nan
        steepest = max(steepest, abs(quotient))
        curvatures.append(pAp)
        sizes.append(rz)
        if not quotient > flat * steepest:  # true for NaN too
            betas.append(0.0)
            # |Ap|^2 <= |A| p.Ap for a semidefinite A: more is negative curvature too.
            bent = _number(Ap, Ap) > 100 * flat * steepest**2 * pp
            status = Status.SINGULAR
            if quotient < -flat * steepest or bent:
                status = Status.NEGATIVE_CURVATURE
            if not math.isfinite(quotient):
                status = Status.NOT_FINITE
            break
        moves += 1
        alpha = rz / pAp
        if observer is not None:
            observer.along_alone(p, Ap, pAp)
        r = torch.sub(r, Ap, alpha=alpha)
        z = r if precondition is None else precondition(r)
        rz_new = _number(r, z)
        rr = rz_new if precondition is None else _number(r, r)
        x.add(alpha, p, better=rr < best_rr)
        best_rr = min(best_rr, rr)
        beta = rz_new / rz if rz else math.nan
        betas.append(beta)
        if observer is not None and observer.is_due:
            observer.after_step(x.value(), math.sqrt(max(rr, 0.0)), true)
        elif observer is not None:
            observer.after_step(p, 0.0, true)
        if rr <= target:
            status = Status.CONVERGED
            break
        p = torch.add(z, p, alpha=beta)
        pp = rr + beta * beta * pp if precondition is None else _number(p, p)
        rz = rz_new
    failed = status in (Status.SINGULAR, Status.NEGATIVE_CURVATURE)
    found = x.best() if failed else x.value()
    if status == Status.NOT_FINITE:
        found = torch.full_like(found, math.nan)

    def ritz() -> Tensor:
        known = torch.ones(steps, dtype=torch.bool, device="cpu")
        pAp, size, beta = (r.new_tensor(kept) for kept in (curvatures, sizes, betas))
        return ritz_values_of_cg(pAp, size, beta, known)

    return Part(
        x=found,
        status=torch.tensor(int(status), device="cpu"),
        iterations=torch.tensor(moves, device="cpu"),
        steps=steps,
        negative=torch.tensor(status == Status.NEGATIVE_CURVATURE, device="cpu"),
        largest=r.new_tensor(steepest),
        ritz=ritz if steps else None,
        observer=observer,
    )


class _Sum:
    """A linear combination of directions, added up some dozens at a time."""

    def __init__(self, like: Tensor) -> None:
        self._sum = self._best = torch.zeros_like(like)
        self._weights: list[float] = []
        self._directions: list[Tensor] = []
        self._at_best = True  # whether all that was added so far is the best
        self._together = _TOGETHER if like.numel() <= _SHORT else 1

    def add(self, weight: float, direction: Tensor, *, better: bool) -> None:
        """Add a multiple of a direction; `better`: than every sum before it."""
        if self._at_best and not better:
            self._best = self.value()
        self._at_best = better
        self._weights.append(weight)
        self._directions.append(direction)
        if len(self._weights) == self._together:
            self.value()

    def value(self) -> Tensor:
        """The sum."""
        if len(self._weights) == 1:
            self._sum = torch.add(self._sum, self._directions[0], alpha=self._weights[0])
            self._weights, self._directions = [], []
        elif self._weights:
            weights = self._sum.new_tensor(self._weights)
            self._sum = torch.addmv(self._sum, torch.stack(self._directions).T, weights)
            self._weights, self._directions = [], []
        return self._sum

    def best(self) -> Tensor:
        """The sum as it was after the last addition that was better than all before."""
        return self.value() if self._at_best else self._best


def _number(a: Tensor, b: Tensor) -> float:
    return torch.dot(a, b).item()
