"""Solvers for inner problems, as a convenience: whatever else solves them does as well.

All are frozen dataclasses and are called alike, ``solver(objective, init, *args)``, and return
``(params, info)``; `Anderson` takes a map in place of an objective, `Bisection` a
system of scalar equations, `LevenbergMarquardt` residuals. They work under
`torch.func.vmap` over tasks, where each task stops by itself, and inside the `fit` of the
decorators. One that fails does not raise or warn: look at ``info.success``. Their results are
detached; `hypergrad.argmin` and the decorators differentiate them.
"""

from __future__ import annotations

from ._accelerated import FISTA, Nesterov
from ._anderson import Anderson
from ._base import InnerSolver
from ._bisection import Bisection
from ._gradient_descent import GradientDescent
from ._info import InnerInfo
from ._lbfgs import LBFGS
from ._levenberg_marquardt import LevenbergMarquardt
from ._newton_cg import NewtonCG

__all__ = [
    "FISTA",
    "LBFGS",
    "Anderson",
    "Bisection",
    "GradientDescent",
    "InnerInfo",
    "InnerSolver",
    "LevenbergMarquardt",
    "Nesterov",
    "NewtonCG",
]
