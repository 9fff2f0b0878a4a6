"""The linear solvers, one file each; `Solver` is the base of a method of one's own."""

from __future__ import annotations

from ._auto import Auto
from ._base import Solver
from ._bicgstab import BiCGSTAB
from ._cg import CG
from ._exact import Exact
from ._gmres import GMRES
from ._identity import Identity
from ._minres import MINRES
from ._neumann import Neumann
from ._normal import LSMR, NormalCG
from ._nystrom import Nystrom
from ._system import LinearSystem, Solution
from ._watch import Iteration

__all__ = [
    "CG",
    "GMRES",
    "LSMR",
    "MINRES",
    "Auto",
    "BiCGSTAB",
    "Exact",
    "Identity",
    "Iteration",
    "LinearSystem",
    "Neumann",
    "NormalCG",
    "Nystrom",
    "Solution",
    "Solver",
]
