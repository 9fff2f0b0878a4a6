"""Random networks, where their inner solver stopped, and the hypergradient that is right there.

A case is a network with its losses and hyperparameters in float64 or float32, and a point: solved,
near the solution, cut short anywhere, at a saddle, or run away. The truth is the hypergradient at
the minimum that Newton's method reaches from that point, in float64. A case is drawn again where
the inner solver met NaN, or where that minimum is there and the hypergradient at it is lost in
rounding (it is zero, most often).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.calibration_problems import Draws
from benchmarks.network_losses import Leaves, Losses, draw_losses
from benchmarks.network_models import KINDS, SIZES, model
from benchmarks.network_points import POINTS, stopped
from benchmarks.network_truth import KNOWN, derivatives, gauss_newton, hypergradient, truth

F64 = torch.float64
_ATTEMPTS = 64


@dataclass
class Case:
    """One network, without its point.

    Attributes
    ----------
    kinds : dict
        What was drawn, for tables.
    losses : Losses
        Inner and outer loss, in the dtype of the case.
    start, hparams : dict of Tensor
        Where the inner solver starts, and the hyperparameters, in the dtype of the case.
    draws : Draws
        Where the inner solver takes its random choices from.
    """

    kinds: dict[str, str | int]
    losses: Losses
    start: Leaves
    hparams: Leaves
    draws: Draws


@dataclass
class Solved:
    """What takes time to find of a case, and is kept.

    Attributes
    ----------
    attempt : int
        How often the case was drawn again.
    point : Tensor
        Where the inner solver stopped, flat.
    truth : Tensor
        The flat hypergradient, in float64; empty where there is no minimum.
    known : float
        The relative accuracy of the truth.
    plain : float
        The true error of a dense solve in float64 at the point.
    """

    attempt: int
    point: Tensor
    truth: Tensor
    known: float
    plain: float


def draw(seed: int, attempt: int = 0) -> Case:
    """The case of a seed."""
    draws = Draws(seed * _ATTEMPTS + attempt)
    kind, condition = draws.one_of(KINDS), draws.one_of(["Minimum"] * 3 + ["GaussNewton"])
    # What Gauss-Newton leaves out is of the size of the residuals: some small, some not.
    newton = condition == "Minimum"
    task = draws.one_of(["numbers", "classes"] if newton else ["numbers"] * 3 + ["classes"])
    # The minimum of a whole network of ReLU is at a kink more often than not.
    head = draws.uniform().item() < {"relu": 0.4, "attention": 0.0}.get(kind, 0.05)
    size = (SIZES[0][0], SIZES[-1][1]) if head else draws.one_of(SIZES)
    outputs = draws.one_of([1, 2, 3] if task == "numbers" else [2, 3, 4])
    network, shape, names = model(draws, kind, outputs, size, head)
    start = {name: network.get_parameter(name).detach().double() for name in names}
    how = draws.one_of(POINTS)
    if how == "saddle, zero weights":
        start = {name: torch.zeros_like(p) for name, p in start.items()}
    elif how == "saddle, equal units":
        start = {name: p.abs().mean() * torch.ones_like(p) for name, p in start.items()}
    losses, hparams = draw_losses(
        draws, network, shape, start, task, outputs, 0.2 if newton else 0.8
    )
    dtype = draws.one_of([torch.float64, torch.float32])
    n = sum(p.numel() for p in start.values())
    kinds = {
        "seed": seed,
        "network": kind,
        "n": n,
        "trained": "last layer" if head else "all",
        "task": task,
        "hparams": losses.hyper,
        "outer": losses.sense,
        "stopped": how,
        "dtype": str(dtype).removeprefix("torch."),
        "condition": condition,
    }
    return Case(kinds, losses.to(dtype), cast(start, dtype), cast(hparams, dtype), draws)


def solve(seed: int) -> Solved:
    """The point of a case and the truth, drawn again until both are there."""
    for attempt in range(_ATTEMPTS):
        case = draw(seed, attempt)
        start, h = flat(case.start), flat(case.hparams)
        inner, _ = on_vectors(case.losses.written_out().to(start.dtype), case)
        how = str(case.kinds["stopped"])
        point = stopped(case.draws, how, lambda w, inner=inner, h=h: inner(w, h), start)
        if not bool(torch.isfinite(point).all()):
            continue
        exact, known = true_hypergradient(case, point)
        if exact is None:
            return Solved(attempt, point, torch.zeros(0, dtype=F64), 0.0, float("inf"))
        if known > KNOWN:
            continue
        eps = torch.finfo(point.dtype).eps
        plain = dense_answer(case, point)
        return Solved(attempt, point, exact, max(known, eps), relative(plain, exact))
    raise RuntimeError(f"Seed {seed} has no case.")


def true_hypergradient(case: Case, point: Tensor) -> tuple[Tensor | None, float]:
    """The truth and its accuracy, from losses in float64 and the same point."""
    inner, outer = on_vectors(case.losses.written_out(), case)
    return truth(inner, outer, point.to(F64), flat(case.hparams).to(F64))


def dense_answer(case: Case, point: Tensor) -> Tensor:
    """The hypergradient by a dense solve in float64 at the point, with the case's curvature."""
    losses, w, h = case.losses.written_out(), point.to(F64), flat(case.hparams).to(F64)
    inner, outer = on_vectors(losses, case)
    if case.kinds["condition"] == "GaussNewton":
        at, like = unflat(h, case.hparams), case.start
        matrix = gauss_newton(
            lambda w: losses.outputs(unflat(w, like), at),
            lambda z: losses.loss(z, at),
            lambda w: losses.regulariser(unflat(w, like), at),
            w,
        )
    else:
        matrix = derivatives(lambda w: inner(w, h), w)[2]
    try:
        return hypergradient(inner, outer, w, h, matrix)
    except torch.linalg.LinAlgError:
        return torch.full_like(h, torch.inf)


def relative(found: Tensor, exact: Tensor) -> float:
    """The relative error of a hypergradient; infinite where there is none."""
    if not exact.numel() or not bool(torch.isfinite(found).all()):
        return float("inf")
    return float(torch.linalg.vector_norm(found.to(F64) - exact) / torch.linalg.vector_norm(exact))


def on_vectors(
    losses: Losses, case: Case
) -> tuple[Callable[[Tensor, Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]:
    """Inner and outer loss as functions of flat parameters and hyperparameters."""
    w_like, h_like = case.start, case.hparams

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return losses.inner(unflat(w, w_like), unflat(h, h_like))

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return losses.outer(unflat(w, w_like), unflat(h, h_like))

    return inner, outer


def flat(leaves: Leaves) -> Tensor:
    """All entries in one vector."""
    return torch.cat([p.reshape(-1) for p in leaves.values()])


def unflat(vector: Tensor, like: Leaves) -> Leaves:
    """Leaves shaped like others, from one vector."""
    parts = vector.split([p.numel() for p in like.values()])
    return {name: part.view(p.shape) for part, (name, p) in zip(parts, like.items(), strict=True)}


def cast(leaves: Leaves, dtype: torch.dtype) -> Leaves:
    """The leaves in another dtype."""
    return {name: p.to(dtype) for name, p in leaves.items()}
