"""Conjugate gradients for one system on the CPU, where numbers are quicker than 0-d tensors.

`_cg` says what is done and why; this is the same for one system, and the tests hold the two against
each other.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor

from .._autograd.branches import traced
from .._autograd.transforms import transforms_active
from .._info import Status
from ._krylov import Correction, noise_floor
from ._long import is_long
from ._observer import Observer
from ._ritz import ritz_values_of_cg
from ._vectors import Product
from ._watch import Watch

_FLAT = 10  # curvature below so many roundings of the largest is none
_TRUE = torch.tensor(True, device="cpu")
_TOGETHER = 32  # short directions that are kept and added at once


def suits(b: Tensor, looks: bool = True) -> bool:
    """Say whether this is one system, on the CPU, whose values the host looks at."""
    # Of a long one it does so where it need not, for that saves memory and waits for nothing.
    if not (looks or is_long(b)):
        return False
    return b.ndim == 1 and b.device.type == "cpu" and not (transforms_active() or traced())


def in_numbers(
    matvec: Product,
    precondition: Product | None,
    r: Tensor,
    tol: float,
    limit: int,
    condition: Tensor | None,
    watch: Watch | None = None,
    noise: Tensor | float = 0.0,
) -> Correction:
    """Make one pass: Hestenes and Stiefel (1952), equations 3:1; none with a `limit` of zero."""
    x, long = _Sum(r), is_long(r)  # a long residual is the pass's own, and changed in place
    p = r if precondition is None else precondition(r)
    p = p.clone() if long else p
    rz = _number(r, p)
    rr = rz if precondition is None else _number(r, r)
    pp = rr if precondition is None else _number(p, p)
    steepest, flattest = 0.0, math.inf
    least = _FLAT * torch.finfo(r.dtype).eps
    flat = float(noise_floor(least, noise))  # below it is no verdict; above zero it goes on
    log: list[tuple[float, float, float]] = []  # the coefficients of each step
    drift = _Drift(rr)
    observer = _observer(condition, r, None if precondition is not None else math.sqrt(rr))
    status = Status.MAX_ITERATIONS if limit else Status.CONVERGED
    for _ in range(limit):
        Ap = matvec(p)
        pAp = _number(p, Ap)
        quotient = pAp / pp if pp else math.nan
        steepest, flattest = max(steepest, abs(quotient)), min(flattest, quotient)
        if not quotient > least * steepest:  # true for NaN too
            log.append((pAp, rz, 0.0))
            status = _why(quotient, _number(Ap, Ap) / pp if pp else 0.0, steepest, flat)
            break
        alpha = rz / pAp
        if observer is not None:
            observer.along_alone(p, Ap, pAp, alpha=alpha, pp=pp)
        r = torch.sub(r, Ap, alpha=alpha, out=r if long else None)
        del Ap  # the next one takes its place
        z = r if precondition is None else precondition(r)
        rz_new = _number(r, z)
        rr = rz_new if precondition is None else _number(r, r)
        x.add(alpha, p, better=drift.go(alpha, pp, rr))
        beta = rz_new / rz if rz else math.nan
        log.append((pAp, rz, beta))
        if observer is not None:
            if observer.is_due():
                observer.keep(x.value(), drift.size, _TRUE)
            observer.turn(beta)
        if watch is not None:
            watch.tell(drift.size)
        if rr <= tol * tol:
            status = Status.CONVERGED
            break
        p = torch.add(z, p, alpha=beta, out=p if long else None)
        pp = rr + beta * beta * pp if precondition is None else _number(p, p)
        rz = rz_new
    part = _outcome(x, status, log, (flattest, steepest), observer)
    if status in (Status.CONVERGED, Status.MAX_ITERATIONS):
        part.residual, part.drift = r, drift.bound(r, len(log))
    return part


class _Drift:
    """How far the true residual may be from that by recursion, in roundings.

    Every product is rounded, and so is every sum.

    Parameters
    ----------
    rr : float
        The square of the residual's norm.
    """

    def __init__(self, rr: float) -> None:
        self.size = math.sqrt(max(rr, 0.0))
        self._least, self._way, self._stiffest, self._sizes = rr, 0.0, 0.0, 0.0

    def go(self, alpha: float, pp: float, rr: float) -> bool:
        """Take note of a step, and say whether it led to the smallest residual so far."""
        before, step = self.size, abs(alpha) * math.sqrt(pp)
        self.size = math.sqrt(max(rr, 0.0))
        self._way += step
        self._sizes += self.size
        if step:  # whose product with A is the difference of the residuals
            self._stiffest = max(self._stiffest, (before + self.size) / step)
        better, self._least = rr < self._least, min(rr, self._least)
        return better

    def bound(self, like: Tensor, steps: int) -> Tensor:
        """Bound it after so many steps."""
        sums = steps if is_long(like) else 1 + steps // _TOGETHER
        return like.new_tensor((1 + sums) * self._stiffest * self._way + self._sizes)


def _observer(condition: Tensor | None, r: Tensor, size: float | None) -> Observer | None:
    """Begin to follow the iteration; `size`: of a residual that no preconditioner changes."""
    if condition is None:
        return None
    observer = Observer(condition, r, long=is_long(r))
    if is_long(r) and size is not None:
        observer.measure(size)
    return observer


def _outcome(
    x: _Sum,
    status: Status,
    log: list[tuple[float, float, float]],
    quotients: tuple[float, float],
    observer: Observer | None,
) -> Correction:
    """Say how the iteration ended."""
    stopped = status not in (Status.MAX_ITERATIONS, Status.CONVERGED)
    end = _end(x, status)
    return Correction(
        x=end,
        status=torch.tensor(int(status), device="cpu"),
        iterations=torch.tensor(len(log) - stopped, device="cpu"),
        steps=len(log),
        negative=torch.tensor(status == Status.NEGATIVE_CURVATURE, device="cpu"),
        largest=end.new_tensor(quotients[1]),
        ritz=partial(_ritz, end, log) if log else None,
        observer=observer,
        quotients=partial(end.new_tensor, quotients),
    )


def _why(quotient: float, square: float, steepest: float, flat: float) -> Status:
    """Say why the method had to stop, by p.Ap and |Ap|^2 of a direction of length one."""
    if not math.isfinite(quotient):
        return Status.NOT_FINITE
    # |Ap|^2 <= |A| p.Ap for a semidefinite A: more is negative curvature too.
    negative = square > 100 * flat * steepest**2 or quotient < -flat * steepest
    return Status.NEGATIVE_CURVATURE if negative else Status.SINGULAR


def _end(x: _Sum, status: Status) -> Tensor:
    """Take the best iterate where the method had to stop, and NaN where it met one."""
    if status == Status.NOT_FINITE:
        return torch.full_like(x.value(), math.nan)
    return x.best() if status in (Status.SINGULAR, Status.NEGATIVE_CURVATURE) else x.value()


def _ritz(like: Tensor, log: list[tuple[float, float, float]]) -> Tensor:
    known = torch.ones(len(log), dtype=torch.bool, device="cpu")
    pAp, size, beta = (like.new_tensor(kept) for kept in zip(*log, strict=True))
    return ritz_values_of_cg(pAp, size, beta, known)


class _Sum:
    """A linear combination of directions, added up some dozens at a time."""

    def __init__(self, like: Tensor) -> None:
        self._sum = self._best = torch.zeros_like(like)
        self._weights: list[float] = []
        self._directions: list[Tensor] = []
        self._at_best = True  # whether all that was added so far is the best
        self._long = is_long(like)
        if self._long:
            self._best = self._sum.new_empty(0)

    def add(self, weight: float, direction: Tensor, *, better: bool) -> None:
        """Add a multiple of a direction; `better`: than every sum before it."""
        if self._at_best and not better:
            self._best = self._sum.clone() if self._long else self.value()
        self._at_best = better
        if self._long:
            self._best = self._sum.new_empty(0) if better else self._best
            self._sum.add_(direction, alpha=weight)
            return
        self._weights.append(weight)
        self._directions.append(direction)
        if len(self._weights) == _TOGETHER:
            self.value()

    def value(self) -> Tensor:
        """Add up what is kept, and return the sum."""
        if len(self._weights) == 1:
            self._sum = torch.add(self._sum, self._directions[0], alpha=self._weights[0])
            self._weights, self._directions = [], []
        elif self._weights:
            weights = self._sum.new_tensor(self._weights)
            self._sum = torch.addmv(self._sum, torch.stack(self._directions).T, weights)
            self._weights, self._directions = [], []
        return self._sum

    def best(self) -> Tensor:
        """Return the sum as it was after the last addition that was better than all before."""
        return self.value() if self._at_best else self._best


def _number(a: Tensor, b: Tensor) -> float:
    return torch.dot(a, b).item()
