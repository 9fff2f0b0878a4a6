"""The linear solvers, one file each."""

from __future__ import annotations

from ._auto import choose
from ._base import Solver
from ._cg import CG
from ._exact import Exact
from ._gmres import GMRES
from ._identity import Identity
from ._neumann import Neumann

__all__ = ["CG", "GMRES", "Exact", "Identity", "Neumann", "Solver", "choose"]
