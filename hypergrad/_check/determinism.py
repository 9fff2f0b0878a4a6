"""Parts of a bi-level problem that do not give the same numbers twice."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch
from torch import Tensor

from .._autograd.guard import Guard
from .._autograd.random_numbers import Draw
from .._autograd.trace import detached
from .._errors import NotConnected
from .._implicit.linearisation import Linearisation
from ..conditions._inner_problem import scalar
from .differences import Direction, first_step
from .parts import Case, kept

_CALLS = 4
_DRAWS = 32

_CURE = (
    "Call module.eval() (dropout), and draw random numbers and batches once, outside of the losses."
)


def not_deterministic(case: Case) -> str | None:
    """Look for a loss that gives two values at one point, and say what to do about it."""

    def outer() -> Tensor:
        with Guard():
            loss = case.outer(kept(case.solution), case.hparams_at(case.at))
        return scalar("outer", loss).detach()

    apart = _spread(case, outer, torch.zeros((), device="cpu"))
    if apart is not None:
        return (
            f"outer gave values that differ by {apart:.1e}, relatively, at the same params and "
            f"hparams. {_CURE}"
        )
    problem = case.problem(case.plain, case.solution, case.at)
    tensors = [detached(t) for t in problem.tensors]

    def condition() -> Linearisation:
        return Linearisation(problem, tensors, Draw())

    try:
        lin = condition()
        # At a solution nothing is left of the terms of the condition but their rounding.
        one = torch.ones_like(lin.residual) / lin.layout.n**0.5
        terms = lin.transposed(one).norm() * case.flat(case.solution).norm()
        apart = _spread(case, lambda: condition().residual, terms)
    except NotConnected:
        return None  # said with the hypergradient
    if apart is not None:
        return (
            f"The condition of inner (for a loss, its gradient) changes by {apart:.1e}, "
            f"relatively, between evaluations at the same params and hparams. {_CURE}"
        )
    return None


def restless(case: Case, line: Direction, gap: float) -> float | None:
    """Measure how far two solutions with the same random numbers are apart, where it matters.

    Parameters
    ----------
    case : Case
        The problem.
    line : Direction
        Along which a derivative is wrong.
    gap : float
        By how much.

    Returns
    -------
    apart : float or None
        Relative to the solution; None where it does not explain the gap.
    """
    again = case.solved(case.at)
    first, second = case.flat(case.solution), case.flat(again)
    apart = float((first - second).norm() / first.norm().clamp(min=1e-30))
    jump = abs(case.value(again, case.at) - case.value(case.solution, case.at))
    matters = not jump < 0.05 * abs(gap) * first_step(case.precision) * line.length / 32
    rounding = 1e4 * torch.finfo(case.precision).eps
    return apart if apart > rounding and (matters or apart > 1e-3) else None


def _spread(case: Case, evaluate: Callable[[], Tensor], terms: Tensor) -> float | None:
    # The relative distance of the first two values that differ. Draws may be equal by chance
    # (dropout of two numbers): where random numbers are drawn there are many evaluations.
    near = 1e3 * torch.finfo(case.precision).eps
    before = _state()
    first = evaluate()
    calls = _CALLS if _same(before, _state()) else _DRAWS
    for _ in range(calls - 1):
        other = evaluate()
        scale = torch.maximum(first.abs().max(), other.abs().max())
        if not bool(torch.isfinite(scale)):
            return None  # said with the hypergradient
        apart = float((first - other).abs().max())
        if apart > near * float(scale + terms):
            return apart / float(scale)
    return None


def _state() -> tuple[list[Tensor], object]:
    torch_state = [torch.get_rng_state()]
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch_state += torch.cuda.get_rng_state_all()
    return torch_state, random.getstate()


def _same(a: tuple[list[Tensor], object], b: tuple[list[Tensor], object]) -> bool:
    return a[1] == b[1] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
