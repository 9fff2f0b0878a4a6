"""Hypergradients for PyTorch: the derivative of an outer loss through an inner solution.

The answer is right, or it says that it may not be.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from . import estimators as _estimators
from . import inner as inner
from . import inner_solvers as inner_solvers
from . import projections as projections
from . import prox as prox
from . import solvers as _solvers
from ._check.report import Report, check_hypergrad
from ._compiled.compile import compile
from ._distributed.all_reduced import all_reduced
from ._errors import (
    CompileMismatch,
    CompileWarning,
    ConvergenceWarning,
    Diverged,
    HypergradError,
    IndefiniteHessian,
    NotCompiled,
    NotConnected,
    NotConverged,
    NotDifferentiable,
    NotFinite,
    RankFailed,
    SingularHessian,
    StructureMismatch,
    UnsupportedOperation,
)
from ._implicit.decorators import custom_argmin, custom_fixed_point, custom_root
from ._implicit.entrance import implicit_backward, implicit_grad
from ._implicit.influence import influence
from ._implicit.jacobian import jacobian
from ._implicit.root_rules import root_jvp, root_vjp
from ._info import SolveInfo, Status
from ._public import settle as _settle
from .conditions._fixed_point import FixedPoint
from .conditions._gauss_newton import GaussNewton
from .conditions._gradient_step import ProjectedGradient, ProximalGradient
from .conditions._kkt import KKT
from .conditions._minimum import Minimum
from .conditions._root import Root
from .conditions._supervised import Supervised, supervised
from .estimators import (
    EvolutionInfo,
    ValueFunctionInfo,
    evolution_strategies_grad,
    finite_difference_grad,
    one_step_grad,
    penalty_grad,
    unrolled_grad,
    value_function_grad,
)
from .inner_solvers._argmin import argmin
from .solvers import (
    CG,
    GMRES,
    LSMR,
    MINRES,
    Auto,
    BiCGSTAB,
    Exact,
    Identity,
    Neumann,
    NormalCG,
    Nystrom,
)

if TYPE_CHECKING:
    from .bilevel import (
        F2SA,
        FSLA,
        HOAG,
        MASOBA,
        SABA,
        SOBA,
        SRBA,
        Alternating,
        AmIGO,
        Bilevel,
        StepInfo,
        StocBiO,
    )

__version__ = "0.1.0"

__all__ = [
    "CG",
    "F2SA",
    "FSLA",
    "GMRES",
    "HOAG",
    "KKT",
    "LSMR",
    "MASOBA",
    "MINRES",
    "SABA",
    "SOBA",
    "SRBA",
    "Alternating",
    "AmIGO",
    "Auto",
    "BiCGSTAB",
    "Bilevel",
    "CompileMismatch",
    "CompileWarning",
    "ConvergenceWarning",
    "Diverged",
    "EvolutionInfo",
    "Exact",
    "FixedPoint",
    "GaussNewton",
    "HypergradError",
    "Identity",
    "IndefiniteHessian",
    "Minimum",
    "Neumann",
    "NormalCG",
    "NotCompiled",
    "NotConnected",
    "NotConverged",
    "NotDifferentiable",
    "NotFinite",
    "Nystrom",
    "ProjectedGradient",
    "ProximalGradient",
    "RankFailed",
    "Report",
    "Root",
    "SingularHessian",
    "SolveInfo",
    "Status",
    "StepInfo",
    "StocBiO",
    "StructureMismatch",
    "Supervised",
    "UnsupportedOperation",
    "ValueFunctionInfo",
    "all_reduced",
    "argmin",
    "check_hypergrad",
    "compile",
    "custom_argmin",
    "custom_fixed_point",
    "custom_root",
    "evolution_strategies_grad",
    "finite_difference_grad",
    "implicit_backward",
    "implicit_grad",
    "influence",
    "jacobian",
    "one_step_grad",
    "penalty_grad",
    "root_jvp",
    "root_vjp",
    "supervised",
    "unrolled_grad",
    "value_function_grad",
]


_settle(globals(), *map(vars, (_estimators, inner_solvers, projections, prox, _solvers)))


def __getattr__(name: str) -> Any:
    """Import the bi-level methods, a sixth of all there is, when one is first asked for."""
    if name not in __all__ and name != "bilevel":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    bilevel = importlib.import_module(f"{__name__}.bilevel")
    if name == "bilevel":
        return bilevel
    method = globals()[name] = getattr(bilevel, name)
    return method


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
