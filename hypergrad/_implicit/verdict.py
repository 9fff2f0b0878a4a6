"""The judgement of a hypergradient: which error is due, in which words."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Sequence
from enum import IntEnum
from typing import NamedTuple, NoReturn

import torch
from torch import Tensor

from .._autograd.host import all_tasks
from .._autograd.torch_pytrees import pytree
from .._autograd.transforms import is_wrapped
from .._errors import (
    Diverged,
    HypergradError,
    IndefiniteHessian,
    NotConverged,
    NotDifferentiable,
    NotFinite,
    SingularHessian,
)
from .._info import SolveInfo, Status
from .._warnings import counted, warn
from ..solvers._base import Solver
from .causes import Place
from .choices import Choices


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
    PRODUCTS = 8
    JUMP = 9


@dataclasses.dataclass(frozen=True)
class Case:
    """An answer as it is judged, beside the figures that the caller sees.

    Attributes
    ----------
    choices : Choices
        The caller's.
    kink : str
        The reason why the inner problem has kinks, for messages.
    noisy : bool
        Whether products were formed by differences.
    cause : Tensor
        A `Cause` for each task.
    eigenvalues, condition, params : callable
        The lowest and the highest Ritz value, and the norms of the inner condition and of the inner
        variables, for each task.
    places : callable
        What went into the answer, by name, in the order of its making.
    """

    choices: Choices
    kink: str
    noisy: bool
    cause: Tensor
    eigenvalues: Callable[[], Tensor]
    condition: Callable[[], Tensor]
    params: Callable[[], Tensor]
    places: Callable[[], Iterable[Place]]


def judge(case: Case, info: SolveInfo, sound: Tensor) -> None:
    """Warn or raise, once for all tasks, if an answer is not what it should be.

    Reads one packed tensor from the device where all is well, nothing with
    ``on_failure="ignore"``. The text of a warning is the same at every call, so that Python's
    filters can show it once; the figures are in the info, and in the text of an error.

    Parameters
    ----------
    case : Case
        What is known about the answer.
    info : SolveInfo
        The figures of it that the caller sees.
    sound : Tensor
        bool, for each task: all numbers of the answer are finite.

    Raises
    ------
    NotFinite
        If a number is not finite, with "warn" too.
    NotConverged, IndefiniteHessian, SingularHessian, Diverged, NotDifferentiable
        If `on_failure` is "raise" and a task failed.
    """
    if not is_good(case, info, sound):
        rows = _rows(case, info, sound)
        _judge_rows([(case, rows)], len(rows), info, "tasks")


def is_good(case: Case, info: SolveInfo, sound: Tensor) -> bool:
    """Say whether nothing is to be said about any task; the arguments are those of `judge`."""
    if case.choices.on_failure == "ignore":
        return True
    good = all_tasks(torch.stack([sound, info.success], dim=-1)).all(dim=0).tolist()
    return all(good)


def judge_outputs(
    failures: Sequence[tuple[Case, SolveInfo, Tensor]], outputs: int, info: SolveInfo
) -> None:
    """Warn or raise, once for all outputs of a function, as `judge` does for tasks.

    Parameters
    ----------
    failures : sequence
        The arguments of `judge`, for each block of outputs that is not good.
    outputs : int
        How many outputs there are in all blocks.
    info : SolveInfo
        The figures of all outputs.

    Raises
    ------
    NotFinite, NotConverged, IndefiniteHessian, SingularHessian, Diverged, NotDifferentiable
        As `judge` does.
    """
    if failures:
        blocks = [(case, _rows(case, part, sound)) for case, part, sound in failures]
        _judge_rows(blocks, outputs, info, "outputs")


def _judge_rows(
    blocks: Sequence[tuple[Case, list[_Row]]], tasks: int, info: SolveInfo, unit: str
) -> None:
    """Warn or raise, by the rows of all blocks in which a task failed."""
    bad = [(case, row) for case, rows in blocks for row in rows if not row.sound]
    if bad:
        said = counted(len(bad), tasks, exact=True, unit=unit)
        _refuse_not_finite(said, bad[0][0].places(), _plain(info))
    case, choices = blocks[0][0], blocks[0][0].choices
    failed = [row for _, rows in blocks for row in rows if not row.success]
    exact = choices.on_failure == "raise"
    worst = _Failure(
        max(failed, key=_Row.severity),
        name=info.method if exact else type(choices.solver).__name__,
        solver=choices.solver,
        inner_tol=choices.inner_tol,
        kink=case.kink,
        noisy=case.noisy,
        exact=exact,
    )
    error, text = worst.diagnosis()
    said = counted(len(failed), tasks, exact=exact, unit=unit) + text(worst)
    if exact:
        raise error(said, info=_plain(info))
    warn(said, error)


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
    product_error: float

    def severity(self) -> tuple[bool, float]:
        """Rank failures of the linear solve first, then by the size of the figure."""
        figure = self.residual if math.isfinite(self.residual) else self.inner
        return self.status != Status.CONVERGED, figure


def _rows(case: Case, info: SolveInfo, sound: Tensor) -> list[_Row]:
    """Read the figures of every task from the device, in one packed tensor."""
    eigenvalues = case.eigenvalues()
    figures = {
        "sound": sound,
        "success": info.success,
        "status": info.status,
        "cause": case.cause,
        "iterations": info.iterations,
        "residual": info.residual_norm,
        "inner": info.inner_residual,
        "low": eigenvalues[..., 0],
        "high": eigenvalues[..., 1],
        "condition": case.condition().expand_as(info.status),
        "params": case.params().expand_as(info.status),
        "degeneracy": info.degeneracy,
        "product_error": info.product_error,
    }
    packed = torch.stack([figures[name].to(torch.float64) for name in _Row._fields], dim=-1)
    return [_Row(*row) for row in all_tasks(packed).tolist()]


def _plain(info: SolveInfo) -> SolveInfo:
    """Free the evidence of all tasks from function transforms, which end with the error."""

    def plain(figure: Tensor) -> Tensor:
        if not is_wrapped(figure):
            return figure.detach()
        pair = figure.ndim > info.status.ndim  # the eigenvalues
        rows = all_tasks(figure if pair else figure.unsqueeze(-1))
        rows = rows if pair else rows.squeeze(-1)
        return rows.reshape(figure.shape) if rows.numel() == figure.numel() else rows

    return pytree.tree_map(plain, info)


class _Failure(NamedTuple):
    """The task that failed worst, and what its text may name."""

    row: _Row
    name: str
    solver: Solver
    inner_tol: float | None
    kink: str
    #: Of products by differences.
    noisy: bool
    #: With the figures: in the text of an error, not in that of a warning.
    exact: bool

    @property
    def at(self) -> str:
        """The residual that was reached."""
        return f", at relative residual {self.row.residual:.3g}" if self.exact else ""

    @property
    def after(self) -> str:
        """The iterations that it took."""
        return f" after {int(self.row.iterations)} iterations" if self.exact else ""

    def diagnosis(self) -> _Diagnosis:
        """Choose the error that is due, and its text: by the cause, else by how the solve ended."""
        cause = Cause(int(self.row.cause))
        if cause is Cause.KINK and math.isinf(self.row.degeneracy):
            return SingularHessian, _dependent
        if cause is not Cause.SOLVE:
            return _OF_CAUSE[cause]
        return _OF_STATUS.get(Status(int(self.row.status)), (NotConverged, _broke_down))


_Diagnosis = tuple[type[HypergradError], Callable[[_Failure], str]]


def _indefinite(failure: _Failure) -> str:
    return (
        f"{failure.name} met negative curvature (p.Ap <= 0){failure.after}{failure.at}: the matrix "
        "is not positive definite, so params is no minimum of the inner problem (a saddle, or a "
        "point far from a solution). Solve the inner problem further, with a smaller step size "
        "(learning rate) of the inner solver where the norm of params grows; add damping, or use a "
        "GaussNewton condition, whose curvature cannot be negative. Where params is not meant to "
        "be a minimum, say Root(..., symmetric=True), which MINRES() and Exact() solve."
    )


def _rank(failure: _Failure) -> str:
    return (
        "The matrix is singular, so that the derivative of the solution is not determined: the "
        "solution is one of several, or the conditions contradict each other a little further on "
        f"({failure.name}{', rank lost' if failure.exact else ''}). Where a quantity is conserved, "
        "put its equation into the condition in place of one that says the same as others; else "
        "add damping=..., or a regulariser to the inner problem."
    )


def _unsolved(failure: _Failure) -> str:
    row, inner_tol, curvature = failure.row, failure.inner_tol, ""
    figures = f": its relative inner residual is above inner_tol={inner_tol:g}"
    if failure.exact:
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


def _jumps(failure: _Failure) -> str:
    figure = f" (its norm there is {failure.row.condition:.3g})" if failure.exact else ""
    return (
        "The inner condition jumps at params, where it does not vanish"
        f"{figure}: the objective has a kink there, of abs, relu, max or a hinge loss, say. "
        "The implicit gradient needs a condition that is zero at the solution. Leave the smooth "
        "part in the objective and pass the rest as a proximal map: argmin(..., prox=...) or "
        "ProximalGradient, with hypergrad.prox.l1 for an absolute value. Or take a smooth loss "
        "in its place, softplus or Huber's, or write the problem with constraints, as KKT."
    )


def _away(failure: _Failure) -> str:
    row = failure.row
    figures = (
        f" (the norm of params is {row.params:.3g}, the relative inner residual {row.inner:.3g})"
        if failure.exact
        else ""
    )
    return (
        f"The inner solver has run away{figures}: from params a Newton step of the inner problem "
        "does not change the outer loss as its slope says, so that no implicit gradient there can "
        "be believed. Take a smaller step size (learning rate) in the inner solver, and look at "
        "the norm of params."
    )


def _approximated(failure: _Failure) -> str:
    return (
        "The curvature that GaussNewton leaves out of the Hessian changes the answer: the "
        "residuals at params are large, or the model bends"
        + (f" (params has norm {failure.row.params:.3g})" if failure.exact else "")
        + ". Use Minimum, whose curvature is the whole Hessian, or inner_tol=None where the "
        "approximation is meant."
    )


def _units(failure: _Failure) -> str:
    return (
        f"{failure.name} met its tolerance in units that hide an error: rows of the matrix differ "
        f"by so much that the residual{failure.at[1:]} is that of the largest alone. Use Exact(), "
        "which takes no notice of units; scale the variables to one size; or pass a preconditioner "
        "and a smaller rtol."
    )


def _differenced(failure: _Failure) -> str:
    error = f" by about {failure.row.product_error:.2g}" if failure.exact else ""
    return (
        'Products by differences (products="difference") are not sure enough: another step size '
        f"changes the answer{error}. The arithmetic is too coarse (autocast, half precision), the "
        "loss has kinks (ReLU) near params, or leaves of params have very different scales, which "
        "one step cannot suit. Compute the inner loss in float32 or float64; take "
        'products="exact" where the model has second derivatives; or pass a larger inner_tol where '
        "so much will do (info.error_estimate says how much)."
    )


def _kinked(failure: _Failure) -> str:
    jump = f"a part of {failure.row.degeneracy:.3g}" if failure.exact else "a part"
    return (
        "params sits at a kink of the inner problem, where the solution has another derivative on "
        f"each side: {failure.kink}. The answer is that of one side, and of the linear system "
        f"{jump} is different on the other (info.degeneracy). Move the hyperparameters a little, "
        "or pass on_failure='ignore' where either side will do."
    )


def _dependent(failure: _Failure) -> str:
    return (
        "The gradients of the active constraints are linearly dependent (LICQ fails), so that "
        "the KKT matrix is singular and the multipliers are not determined; nor is the "
        "derivative, unless the constraints stay consistent as the hyperparameters move. "
        "Leave out the constraints that say the same as others."
    )


_OF_CAUSE: dict[Cause, _Diagnosis] = {
    Cause.CURVATURE: (IndefiniteHessian, _indefinite),
    Cause.RANK: (SingularHessian, _rank),
    Cause.INNER: (NotConverged, _unsolved),
    Cause.AWAY: (NotConverged, _away),
    Cause.APPROXIMATION: (NotConverged, _approximated),
    Cause.KINK: (NotDifferentiable, _kinked),
    Cause.UNITS: (NotConverged, _units),
    Cause.PRODUCTS: (NotConverged, _differenced),
    Cause.JUMP: (NotConverged, _jumps),
}


def _ran_out(failure: _Failure) -> str:
    if not hasattr(failure.solver, "terms") and not hasattr(failure.solver, "maxiter"):
        return (
            f"{failure.name} did not reach its tolerance{failure.at}. Let it go on for longer, or "
            "use CG() or GMRES()."
        )
    cure = (
        "terms, loosen rtol, or use CG() or GMRES(), which need fewer products."
        if hasattr(failure.solver, "terms")
        else "maxiter, loosen rtol, add damping, or pass a preconditioner; "
        "x0=last_info.solution starts from the last answer."
    )
    return f"{failure.name} ran out of iterations{failure.after}{failure.at}. Raise {cure}"


def _insoluble(failure: _Failure) -> str:
    residual = f", relative residual {failure.row.residual:.3g}" if failure.exact else ""
    return (
        f"The matrix is singular and the system has no solution ({failure.name}{residual}). Add "
        "damping=..., or a regulariser to the inner problem."
    )


def _diverged(failure: _Failure) -> str:
    high, bound = failure.row.high, ""
    if failure.exact and math.isfinite(high) and high > 0:
        bound = f" The largest eigenvalue is {high:.3g}: a step_size of {1 / (1.5 * high):.3g} is"
        bound += " safe."
    cure = "Leave step_size=None to have it estimated, or use CG() or GMRES()."
    if getattr(failure.solver, "step_size", None) is None:
        cure = (
            "So they do with any step where the matrix has an eigenvalue whose real part is not "
            "positive. Use MINRES() where it is symmetric, GMRES(), or damping."
        )
    grew = f" ({failure.at[5:]})" if failure.at else ""
    return f"{failure.name} diverged: its terms grew{grew}.{bound} {cure}"


def _stagnated(failure: _Failure) -> str:
    if failure.noisy:
        return (
            f"{failure.name} came no closer{failure.at}: products by differences hide the rest. "
            'Take products="exact" where the model has second derivatives, a GaussNewton '
            "condition, whose curvature cannot be negative, or float64; train the inner problem "
            "further, or add damping."
        )
    return (
        f"{failure.name} stagnated at the rounding floor of the dtype{failure.at}. Use float64, "
        "loosen rtol, or pass a preconditioner."
    )


def _broke_down(failure: _Failure) -> str:
    return f"{failure.name} broke down{failure.after}{failure.at}. Use GMRES() or Exact()."


_OF_STATUS: dict[Status, _Diagnosis] = {
    Status.MAX_ITERATIONS: (NotConverged, _ran_out),
    Status.NEGATIVE_CURVATURE: (IndefiniteHessian, _indefinite),
    Status.SINGULAR: (SingularHessian, _insoluble),
    Status.DIVERGED: (Diverged, _diverged),
    Status.STAGNATED: (NotConverged, _stagnated),
}


def _refuse_not_finite(tasks: str, places: Iterable[Place], info: SolveInfo) -> NoReturn:
    """Raise, naming the first place where a number is not finite."""
    for place in places:
        rows = all_tasks((~torch.isfinite(place.tensor)).reshape(-1)[None].any(dim=1))
        if bool(rows.any()):
            raise NotFinite(
                f"{tasks}{place.where} holds NaN or infinity. {place.cure()}, or pass "
                "on_failure='ignore' to have NaN left as NaN.",
                info=info,
                leaf=place.leaf,
                argument=place.argument,
            )
    raise NotFinite(
        f"{tasks}the answer holds NaN or infinity, which the linear solve produced.", info=info
    )
