"""Where an answer is judged: what is warned of or raised, in which words."""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ._degeneracy import DEGENERATE
from ._errors import (
    ConvergenceWarning,
    Diverged,
    HypergradError,
    IndefiniteHessian,
    NotConverged,
    NotDifferentiable,
    NotFinite,
    SingularHessian,
)
from ._info import SolveInfo, Status
from ._transforms import all_tasks
from ._tree import Tree
from .solvers._base import Solution, Solver

OnFailure = Literal["warn", "raise", "ignore"]
#: Where a number came from, and the tensors to look at: called only when one is not finite.
Places = Callable[[], Iterable[tuple[str, Tensor]]]

_HERE = str(Path(__file__).parent)


def check_on_failure(on_failure: str) -> None:
    """Refuse an `on_failure` that is none of the three."""
    if on_failure not in ("warn", "raise", "ignore"):
        raise ValueError(f"on_failure must be 'warn', 'raise' or 'ignore'; got {on_failure!r}.")


def may_look(solver: Solver, on_failure: OnFailure) -> bool:
    """Whether the host may read values while a system is solved; a GPU is waited for each time."""
    return on_failure != "ignore" or getattr(solver, "rtol", None) != 0


def judge(
    info: SolveInfo,
    found: Solution,
    solver: Solver,
    *,
    inner_tol: float | None,
    on_failure: OnFailure,
    condition: Tensor,
    sound: Tensor,
    places: Places,
    kink: str = "",
) -> None:
    """Warn or raise, once for all tasks, if an answer is not what it should be.

    Reads one packed tensor from the device where all is well, nothing with
    ``on_failure="ignore"``.

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
    condition : Tensor
        The norm of the inner condition, for each task.
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
    figures = (
        sound,
        info.success,
        info.status,
        info.iterations,
        info.residual_norm,
        info.inner_residual,
        *found.eigenvalues.unbind(dim=-1),
        condition.expand_as(info.status),
        info.degeneracy,
    )
    rows = all_tasks(torch.stack([f.to(torch.float64) for f in figures], dim=-1)).tolist()
    bad = [row for row in rows if not row[0]]
    if bad:
        raise NotFinite(_count(len(bad), len(rows), exact=True) + _not_finite(places))
    failed = [row for row in rows if not row[1]]
    worst = max(failed, key=_severity)
    exact = on_failure == "raise"
    error, text = _diagnose(worst, info.method, solver, inner_tol, kink, exact=exact)
    text = _count(len(failed), len(rows), exact=exact) + text
    if on_failure == "raise":
        raise error(text)
    warn(text)


def warn(text: str) -> None:
    """Issue a `ConvergenceWarning` at the line that called the library."""
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


def _severity(row: Sequence[float]) -> tuple[bool, float]:
    """Failures of the linear solve first, then by the size of the figure."""
    status, residual, inner = row[2], row[4], row[5]
    return status != Status.CONVERGED, residual if math.isfinite(residual) else inner


def _count(failed: int, tasks: int, *, exact: bool) -> str:
    """How many tasks failed; in a warning exact up to three, since it moves from step to step."""
    if tasks == 1:
        return ""
    few = exact or failed <= 3
    return f"{failed if few else 'more than 3'} of {tasks} tasks: "


def _diagnose(
    row: Sequence[float],
    name: str,
    solver: Solver,
    inner_tol: float | None,
    kink: str,
    *,
    exact: bool,
) -> tuple[type[HypergradError], str]:
    _, _, status, iterations, residual, inner, low, high, condition, degeneracy = row
    at = f"relative residual {_figure(residual, exact)}"
    after = f" after {int(iterations)} iterations" if exact else ""
    match Status(int(status)):
        case Status.MAX_ITERATIONS if not _inner_alone(row, inner_tol, solver):
            cure = (
                "terms, loosen rtol, or use CG() or GMRES(), which need fewer products."
                if hasattr(solver, "terms")
                else "maxiter, loosen rtol, add damping, or pass a preconditioner; "
                "x0=last_info.solution starts from the last answer."
            )
            return NotConverged, (f"{name} ran out of iterations{after}, at {at}. Raise {cure}")
        case Status.NEGATIVE_CURVATURE:
            return IndefiniteHessian, (
                f"{name} met negative curvature (p.Ap <= 0){after}, at "
                f"{at}: the matrix is not positive definite, so params is no minimum of the inner "
                "problem or the iterate is far from one. Add damping, use MINRES() or "
                "Exact(), or a GaussNewton condition, whose curvature cannot be negative."
            )
        case Status.SINGULAR:
            return SingularHessian, (
                f"The matrix is singular and the system has no solution ({name}, {at}). Add "
                "damping=..., or a regulariser to the inner problem."
            )
        case Status.DIVERGED:
            bound = (
                f" The largest eigenvalue is {_figure(high, exact)}: a step_size of "
                f"{_figure(1 / (1.5 * high), exact)} is safe."
                if math.isfinite(high) and high > 0
                else ""
            )
            cure = "Leave step_size=None to have it estimated, or use CG() or GMRES()."
            if getattr(solver, "step_size", None) is None:
                cure = (
                    "So they do with any step where the matrix has an eigenvalue whose real part "
                    "is not positive. Use MINRES() where it is symmetric, GMRES(), or damping."
                )
            return Diverged, f"{name} diverged: its terms grew ({at}).{bound} {cure}"
        case Status.STAGNATED:
            if not exact and 0 < residual < math.inf:
                # Rounding itself, which moves from call to call more than other figures.
                at = f"relative residual below 1e{math.ceil(math.log10(residual)):d}"
            return NotConverged, (
                f"{name} stagnated at the rounding floor of the dtype, at {at}. Use float64, "
                "loosen rtol, or pass a preconditioner."
            )
        case Status.BREAKDOWN:
            return NotConverged, (f"{name} broke down{after}, at {at}. Use GMRES() or Exact().")
    if degeneracy > DEGENERATE and not (inner_tol is not None and inner > inner_tol):
        return _degenerate(degeneracy, kink, exact)
    curvature = (
        f" The lowest curvature seen is {_figure(low, exact)}." if math.isfinite(low) else ""
    )
    # In a warning one rounded figure is enough: each more would show it again in a loop.
    norm_and_scale = (
        f" (the norm of the condition is {condition:.3g}; its scale, curvature times params, is "
        f"{condition / inner:.3g})"
        if exact
        else ""
    )
    return NotConverged, (
        f"params does not solve the inner problem: its relative inner residual is "
        f"{_figure(inner, exact)} and inner_tol is {inner_tol:g}{norm_and_scale}. The implicit "
        "gradient is exact only at a solution; its error is of the order of the condition's norm "
        f"divided by the lowest curvature.{curvature} Solve the inner problem further, and "
        "with the loss that inner computes: the same data and penalties, outer and inner not "
        "exchanged, a module called by torch.func.functional_call with the given params. Pass "
        "inner_tol=None where it is truncated on purpose."
    )


def _degenerate(jump: float, kink: str, exact: bool) -> tuple[type[HypergradError], str]:
    if math.isinf(jump):
        return SingularHessian, (
            "The gradients of the active constraints are linearly dependent (LICQ fails), so that "
            "the KKT matrix is singular and the multipliers are not determined; nor is the "
            "derivative, unless the constraints stay consistent as the hyperparameters move. "
            "Leave out the constraints that say the same as others."
        )
    return NotDifferentiable, (
        f"params sits at a kink of the inner problem, where the solution has another derivative on "
        f"each side: {kink}. The answer is that of one side, and of the linear system a part of "
        f"{_figure(jump, exact)} is different on the other (info.degeneracy). Move the "
        "hyperparameters a little, or pass on_failure='ignore' where either side will do."
    )


def _inner_alone(row: Sequence[float], inner_tol: float | None, solver: Solver) -> bool:
    """Whether a linear solve that used up its budget is no failure by itself."""
    unsolved = inner_tol is not None and row[5] > inner_tol
    return (unsolved or row[9] > DEGENERATE) and getattr(solver, "rtol", None) is None


def _figure(value: float, exact: bool) -> str:
    """A figure, rounded to a power of ten so that a loop warns once."""
    if exact or not math.isfinite(value) or value == 0:
        return f"{value:.3g}"
    return f"about 1e{round(math.log10(abs(value))):d}" if value > 0 else f"{value:.0e}"


def _not_finite(places: Places) -> str:
    for where, tensor in places():
        rows = all_tasks((~torch.isfinite(tensor)).reshape(-1)[None].any(dim=1))
        if bool(rows.any()):
            return (
                f"{where} holds NaN or infinity. Look at the data and the step size of the inner "
                "solver, or pass on_failure='ignore' to have NaN left as NaN."
            )
    return "the answer holds NaN or infinity, which the linear solve produced."
