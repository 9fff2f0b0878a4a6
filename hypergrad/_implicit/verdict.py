"""Where an answer is judged: what is warned of or raised, in which words."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from enum import IntEnum
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from .._autograd.host import all_tasks
from .._errors import (
    ConvergenceWarning,
    Diverged,
    HypergradError,
    IndefiniteHessian,
    NotConverged,
    NotDifferentiable,
    NotFinite,
    SingularHessian,
)
from .._info import SolveInfo, Status
from .._pytrees import Tree
from ..solvers._base import Solver
from ..solvers._system import Solution

OnFailure = Literal["warn", "raise", "ignore"]
#: Where a number came from, the tensor to look at, and what to do if it is the first that is not
#: finite: called only when one is not.
Places = Callable[[], Iterable[tuple[str, Tensor, Callable[[], str]]]]

_HERE = str(Path(__file__).parent.parent)


def check_on_failure(on_failure: str) -> None:
    """Refuse an `on_failure` that is none of the three."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f"on_failure must be 'warn', 'raise' or 'ignore'; got {on_failure!r}.")


class Cause(IntEnum):
    """Why an answer is no success, where that is not the end of the linear solve itself."""

    SOLVE = 0
    CURVATURE = 1
    RANK = 2
    INNER = 3
    AWAY = 4
    APPROXIMATION = 5
    KINK = 6
    UNITS = 7


def judge(
    info: SolveInfo,
    found: Solution,
    solver: Solver,
    *,
    inner_tol: float | None,
    on_failure: OnFailure,
    cause: Tensor,
    condition: Tensor,
    params: Tensor,
    sound: Tensor,
    places: Places,
    kink: str = "",
) -> None:
    """Warn or raise, once for all tasks, if an answer is not what it should be.

    Reads one packed tensor from the device where all is well, nothing with
    ``on_failure="ignore"``. The text of a warning is the same at every call, so that Python's
    filters can show it once; the figures are in the info, and in the text of an error.

    Parameters
    ----------
    info : SolveInfo
        The evidence.
    found : Solution
        The solution that it is about.
    solver : Solver
        The solver that was used, whose fields the advice names.
    inner_tol : float or None
        The relative inner residual above which the inner problem counts as unsolved.
    on_failure : str
        What to do about a failure.
    cause : Tensor
        A `Cause` for each task.
    condition, params : Tensor
        The norms of the inner condition and of the inner variables, for each task.
    sound : Tensor
        bool, for each task: all numbers of the answer are finite.
    places : callable
        The tensors to search for the first that is not finite.
    kink : str
        What makes a point a kink of the inner problem.

    Raises
    ------
    NotFinite
        If a number is not finite, with "warn" too.
    NotConverged, IndefiniteHessian, SingularHessian, Diverged, NotDifferentiable
        If `on_failure` is "raise" and a task failed.
    """
    if on_failure == "ignore":
        return
    good = all_tasks(torch.stack([sound, info.success], dim=-1)).all(dim=0).tolist()
    if all(good):
        return
    figures = {
        "sound": sound,
        "success": info.success,
        "status": info.status,
        "cause": cause,
        "iterations": info.iterations,
        "residual": info.residual_norm,
        "inner": info.inner_residual,
        "low": found.eigenvalues[..., 0],
        "high": found.eigenvalues[..., 1],
        "condition": condition.expand_as(info.status),
        "params": params.expand_as(info.status),
        "degeneracy": info.degeneracy,
    }
    packed = torch.stack([f.to(torch.float64) for f in figures.values()], dim=-1)
    rows = [_Row(*row) for row in all_tasks(packed).tolist()]
    bad = [row for row in rows if not row.sound]
    if bad:
        raise NotFinite(counted(len(bad), len(rows), exact=True) + _not_finite(places))
    failed = [row for row in rows if not row.success]
    worst = max(failed, key=_Row.severity)
    exact = on_failure == "raise"
    name = info.method if exact else type(solver).__name__
    error, text = _diagnose(worst, name, solver, inner_tol, kink, exact=exact)
    text = counted(len(failed), len(rows), exact=exact) + text
    if exact:
        raise error(text)
    warn(text)


class _Row(NamedTuple):
    """The figures of one task, as numbers."""

    sound: float
    success: float
    status: float
    cause: float
    iterations: float
    residual: float
    inner: float
    low: float
    high: float
    condition: float
    params: float
    degeneracy: float

    def severity(self) -> tuple[bool, float]:
        """Failures of the linear solve first, then by the size of the figure."""
        figure = self.residual if math.isfinite(self.residual) else self.inner
        return self.status != Status.CONVERGED, figure


# Who is told of warnings in place of Python's filters.
_listener: ContextVar[Callable[[str], bool] | None] = ContextVar("hypergrad_listener", default=None)


@contextmanager
def listening(listener: Callable[[str], bool]) -> Iterator[None]:
    """Tell a function of every warning; it decides by what it returns whether that is issued."""
    token = _listener.set(listener)
    try:
        yield
    finally:
        _listener.reset(token)


def warn(text: str) -> None:
    """Issue a `ConvergenceWarning` at the line that called the library."""
    listener = _listener.get()
    if listener is not None and not listener(text):
        return
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _internal(frame.f_back.f_code.co_filename):
        frame, level = frame.f_back, level + 1
    warnings.warn(text, ConvergenceWarning, stacklevel=level + 1)


def warn_of_unused(hparams: Tree, neither: str, *terms: Sequence[Tensor | None]) -> None:
    """Warn, naming the leaves, where all terms of a hypergradient are missing."""
    unused = [
        hparams.variable_path(i)
        for i, parts in enumerate(zip(*terms, strict=True))
        if all(part is None for part in parts)
    ]
    if unused:
        warn(
            f"{neither} depends on {', '.join(unused)}: the gradient there is zero. If that is not "
            "meant, look for a .detach() or .item(), a copy, or a value that is captured in place "
            "of the argument."
        )


def _internal(filename: str) -> bool:
    return filename.startswith(_HERE) or f"{Path('torch')}/" in filename.replace("\\", "/")


def counted(failed: int, tasks: int, *, exact: bool) -> str:
    """How many tasks failed; in a warning exactly up to three, since it moves from step to step."""
    if tasks == 1:
        return ""
    few = exact or failed <= 3
    return f"{failed if few else 'more than 3'} of {tasks} tasks: "


def _diagnose(
    row: _Row,
    name: str,
    solver: Solver,
    inner_tol: float | None,
    kink: str,
    *,
    exact: bool,
) -> tuple[type[HypergradError], str]:
    """The error and its text; `exact`: with the figures."""
    at = f", at relative residual {row.residual:.3g}" if exact else ""
    after = f" after {int(row.iterations)} iterations" if exact else ""
    match Cause(int(row.cause)):
        case Cause.CURVATURE:
            return IndefiniteHessian, _indefinite(name, after, at)
        case Cause.RANK:
            return SingularHessian, (
                "The matrix is singular, so that the derivative of the solution is not determined: "
                f"the solution is one of several, or the conditions contradict each other a little "
                f"further on ({name}{', rank lost' if exact else ''}). Where a quantity is "
                "conserved, put its equation into the condition in place of one that says the same "
                "as others; else add damping=..., or a regulariser to the inner problem."
            )
        case Cause.INNER:
            return NotConverged, _unsolved(row, inner_tol, exact)
        case Cause.AWAY:
            return NotConverged, _away(row, exact)
        case Cause.APPROXIMATION:
            return NotConverged, (
                "The curvature that GaussNewton leaves out of the Hessian changes the answer: the "
                "residuals at params are large, or the model bends"
                + (f" (params has norm {row.params:.3g})" if exact else "")
                + ". Use Minimum, whose curvature is the whole Hessian, or inner_tol=None where "
                "the approximation is meant."
            )
        case Cause.UNITS:
            return NotConverged, (
                f"{name} met its tolerance in units that hide an error: rows of the matrix differ "
                f"by so much that the residual{at[1:] if at else ''} is that of the largest alone. "
                "Use Exact(), which takes no notice of units; scale the variables to one size; or "
                "pass a preconditioner and a smaller rtol."
            )
        case Cause.KINK:
            return _degenerate(row.degeneracy, kink, exact)
    match Status(int(row.status)):
        case Status.MAX_ITERATIONS:
            cure = (
                "terms, loosen rtol, or use CG() or GMRES(), which need fewer products."
                if hasattr(solver, "terms")
                else "maxiter, loosen rtol, add damping, or pass a preconditioner; "
                "x0=last_info.solution starts from the last answer."
            )
            return NotConverged, f"{name} ran out of iterations{after}{at}. Raise {cure}"
        case Status.NEGATIVE_CURVATURE:
            return IndefiniteHessian, _indefinite(name, after, at)
        case Status.SINGULAR:
            return SingularHessian, (
                f"The matrix is singular and the system has no solution ({name}"
                + (f", relative residual {row.residual:.3g}" if exact else "")
                + "). Add damping=..., or a regulariser to the inner problem."
            )
        case Status.DIVERGED:
            bound = (
                f" The largest eigenvalue is {row.high:.3g}: a step_size of "
                f"{1 / (1.5 * row.high):.3g} is safe."
                if exact and math.isfinite(row.high) and row.high > 0
                else ""
            )
            cure = "Leave step_size=None to have it estimated, or use CG() or GMRES()."
            if getattr(solver, "step_size", None) is None:
                cure = (
                    "So they do with any step where the matrix has an eigenvalue whose real part "
                    "is not positive. Use MINRES() where it is symmetric, GMRES(), or damping."
                )
            grew = f" ({at[5:]})" if at else ""
            return Diverged, f"{name} diverged: its terms grew{grew}.{bound} {cure}"
        case Status.STAGNATED:
            return NotConverged, (
                f"{name} stagnated at the rounding floor of the dtype{at}. Use float64, "
                "loosen rtol, or pass a preconditioner."
            )
    return NotConverged, f"{name} broke down{after}{at}. Use GMRES() or Exact()."


def _indefinite(name: str, after: str, at: str) -> str:
    return (
        f"{name} met negative curvature (p.Ap <= 0){after}{at}: the matrix is not positive "
        "definite, so params is no minimum of the inner problem (a saddle, or a point far from a "
        "solution). Solve the inner problem further, with a smaller step size (learning rate) of "
        "the inner solver where the norm of params grows; add damping, or use a GaussNewton "
        "condition, whose curvature cannot be negative. Where params is not meant to be a "
        "minimum, say Root(..., symmetric=True), which MINRES() and Exact() solve."
    )


def _unsolved(row: _Row, inner_tol: float | None, exact: bool) -> str:
    figures, curvature = f": its relative inner residual is above inner_tol={inner_tol:g}", ""
    if exact:
        figures = (
            f": its relative inner residual is {row.inner:.3g} and inner_tol is {inner_tol:g} "
            f"(params has norm {row.params:.3g}; the norm of the condition is {row.condition:.3g}; "
            f"its scale, curvature times params, is {row.condition / row.inner:.3g})"
        )
        if math.isfinite(row.low):
            curvature = f" The lowest curvature seen is {row.low:.3g}."
    return (
        f"params does not solve the inner problem{figures}. The implicit gradient is exact only at "
        "a solution; its error is of the order of the condition's norm divided by the lowest "
        f"curvature.{curvature} Solve the inner problem further: give its solver more steps, or a "
        "smaller step size (learning rate) where the norm of params grows. Check that it minimises "
        "the loss that inner computes: the same data and penalties (weight decay that the "
        "optimiser adds by itself is no part of inner), outer and inner not exchanged, a module "
        "called by torch.func.functional_call with the given params. Pass inner_tol=None where it "
        "is truncated on purpose."
    )


def _away(row: _Row, exact: bool) -> str:
    figures = (
        f" (the norm of params is {row.params:.3g}, the relative inner residual {row.inner:.3g})"
        if exact
        else ""
    )
    return (
        f"The inner solver has run away{figures}: from params a Newton step of the inner problem "
        "does not change the outer loss as its slope says, so that no implicit gradient there can "
        "be believed. Take a smaller step size (learning rate) in the inner solver, and look at "
        "the norm of params."
    )


def _degenerate(jump: float, kink: str, exact: bool) -> tuple[type[HypergradError], str]:
    if math.isinf(jump):
        return SingularHessian, (
            "The gradients of the active constraints are linearly dependent (LICQ fails), so that "
            "the KKT matrix is singular and the multipliers are not determined; nor is the "
            "derivative, unless the constraints stay consistent as the hyperparameters move. "
            "Leave out the constraints that say the same as others."
        )
    part = f"a part of {jump:.3g}" if exact else "a part"
    return NotDifferentiable, (
        f"params sits at a kink of the inner problem, where the solution has another derivative on "
        f"each side: {kink}. The answer is that of one side, and of the linear system {part} is "
        "different on the other (info.degeneracy). Move the hyperparameters a little, or pass "
        "on_failure='ignore' where either side will do."
    )


def _not_finite(places: Places) -> str:
    for where, tensor, cure in places():
        rows = all_tasks((~torch.isfinite(tensor)).reshape(-1)[None].any(dim=1))
        if bool(rows.any()):
            return (
                f"{where} holds NaN or infinity. {cure()}, or pass on_failure='ignore' to have NaN "
                "left as NaN."
            )
    return "the answer holds NaN or infinity, which the linear solve produced."
