"""Conjugate gradients of many tasks as a trace has them: all steps, and one look at their end.

`_cg` says what is done and why. Here no task is to meet a direction without positive curvature, so
that nothing need be kept for it; where one has, which is seen at the end, this is not the answer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import every_task
from .._info import Status
from ._cg_steps import drift_of, quotients_of, ritz_of
from ._krylov import Correction, Pass
from ._observer import Observer
from ._vectors import dot


class StraightCG:
    """All steps of a pass: Hestenes and Stiefel (1952), equations 3:1.

    Parameters
    ----------
    start : Pass
        The pass. Its host may look.
    """

    def __init__(self, start: Pass) -> None:
        self.start, self.active = start, start.active
        self.r = self.p = start.r
        self.rr = self.pp = dot(start.r, start.r)
        self.first, self.x = self.rr.sqrt(), torch.zeros_like(start.r)
        self.log: list[tuple[Tensor, ...]] = []
        self.observer = None if start.condition is None else Observer(start.condition, start.r)
        target = start.tol.square()
        for _ in range(start.limit):
            self._step(target)

    def _step(self, target: Tensor) -> None:
        """Make one step; a task that is solved stands still."""
        p, moving, rr = self.p, self.active, self.rr
        Ap = self.start.matvec(p)
        pAp = dot(p, Ap)
        inverse = torch.where(moving, pAp.reciprocal(), 0.0)
        alpha = (rr * inverse)[..., None]  # 3:1b
        if self.observer is not None:
            self.observer.along_by(p, Ap, inverse)
        self.x = torch.addcmul(self.x, alpha, p)  # 3:1c
        self.r = torch.addcmul(self.r, alpha, Ap, value=-1)  # 3:1d
        self.rr = torch.linalg.vector_norm(self.r, dim=-1).square()
        beta = torch.where(moving, self.rr / rr, 0.0)  # 3:1e
        self.log.append((pAp, rr, beta, moving, moving, self.pp, self.rr))
        self.active = moving & (self.rr > target)
        self.p = torch.addcmul(self.r, beta[..., None], p)  # 3:1f
        self.pp = torch.addcmul(self.rr, beta.square(), self.pp)
        if self.observer is not None and self.observer.is_due():
            self.observer.keep(self.x, self.rr.sqrt(), moving)

    def sound(self) -> bool:
        """See whether every direction had positive curvature for the tasks that moved along it."""
        if not self.log:
            return False
        pAp, _, _, moving, _, pp, _ = (torch.stack(kept) for kept in zip(*self.log, strict=True))
        quotients = pAp / pp
        largest = quotients.abs().cummax(dim=0).values
        self.largest = largest[-1]
        return every_task((quotients > self.start.least * largest) | ~moving)

    def ended(self) -> Correction:
        """Say how the tasks ended."""
        pAp, rz, beta, active, moves, pp, _ = zip(*self.log, strict=True)
        known: dict[str, Any] = {}
        if self.start.steady:
            known = {"residual": self.r, "drift": drift_of(self.log, self.first)}
        zeros = torch.zeros_like(self.active)
        return Correction(
            x=self.x,
            status=torch.where(self.active, int(Status.MAX_ITERATIONS), int(Status.CONVERGED)),
            iterations=torch.stack(moves).sum(dim=0),
            steps=len(self.log),
            negative=zeros,
            largest=self.largest,
            ritz=partial(ritz_of, pAp, rz, beta, active),
            quotients=partial(quotients_of, pAp, pp, moves),
            observer=self.observer,
            **known,
        )
