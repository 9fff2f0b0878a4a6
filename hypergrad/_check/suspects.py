"""The suspects of a wrong hypergradient, one by one: a name, a question, and how to look."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .._errors import HypergradError, NotFinite
from .._info import Status
from ..conditions._gauss_newton import GaussNewton
from ..conditions._minimum import Minimum
from ..solvers import Identity
from .determinism import not_deterministic, restless
from .differences import Direction, derivative, first_step
from .parts import Case


class When(enum.Flag):
    """The point of a check at which a suspect is asked about."""

    #: Before derivatives are compared.
    FIRST = enum.auto()
    #: After that, even where they agree.
    ALWAYS = enum.auto()
    #: Where the differences are too uncertain to show anything.
    UNCERTAIN = enum.auto()
    #: Where the derivatives are apart.
    APART = enum.auto()
    #: Where they agree and their terms cancel, which may hide a fault.
    CANCELLED = enum.auto()


@dataclasses.dataclass(eq=False)
class Trial:
    """A problem under suspicion, and the direction in which its derivatives were compared.

    Attributes
    ----------
    case : Case
        The problem.
    line : Direction
        Where the derivatives disagree most.
    implicit, difference, error : float
        The implicit derivative along it, the difference, and the difference's estimated error.
    useless : bool
        The differences are too uncertain to show anything.
    agrees : callable
        Whether a hypergradient agrees with the differences.
    multiplier : Tensor or None
        The vector that the inner condition is multiplied by; None: the solution of the linear
        system.
    """

    case: Case
    line: Direction
    implicit: float = math.nan
    difference: float = math.nan
    error: float = math.nan
    useless: bool = False
    agrees: Callable[[Sequence[Tensor]], bool] = lambda gradient: False
    multiplier: Tensor | None = None

    @property
    def gap(self) -> float:
        """By how much the two derivatives differ."""
        return self.implicit - self.difference

    @cached_property
    def u(self) -> Tensor:
        """The vector that the inner condition is multiplied by."""
        if self.multiplier is not None:
            return self.multiplier
        return self.case.adjoint(self.case.exactly[1])

    @cached_property
    def v(self) -> Tensor:
        """A direction of unit length in the inner variables."""
        return _unit(self.case.flat(self.case.solution), 3)

    @cached_property
    def rounding(self) -> float:
        """The rounding of a difference of the condition, whose terms may be far above their sum."""
        case, flat = self.case, self.case.flat(self.case.solution)
        size = case.linearised(case.solution, case.at).transposed(self.v).norm()
        terms = float(self.u.norm() * size * flat.norm()) * flat.numel() ** 0.5
        return 10 * torch.finfo(case.precision).eps * terms / first_step(case.precision)

    def condition(self, params: Any, variables: Sequence[Tensor]) -> float:
        """Evaluate the inner condition at some point, times `u`."""
        return float(self.u @ self.case.linearised(params, variables).residual)

    def differs(
        self, slope: float, f: Callable[[float], float], length: float, allowed: float
    ) -> bool:
        """See whether a slope is not that of a function, by more than is allowed."""
        case = self.case
        expected, error = derivative(f, length, case.precision, 0.1 * case.rtol, abs(self.gap))
        return abs(slope - expected) > allowed + 4 * error + self.rounding / length


Look = Callable[[Trial], str | None]


@dataclasses.dataclass(frozen=True)
class Suspect:
    """One part of a bi-level problem that may be at fault.

    Attributes
    ----------
    name : str
        The part, which the report blames.
    question : str
        The question that is asked; the part is at fault where the answer is no.
    when : When
        At which points it is asked.
    look : callable
        The evidence against the part, and what to try; None where there is none.
    """

    name: str
    question: str
    when: When
    look: Look


@dataclasses.dataclass(frozen=True)
class Finding:
    """A suspect and the evidence against it."""

    suspect: Suspect
    evidence: str


#: In the order in which they are asked about: that of the functions below.
SUSPECTS: list[Suspect] = []

_NOT_CONNECTED = "hyperparameter not connected"
_GRADIENT = "implicit gradient"
_SYSTEM = "linear system not solved"
_UNSOLVED = "inner problem not solved"
_SAME_WAY = "Do solve and inner use hparams in the same way?"
_FURTHER = "Is the inner problem solved as far as the derivatives need?"


def _suspect(name: str, question: str, when: When) -> Callable[[Look], Look]:
    """List what a function looks for as the next suspect."""

    def listed(look: Look) -> Look:
        SUSPECTS.append(Suspect(name, question, when, look))
        return look

    return listed


def first(when: When, trial: Trial) -> Finding | None:
    """Ask about the suspects in their order, until there is evidence against one.

    Parameters
    ----------
    when : When
        At which point the check is.
    trial : Trial
        What is known.

    Returns
    -------
    finding : Finding or None
        The first suspect that is at fault.
    """
    for suspect in SUSPECTS:
        if when in suspect.when:
            evidence = suspect.look(trial)
            if evidence is not None:
                return Finding(suspect, evidence)
    return None


def hiding(case: Case, line: Direction) -> Trial | None:
    """Look for a fault that a hypergradient does not show, since its terms cancel.

    Parameters
    ----------
    case : Case
        The problem.
    line : Direction
        Along which they do.

    Returns
    -------
    trial : Trial or None
        What to ask the suspects about, where there is a fault.
    """
    step = first_step(case.precision) * line.length / 4
    ends = [case.flat(case.solved(line.moved(case.at, sign * step))) for sign in (1, -1)]
    lin = case.linearised(case.solution, case.at, forward=True, cross_forward=True)
    by_params = lin.product((ends[0] - ends[1]) / (2 * step))
    by_hparams = lin.cross_forward(line.tangents)
    gap = by_params + by_hparams
    u = _random(gap, 5)
    # A solution moves a little by rounding with whatever its solver uses, such as a step size.
    terms = float(lin.transposed(u).norm() / u.norm()) * float(case.flat(case.solution).norm())
    least = max(
        float(by_params.norm()), float(by_hparams.norm()), 50 * case.rtol * terms / line.length
    )
    if not float(gap.norm()) > 0.1 * least:
        return None
    return Trial(case, line, implicit=float(u @ gap), difference=0.0, multiplier=u)


# --- before derivatives are compared ---------------------------------------------------------


@_suspect("loss not deterministic", "Do outer and inner have the same values twice?", When.FIRST)
def _changes(trial: Trial) -> str | None:
    return not_deterministic(trial.case)


@_suspect(_NOT_CONNECTED, "Do outer and inner use hparams as they are given it?", When.FIRST)
def _hparams_not_connected(trial: Trial) -> str | None:
    refused = trial.case.refused
    return refused.args[0] if refused is not None and refused.argument == "hparams" else None


@_suspect("params not connected", "Do outer and inner use params as they are given it?", When.FIRST)
def _params_not_connected(trial: Trial) -> str | None:
    refused = trial.case.refused
    return None if refused is None else refused.args[0]


@_suspect(_SYSTEM, "Does the linear solver return finite numbers?", When.FIRST)
def _system_not_finite(trial: Trial) -> str | None:
    error = None if trial.case.finite else trial.case.judgement
    return None if error is None or isinstance(error, NotFinite) else error.args[0]


@_suspect("not finite", "Are the losses and the hypergradient finite?", When.FIRST)
def _not_finite(trial: Trial) -> str | None:
    if trial.case.finite:
        return None
    return str(trial.case.judgement or "The hypergradient holds NaN or infinity.")


# --- even where they agree -------------------------------------------------------------------


@_suspect(_GRADIENT, "Is the gradient of inner that of its values?", When.ALWAYS)
def _no_gradient(trial: Trial) -> str | None:
    """Look for an objective whose gradient, the condition, is not its own."""
    case = trial.case
    if not isinstance(case.condition, Minimum):
        return None
    lin = case.linearised(case.solution, case.at)
    flat = case.flat(case.solution)
    length = float(flat.norm()) or 1.0
    v = _unit(flat, 4)
    terms = float(lin.transposed(v).norm()) * length
    expected, error = derivative(
        lambda s: case.objective(case.at_params(flat + s * v)),
        length,
        case.precision,
        1e-3,
        terms,
    )
    if not abs(float(lin.residual @ v) - expected) > 1e-2 * terms + 4 * error:
        return None
    return (
        f"The gradient of inner is {float(lin.residual @ v):.3g} along a random direction in "
        f"params and the difference of its values {expected:.3g}: look in inner for a .detach(), a "
        "torch.no_grad(), or a custom Function whose backward is wrong."
    )


def unsymmetric(case: Case, least: float = 0.0) -> str | None:
    """Look for a matrix that is further than `least` from the symmetry that is declared of it."""
    if case.plain is case.condition or not case.condition.symmetric:
        return None
    lin = case.linearised(case.solution, case.at)
    u, v = (_random(lin.residual, seed) for seed in (1, 2))
    there, back = lin.transposed(u), lin.transposed(v)
    scale = float(u.norm() * back.norm() + v.norm() * there.norm())
    apart = abs(float(v @ there - u @ back)) / max(scale, 1e-300)
    if not apart > max(least, 1e3 * torch.finfo(case.precision).eps):
        return None
    return (
        f"{type(case.condition).__name__} is declared symmetric=True, but u.Av and v.Au differ by "
        f"{apart:.1e}, relatively. Declare symmetric=False."
    )


@_suspect(_GRADIENT, "Is the matrix symmetric, as declared?", When.ALWAYS)
def _unsymmetric(trial: Trial) -> str | None:
    return unsymmetric(trial.case, trial.case.rtol)


# --- where they disagree, or the differences are too uncertain -------------------------------


@_suspect(
    "solve not deterministic",
    "Does solve return the same params twice?",
    When.UNCERTAIN | When.APART,
)
def _restless(trial: Trial) -> str | None:
    apart = restless(trial.case, trial.line, trial.error if trial.useless else trial.gap)
    if apart is None:
        return None
    return (
        f"Two calls of solve with the same hparams and the same state of PyTorch's generators "
        f"returned params that are {apart:.1e} apart, relatively. Start it in the same way at "
        "each call, from a fixed seed and not from the last answer."
    )


@_suspect("not finite", "Is outer finite a step away?", When.UNCERTAIN)
def _edge(trial: Trial) -> str | None:
    if math.isfinite(trial.difference):
        return None
    step = first_step(trial.case.precision) * trial.line.length
    return (
        f"outer(solve(hparams), hparams) is finite at hparams and not a step of {step:.1e} away "
        f"along {trial.line.label}: the edge of a domain, or a solver that diverges there. Check "
        "at hparams further inside, or use the logarithm of a hyperparameter that must be positive."
    )


@_suspect(_UNSOLVED, _FURTHER, When.UNCERTAIN)
def _unsolved(trial: Trial) -> str | None:
    """Look for an inner problem whose derivatives agree once it is solved further."""
    case, line = trial.case, trial.line
    try:
        params = case.newton(case.solution, case.at)
        gradient, after = case.implicit(case.exact, params, case.plain)
        implicit = line.dot(gradient)
        difference, error = derivative(
            case.along(line, refined=True),
            line.length,
            case.precision,
            0.1 * case.rtol,
            1e-3 * abs(implicit),
        )
    except HypergradError:
        implicit = difference = error = math.nan
    size = max(abs(implicit), abs(difference))
    agree = abs(implicit - difference) <= case.rtol * size + 4 * error and error <= 0.1 * size
    before = float(case.exactly[1].inner_residual)
    if agree:
        text = (
            f"Newton steps take it to {float(after.inner_residual):.1e}, and there the two "
            f"agree: {implicit:.6g} and {difference:.6g} along {line.label}; here they are "
            f"{trial.implicit:.6g} and {trial.difference:.6g}."
        )
    elif before > 1e-3:
        text = "The implicit gradient is exact at a solution only."
    else:
        return None
    return (
        f"The params that solve returns have the relative inner residual {before:.1e}. {text} "
        "Give the inner solver more steps or a smaller tolerance; look whether it minimises "
        "the same loss as inner, with the same hparams."
    )


def _drowned(trial: Trial) -> bool:
    """See whether the error of a difference is that of rounding in the outer loss."""
    case, value = trial.case, trial.case.value(trial.case.solution, trial.case.at)
    rounding = torch.finfo(case.precision).eps * abs(value) / first_step(case.precision)
    return trial.error < 30 * rounding / trial.line.length


@_suspect(_NOT_CONNECTED, _SAME_WAY, When.UNCERTAIN)
def _unheard_in_rounding(trial: Trial) -> str | None:
    return _unheard(trial) if _drowned(trial) else None


@_suspect(
    "lost in rounding", "Does a step in hparams change outer by more than rounding?", When.UNCERTAIN
)
def _lost(trial: Trial) -> str | None:
    if not _drowned(trial):
        return None
    case = trial.case
    return (
        f"outer is {case.value(case.solution, case.at):.3g}, and a step along {trial.line.label} "
        f"changes it by so little that the difference, {trial.difference:.3g}, has an estimated "
        f"error of {trial.error:.1e}: it shows nothing. Leave out of outer what does not depend on "
        "params and hparams"
        + (", or scale the problem." if case.precision == torch.float64 else ", use float64.")
    )


@_suspect("solve not smooth", "Do differences at all step sizes agree?", When.UNCERTAIN)
def _rough(trial: Trial) -> str | None:
    in_float64 = trial.case.precision == torch.float64
    return (
        f"Differences along {trial.line.label} at different step sizes disagree: "
        f"{trial.difference:.3g} with an estimated error of {trial.error:.1e}. The solution jumps "
        "or is rough there: solve to a smaller tolerance, with a fixed number of steps"
        + ("." if in_float64 else ", and in float64: these are rounded.")
    )


# --- where they disagree ---------------------------------------------------------------------


@_suspect(_GRADIENT, "Is the matrix symmetric to rounding, as declared?", When.APART)
def _unsymmetric_beyond_rounding(trial: Trial) -> str | None:
    return unsymmetric(trial.case)


@_suspect(_SYSTEM, "Is the linear system solved as far as the hypergradient needs?", When.APART)
def _mended(trial: Trial) -> str | None:
    return _of_system(trial, mended=True) if trial.agrees(trial.case.exactly[0]) else None


@_suspect(
    _NOT_CONNECTED,
    "Are the derivatives of outer and inner by hparams their own?",
    When.APART | When.CANCELLED,
)
def _by_hparams(trial: Trial) -> str | None:
    """Look for a derivative by the hyperparameters that is not the function's own."""
    case, line = trial.case, trial.line
    lin = case.linearised(case.solution, case.at)
    _, direct = case.slopes()

    def moved(f: Callable[[Any, Sequence[Tensor]], float]) -> Callable[[float], float]:
        return lambda step: f(case.solution, line.moved(case.at, step))

    for name, slope, f in (
        ("outer", line.dot(direct), moved(case.value)),
        ("the condition of inner", line.dot(lin.cross(trial.u)), moved(trial.condition)),
    ):
        if trial.differs(slope, f, line.length, 0.3 * abs(trial.gap)):
            return (
                f"{name} changes with {line.leaf or 'hparams'} in a way that its derivative "
                "does not see: look for a .detach(), a .item(), a torch.no_grad(), a copy or a "
                f"custom Function whose backward uses detached values (found along {line.label})."
            )
    return None


@_suspect(
    _GRADIENT,
    "Are the derivatives of outer and inner by params their own?",
    When.APART | When.CANCELLED,
)
def _by_params(trial: Trial) -> str | None:
    """Look for a derivative by the inner variables that is not the function's own."""
    case, v = trial.case, trial.v
    cotangent, _ = case.slopes()
    lin, flat = case.linearised(case.solution, case.at), case.flat(case.solution)
    length = float(flat.norm()) or 1.0
    cut = (
        "a .detach(), a torch.no_grad(), or a custom Function whose backward is wrong or "
        "uses detached values"
    )
    of_condition = cut
    if isinstance(case.condition, GaussNewton):
        of_condition = (
            "the Gauss-Newton matrix is not the Hessian where the residuals are not "
            "small, and GaussNewton is meant for that; otherwise"
        ) + f" look for {cut}"

    def moved(f: Callable[[Any, Sequence[Tensor]], float]) -> Callable[[float], float]:
        return lambda step: f(case.at_params(flat + step * v), case.at)

    bend = float(lin.transposed(trial.u) @ v)
    for name, slope, f, why in (
        ("outer", float(cotangent @ v), moved(case.value), cut),
        ("the condition of inner", bend, moved(trial.condition), of_condition),
    ):
        if trial.differs(slope, f, length, 1e-2 * abs(slope)):
            return f"{name} changes with params in a way that its derivative does not see: {why}."
    return None


@_suspect("solve not smooth", "Has the solution the same slope on both sides?", When.APART)
def _kinked(trial: Trial) -> str | None:
    """Look for a solution whose slopes on the two sides differ, however small the step."""
    case, line = trial.case, trial.line
    f, centre = case.along(line), case.value(case.solution, case.at)
    step = first_step(case.precision) * line.length / 4
    sides = []
    for length in (step, step / 8):
        sides.append(((f(length) - centre) / length, (centre - f(-length)) / length))
    (up, down), (near_up, near_down) = sides
    jump, near = abs(up - down), abs(near_up - near_down)
    rounding = 100 * torch.finfo(case.precision).eps * abs(centre) / (step / 8)
    if not (0.7 * jump < near < 1.5 * jump and near > 0.1 * abs(trial.gap) + rounding):
        return None
    return (
        f"Along {line.label} the slope is {near_up:.6g} on one side and {near_down:.6g} on the "
        "other: hparams lies on a kink (a ReLU, an abs, a clamp, a constraint that is just "
        "active), where there is no derivative. Check at hparams a little away."
    )


@_suspect(_SYSTEM, "Has the linear system a solution?", When.APART)
def _singular(trial: Trial) -> str | None:
    singular = Status(int(trial.case.exactly[1].status)) == Status.SINGULAR
    return _of_system(trial, mended=False) if singular else None


@_suspect(_NOT_CONNECTED, _SAME_WAY, When.APART | When.CANCELLED)
def _unheard(trial: Trial) -> str | None:
    """Look for a hyperparameter that `solve` and `inner` do not use in the same way."""
    case, line = trial.case, trial.line
    step = first_step(case.precision) * line.length / 4
    up, down = (line.moved(case.at, sign * step) for sign in (1, -1))
    p_up, p_down = case.solved(up), case.solved(down)

    def slope(params: tuple[Any, Any]) -> Tensor:
        ends = [case.linearised(p, h).residual for p, h in zip(params, (up, down), strict=True)]
        return (ends[0] - ends[1]) / (2 * step)

    lin = case.linearised(case.solution, case.at, forward=True)
    dp = (case.flat(p_up) - case.flat(p_down)) / (2 * step)
    by_params = float(lin.product(dp).norm())
    by_hparams = float(slope((case.solution, case.solution)).norm())
    name = line.leaf or "hparams"
    if by_hparams == 0 and by_params > 0:
        return (
            f"solve moves with {name} and inner does not depend on it: a closure captures it, "
            "a .detach() cuts it off, or solve alone uses it (a learning rate, a start). Use "
            "the argument that inner is given."
        )
    if not bool(dp.any()) and by_hparams > 0:
        return (
            f"inner depends on {name} and solve returns the same params whatever it is: solve "
            "uses a captured value in place of its argument, or does nothing."
        )
    scale = max(by_params, by_hparams)
    solved = float(lin.residual.norm()) <= 0.1 * step * scale
    if solved and float(slope((p_up, p_down)).norm()) > 0.1 * scale:
        return (
            f"inner and solve do not use {name} in the same way: params solves the inner "
            "problem at hparams, and not a step away. Look for a captured value, or a part of "
            "the loss that one of the two leaves out."
        )
    return None


@_suspect(_UNSOLVED, _FURTHER, When.APART)
def _unsolved_alone(trial: Trial) -> str | None:
    return _unsolved(trial) if bool(trial.case.exactly[1].success) else None


@_suspect(_SYSTEM, "Does the linear solver report success?", When.APART)
def _failed(trial: Trial) -> str | None:
    case = trial.case
    solved = bool(case.exactly[1].success and case.hypergradient[1].success)
    return None if solved else _of_system(trial, mended=False)


@_suspect(_GRADIENT, "Does inner state what solve solves?", When.APART)
def _unexplained(trial: Trial) -> str | None:
    return (
        f"Along {trial.line.label} the implicit derivative is {trial.implicit:.6g} and the "
        f"difference {trial.difference:.6g}, though the inner problem and the linear system are "
        "solved. Does inner state what solve solves, and is the solution an isolated one?"
    )


def _of_system(trial: Trial, *, mended: bool) -> str:
    """Say how the linear solver ended; `mended`: the answer of another one agrees."""
    case = trial.case
    _, info = case.hypergradient
    so = "; with the system solved the gradient agrees" if mended else ""
    seen = (
        f"{info.method} ended with {Status(int(info.status)).name} at the relative residual "
        f"{float(info.residual_norm):.1e}{so}."
    )
    damping = getattr(case.solver, "damping", 0.0)
    if isinstance(case.solver, Identity):
        return f"Identity takes A for a multiple of the identity, which it is not{so}. Use CG."
    if damping and bool(info.success):
        return (
            f"With damping={damping:g} the solver solves (A + damping I) u = b, which is another "
            f"system{so}. Leave the damping out, or make it smaller; where it is meant, pass an "
            "rtol to check_hypergrad."
        )
    return f"{seen} {case.judgement or 'Raise maxiter (terms for Neumann) and set rtol.'}"


def _random(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _unit(like: Tensor, seed: int) -> Tensor:
    v = _random(like, seed)
    return v / v.norm()
