"""Which solver ``solver=None`` stands for."""

from __future__ import annotations

from ._base import Solver
from ._cg import CG
from ._exact import Exact
from ._gmres import GMRES

_DENSE_BELOW = 512


def choose(solver: Solver | None, n: int, symmetric: bool) -> Solver:
    """`solver`, or where it is None: dense up to 512 unknowns, else CG or GMRES."""
    if solver is not None:
        return solver
    if n <= _DENSE_BELOW:
        return Exact()
    return CG() if symmetric else GMRES()
