"""Which part of a bi-level problem makes its hypergradient wrong: the parts tested one by one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._errors import HypergradError, NotFinite
from .._implicit.entrance import implicit_grad
from .._info import SolveInfo, Status
from ..conditions._gauss_newton import GaussNewton
from ..conditions._minimum import Minimum
from ..solvers import Identity
from .determinism import restless
from .differences import Direction, derivative, first_step
from .parts import Case

Verdict = tuple[str, str]


def blame(
    case: Case,
    line: Direction,
    figures: tuple[float, float, float],
    *,
    useless: bool,
    agrees: Callable[[Sequence[Tensor]], bool],
) -> Verdict:
    """The part that is at fault where two derivatives disagree, and why.

    Parameters
    ----------
    case : Case
        The problem.
    line : Direction
        Where they disagree most.
    figures : tuple of float
        The implicit derivative along it, the difference, and the difference's estimated error.
    useless : bool
        Whether the differences are too uncertain to show anything.
    agrees : callable
        Whether a hypergradient agrees with the differences.

    Returns
    -------
    part, reason : str
        The part, and what was seen and what to try.
    """
    implicit, difference, error = figures
    apart = restless(case, line, error if useless else implicit - difference)
    if apart is not None:
        return "solve not deterministic", (
            f"Two calls of solve with the same hparams and the same state of PyTorch's generators "
            f"returned params that are {apart:.1e} apart, relatively. Start it in the same way at "
            "each call, from a fixed seed and not from the last answer."
        )
    if useless:
        return uncertain(case, line, figures)
    exact, info = case.implicit(case.exact, condition=case.plain)
    mended = agrees(exact)
    asymmetric = unsymmetric(case)
    if asymmetric is not None:
        return asymmetric
    if mended:
        return unsolved_system(case, mended=True)
    u = case.adjoint(info)
    found = unlike(case, line, implicit - difference, u) or kinked(case, line, implicit, difference)
    if found is None and Status(int(info.status)) == Status.SINGULAR:
        return unsolved_system(case, mended=False)
    found = found or unheard(case, line)
    if found is None and bool(info.success):
        found = unsolved(case, line, figures)
    if found is not None:
        return found
    if not bool(info.success and case.implicit(case.solver)[1].success):
        return unsolved_system(case, mended=False)
    return "implicit gradient", (
        f"Along {line.label} the implicit derivative is {implicit:.6g} and the difference "
        f"{difference:.6g}, though the inner problem and the linear system are solved. Does inner "
        "state what solve solves, and is the solution an isolated one?"
    )


def uncertain(case: Case, line: Direction, figures: tuple[float, float, float]) -> Verdict:
    """Why differences are too uncertain to show anything."""
    _, difference, error = figures
    if not math.isfinite(difference):
        return "not finite", (
            f"outer(solve(hparams), hparams) is finite at hparams and not a step of "
            f"{first_step(case.precision) * line.length:.1e} away along {line.label}: the edge of "
            "a domain, or a solver that diverges there. Check at hparams further inside, or use "
            "the logarithm of a hyperparameter that must be positive."
        )
    found = unsolved(case, line, figures)
    if found is not None:
        return found
    value = case.value(case.solution, case.at)
    rounding = torch.finfo(case.precision).eps * abs(value) / first_step(case.precision)
    if error < 30 * rounding / line.length:
        return unheard(case, line) or (
            "lost in rounding",
            f"outer is {value:.3g}, and a step along {line.label} changes it by so little that "
            f"the difference, {difference:.3g}, has an estimated error of {error:.1e}: it shows "
            "nothing. Leave out of outer what does not depend on params and hparams"
            + (", or scale the problem." if case.precision == torch.float64 else ", use float64."),
        )
    return (
        "solve not smooth",
        f"Differences along {line.label} at different step sizes disagree: {difference:.3g} "
        f"with an estimated error of {error:.1e}. The solution jumps or is rough there: solve "
        "to a smaller tolerance, with a fixed number of steps"
        + ("." if case.precision == torch.float64 else ", and in float64: these are rounded."),
    )


def kinked(case: Case, line: Direction, implicit: float, difference: float) -> Verdict | None:
    """A solution whose slopes on the two sides differ, however small the step."""
    f, centre = case.along(line), case.value(case.solution, case.at)
    step = first_step(case.precision) * line.length / 4
    sides = []
    for length in (step, step / 8):
        sides.append(((f(length) - centre) / length, (centre - f(-length)) / length))
    (up, down), (near_up, near_down) = sides
    jump, near = abs(up - down), abs(near_up - near_down)
    rounding = 100 * torch.finfo(case.precision).eps * abs(centre) / (step / 8)
    if 0.7 * jump < near < 1.5 * jump and near > 0.1 * abs(implicit - difference) + rounding:
        return "solve not smooth", (
            f"Along {line.label} the slope is {near_up:.6g} on one side and {near_down:.6g} on the "
            "other: hparams lies on a kink (a ReLU, an abs, a clamp, a constraint that is just "
            "active), where there is no derivative. Check at hparams a little away."
        )
    return None


def not_finite(case: Case, gradient: Sequence[Tensor], info: SolveInfo) -> Verdict | None:
    """NaN or infinity in a loss or the hypergradient."""
    if all(bool(torch.isfinite(t).all()) for t in (*gradient, info.outer_value)):
        return None
    text = "The hypergradient holds NaN or infinity."
    try:
        _judged(case)
    except HypergradError as error:
        text = str(error)
        if not isinstance(error, NotFinite):
            return "linear system not solved", text
    return "not finite", text


def unsymmetric(case: Case, least: float = 0.0) -> Verdict | None:
    """A matrix that is further than `least` from the symmetry that is declared of it."""
    if case.plain is case.condition or not case.condition.symmetric:
        return None
    lin = case.linearised(case.solution, case.at)
    u, v = (_random(lin.residual, seed) for seed in (1, 2))
    there, back = lin.transposed(u), lin.transposed(v)
    scale = float(u.norm() * back.norm() + v.norm() * there.norm())
    apart = abs(float(v @ there - u @ back)) / max(scale, 1e-300)
    if not apart > max(least, 1e3 * torch.finfo(case.precision).eps):
        return None
    return "implicit gradient", (
        f"{type(case.condition).__name__} is declared symmetric=True, but u.Av and v.Au differ by "
        f"{apart:.1e}, relatively. Declare symmetric=False."
    )


def unlike(case: Case, line: Direction, gap: float, u: Tensor) -> Verdict | None:
    """A partial derivative that is not the function's own."""
    lin = case.linearised(case.solution, case.at)
    cotangent, direct = case.slopes()
    flat = case.flat(case.solution)
    v = _random(flat, 3)
    v = v / v.norm()
    # Rounding in the condition, whose terms may be far larger than their sum.
    terms = float(u.norm() * lin.transposed(v).norm() * flat.norm()) * flat.numel() ** 0.5
    rounding = 10 * torch.finfo(case.precision).eps * terms / first_step(case.precision)

    def differs(found: float, f: Callable[[float], float], length: float, big: float) -> bool:
        expected, error = derivative(f, length, case.precision, 0.1 * case.rtol, abs(gap))
        return abs(found - expected) > big + 4 * error + rounding / length

    def residual(params: Any, variables: Sequence[Tensor]) -> float:
        return float(u @ case.linearised(params, variables).residual)

    for name, found, f in (
        (
            "outer",
            line.dot(direct),
            lambda s: case.value(case.solution, line.moved(case.at, s)),
        ),
        (
            "the condition of inner",
            line.dot(lin.cross(u)),
            lambda s: residual(case.solution, line.moved(case.at, s)),
        ),
    ):
        if differs(found, f, line.length, 0.3 * abs(gap)):
            return "hyperparameter not connected", (
                f"{name} changes with {line.leaf or 'hparams'} in a way that its derivative "
                "does not see: look for a .detach(), a .item(), a torch.no_grad(), a copy or a "
                f"custom Function whose backward uses detached values (found along {line.label})."
            )

    def moved(step: float) -> Any:
        return case.at_params(flat + step * v)

    length = float(flat.norm()) or 1.0
    slope = float(cotangent @ v)
    bend = float(lin.transposed(u) @ v)
    for name, found, f in (
        ("outer", slope, lambda s: case.value(moved(s), case.at)),
        ("the condition of inner", bend, lambda s: residual(moved(s), case.at)),
    ):
        if differs(found, f, length, 1e-2 * abs(found)):
            why = (
                "a .detach(), a torch.no_grad(), or a custom Function whose backward is wrong or "
                "uses detached values"
            )
            if isinstance(case.condition, GaussNewton) and name != "outer":
                why = (
                    "the Gauss-Newton matrix is not the Hessian where the residuals are not "
                    "small, and GaussNewton is meant for that; otherwise"
                ) + f" look for {why}"
            return "implicit gradient", (
                f"{name} changes with params in a way that its derivative does not see: {why}."
            )
    return None


def no_gradient(case: Case) -> Verdict | None:
    """An objective whose gradient, the condition, is not its own."""
    if not isinstance(case.condition, Minimum):
        return None
    lin = case.linearised(case.solution, case.at)
    flat = case.flat(case.solution)
    length = float(flat.norm()) or 1.0
    v = _random(flat, 4)
    v = v / v.norm()
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
    return "implicit gradient", (
        f"The gradient of inner is {float(lin.residual @ v):.3g} along a random direction in "
        f"params and the difference of its values {expected:.3g}: look in inner for a .detach(), a "
        "torch.no_grad(), or a custom Function whose backward is wrong."
    )


def hidden(case: Case, line: Direction) -> Verdict | None:
    """A fault that a hypergradient does not show, since its terms cancel."""
    step = first_step(case.precision) * line.length / 4
    ends = [case.flat(case.solved(line.moved(case.at, sign * step))) for sign in (1, -1)]
    lin = case.linearised(case.solution, case.at, forward=True, cross_forward=True)
    by_params = lin.product((ends[0] - ends[1]) / (2 * step))
    by_hparams = lin.cross_forward(line.parts)
    gap = by_params + by_hparams
    u = _random(gap, 5)
    # A solution moves a little by rounding with whatever its solver uses, such as a step size.
    terms = float(lin.transposed(u).norm() / u.norm()) * float(case.flat(case.solution).norm())
    least = max(
        float(by_params.norm()), float(by_hparams.norm()), 50 * case.rtol * terms / line.length
    )
    if not float(gap.norm()) > 0.1 * least:
        return None
    found = unlike(case, line, float(u @ gap), u) or unheard(case, line)
    if found is None:
        return None
    return found[0], (
        f"Along {line.label} the terms of the hypergradient cancel here, which hides a fault: "
        f"{found[1]}"
    )


def unheard(case: Case, line: Direction) -> Verdict | None:
    """A hyperparameter that `solve` and `inner` do not use in the same way."""
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
        return "hyperparameter not connected", (
            f"solve moves with {name} and inner does not depend on it: a closure captures it, "
            "a .detach() cuts it off, or solve alone uses it (a learning rate, a start). Use "
            "the argument that inner is given."
        )
    if not bool(dp.any()) and by_hparams > 0:
        return "hyperparameter not connected", (
            f"inner depends on {name} and solve returns the same params whatever it is: solve "
            "uses a captured value in place of its argument, or does nothing."
        )
    scale = max(by_params, by_hparams)
    solved = float(lin.residual.norm()) <= 0.1 * step * scale
    if solved and float(slope((p_up, p_down)).norm()) > 0.1 * scale:
        return "hyperparameter not connected", (
            f"inner and solve do not use {name} in the same way: params solves the inner "
            "problem at hparams, and not a step away. Look for a captured value, or a part of "
            "the loss that one of the two leaves out."
        )
    return None


def unsolved(case: Case, line: Direction, figures: tuple[float, float, float]) -> Verdict | None:
    """An inner problem whose derivatives agree once it is solved further."""
    _, info = case.implicit(case.exact, condition=case.plain)
    try:
        params = case.newton(case.solution, case.at)
        gradient, after = case.implicit(case.exact, params, case.plain)
        implicit = line.dot(gradient)
        found, error = derivative(
            case.along(line, refined=True),
            line.length,
            case.precision,
            0.1 * case.rtol,
            1e-3 * abs(implicit),
        )
    except HypergradError:
        implicit = found = error = math.nan
    size = max(abs(implicit), abs(found))
    agree = abs(implicit - found) <= case.rtol * size + 4 * error and error <= 0.1 * size
    before = float(info.inner_residual)
    if agree:
        text = (
            f"Newton steps take it to {float(after.inner_residual):.1e}, and there the two "
            f"agree: {implicit:.6g} and {found:.6g} along {line.label}; here they are "
            f"{figures[0]:.6g} and {figures[1]:.6g}."
        )
    elif before > 1e-3:
        text = "The implicit gradient is exact at a solution only."
    else:
        return None
    return "inner problem not solved", (
        f"The params that solve returns have the relative inner residual {before:.1e}. {text} "
        "Give the inner solver more steps or a smaller tolerance; look whether it minimises "
        "the same loss as inner, with the same hparams."
    )


def unsolved_system(case: Case, *, mended: bool) -> Verdict:
    """What the linear solver has to say; `mended`: another one's answer agrees."""
    _, info = case.implicit(case.solver)
    so = "; with the system solved the gradient agrees" if mended else ""
    seen = (
        f"{info.method} ended with {Status(int(info.status)).name} at the relative residual "
        f"{float(info.residual_norm):.1e}{so}."
    )
    damping = getattr(case.solver, "damping", 0.0)
    try:
        _judged(case)
    except HypergradError as error:
        text = f"{seen} {error}"
    else:
        text = f"{seen} Raise maxiter (terms for Neumann) and set rtol."
    if isinstance(case.solver, Identity):
        text = f"Identity takes A for a multiple of the identity, which it is not{so}. Use CG."
    elif damping and bool(info.success):
        text = (
            f"With damping={damping:g} the solver solves (A + damping I) u = b, which is another "
            f"system{so}. Leave the damping out, or make it smaller; where it is meant, pass an "
            "rtol to check_hypergrad."
        )
    return "linear system not solved", text


def _judged(case: Case) -> None:
    implicit_grad(
        case.outer,
        case.condition,
        case.solution,
        case.hparams,
        solver=case.solver,
        inner_tol=None,
        on_failure="raise",
    )


def _random(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)
