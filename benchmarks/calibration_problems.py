"""Random inner problems of known solution, for the calibration of the error estimate.

Quadratics and logistic regressions with 5 to 500 unknowns and a condition number from 1 to 1e6;
the inner solution is exact, perturbed, or that of a solver stopped early; the linear solve is
exact, iterated to a tolerance, or cut short. The true hypergradient comes from dense matrices
that `torch.func` forms, and from Newton's method run to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from torch.func import grad, hessian, vjp
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy

import hypergrad

F64 = torch.float64
Loss = Callable[[Tensor, Tensor], Tensor]
T = TypeVar("T")


class Draws:
    """Random choices from one seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def uniform(self, *shape: int) -> Tensor:
        """Numbers between 0 and 1."""
        return torch.rand(shape, generator=self.generator, dtype=F64)

    def normal(self, *shape: int) -> Tensor:
        """Standard normal numbers."""
        return torch.randn(shape, generator=self.generator, dtype=F64)

    def log_uniform(self, low: float, high: float) -> float:
        """A number whose logarithm is uniform."""
        return low * (high / low) ** self.uniform().item()

    def one_of(self, choices: Sequence[T]) -> T:
        """One of the choices."""
        return choices[int(self.uniform().item() * len(choices))]


@dataclass
class Drawn:
    """One problem, where its inner solver stopped, how the system is solved, and the truth.

    Attributes
    ----------
    kinds : dict
        What was drawn, for tables.
    truth : Tensor
        The hypergradient at the exact inner solution.
    uncertainty : float
        The relative accuracy of the truth: rounding errors times the condition number.
    """

    kinds: dict[str, str | int | float]
    outer: Loss
    inner: Loss
    params: Tensor
    hparams: Tensor
    solver: hypergrad.Solver
    truth: Tensor
    uncertainty: float

    def judged(self) -> tuple[float, float]:
        """The true relative error of the library's answer, and its estimate."""
        found, info = hypergrad.implicit_grad(
            self.outer,
            self.inner,
            self.params,
            self.hparams,
            solver=self.solver,
            on_failure="ignore",
            return_info=True,
        )
        error = torch.linalg.vector_norm(found - self.truth) / torch.linalg.vector_norm(self.truth)
        return error.item(), info.error_estimate.item()


def draw(seed: int, largest: int = 500) -> Drawn:
    """The problem of a seed, of at most `largest` unknowns."""
    draws = Draws(seed)
    n, kappa = round(draws.log_uniform(5, largest)), draws.log_uniform(1.01, 1e6)
    values = _spectrum(draws, n, kappa)
    basis = torch.linalg.qr(draws.normal(n, n)).Q
    kind = draws.one_of(["quadratic", "logistic"])
    make = _quadratic if kind == "quadratic" else _logistic
    hyper, hparams, inner, validation = make(draws, values, basis, kappa)
    solution = _newton(inner, hparams, n)
    modes, vectors = torch.linalg.eigh(_hessian(inner, solution, hparams))
    length = torch.linalg.vector_norm(solution) / n**0.5
    target = draws.normal(n) * length
    sense = draws.one_of(["validation", "distance", "random features", "lowest modes"])
    lowest, features = vectors[:, : min(n, 3)].T, draws.normal(n, n) / n**0.5
    losses: dict[str, Callable[[Tensor], Tensor]] = {
        "validation": validation,
        "distance": lambda w: (w - target).square().sum() / 2,
        "random features": lambda w: (features @ (w - target)).square().sum() / 2,
        "lowest modes": lambda w: (lowest @ (w - target)).square().sum() / 2,
    }
    judge = losses[sense]
    truth = _hypergradient(judge, inner, solution, hparams)
    direct = torch.zeros_like(hparams)
    if draws.one_of([True, False, False]):
        direct = draws.normal(*hparams.shape)
        size = torch.linalg.vector_norm(truth) / torch.linalg.vector_norm(direct)
        direct = direct * size * draws.log_uniform(0.1, 10)
    stopped = draws.one_of(["exact", "gradient steps", "L-BFGS", "noise"])
    params = _stopped(draws, stopped, inner, hparams, solution, length)
    name, solver = _solver(draws, n)
    kinds = {"seed": seed, "inner": kind, "n": n, "condition": kappa, "hparams": hyper}
    return Drawn(
        kinds={**kinds, "outer": sense, "stopped": stopped, "solver": name},
        outer=lambda w, h: judge(w) + (direct * h).sum(),
        inner=inner,
        params=params,
        hparams=hparams,
        solver=solver,
        truth=truth + direct,
        uncertainty=30 * torch.finfo(F64).eps * (modes[-1] / modes[0]).item(),
    )


def _spectrum(draws: Draws, n: int, kappa: float) -> Tensor:
    """Eigenvalues from 1 / kappa to 1: spread evenly, logarithmically, in clusters, decaying."""
    spread = draws.uniform(n)
    places = torch.arange(1, n + 1, dtype=F64)
    clusters = kappa ** -draws.uniform(4)
    kinds = [
        kappa**-spread,
        1 / kappa + (1 - 1 / kappa) * spread,
        clusters[(spread * 4).long()] * (1 + 0.05 * draws.uniform(n)),
        places ** (-math.log(kappa) / math.log(n)),
    ]
    values = draws.one_of(kinds).sort().values
    values[0], values[-1] = 1 / kappa, 1.0
    return values


def _quadratic(
    draws: Draws, values: Tensor, basis: Tensor, kappa: float
) -> tuple[str, Tensor, Loss, Callable[[Tensor], Tensor]]:
    n, penalty = len(values), 0.5 / kappa
    matrix = basis * (values - penalty) @ basis.T
    linear = basis @ (draws.normal(n) * draws.one_of([values**0, values, values.sqrt()]))
    few = draws.normal(n, 5) / n**0.5
    other = basis * (values * (0.5 + draws.uniform(n))) @ basis.T
    size = torch.linalg.vector_norm(linear) / n**0.5
    other_linear = linear + 0.3 * draws.normal(n) * size

    def of(w: Tensor) -> Tensor:
        return w @ matrix @ w / 2 - linear @ w

    def validation(w: Tensor) -> Tensor:
        return w @ other @ w / 2 - other_linear @ w

    def linear_term(w: Tensor, h: Tensor) -> Tensor:
        return of(w) - (few @ h) @ w + penalty * (w @ w) / 2

    hyper = draws.one_of(["one penalty", "a penalty each", "centre", "linear term"])
    if hyper == "linear term":
        return hyper, draws.normal(5), linear_term, validation
    return hyper, *_penalised(draws, hyper, n, penalty, of), validation


def _logistic(
    draws: Draws, values: Tensor, basis: Tensor, kappa: float
) -> tuple[str, Tensor, Loss, Callable[[Tensor], Tensor]]:
    n, rows, penalty = len(values), 2 * len(values), 1 / kappa
    root = basis * values.sqrt() @ basis.T
    X, X_val = draws.normal(rows, n) @ root, draws.normal(rows, n) @ root
    size = torch.linalg.matrix_norm(X, 2) / (4 * rows) ** 0.5  # so that the Hessian is at most one
    X, X_val = X / size, X_val / size
    true = basis @ (draws.normal(n) / values.sqrt().clamp(min=0.03))
    scale = 2 / (X @ true).std()
    y = (draws.uniform(rows) < torch.sigmoid(X @ true * scale)).to(F64)
    y_val = (draws.uniform(rows) < torch.sigmoid(X_val @ true * scale)).to(F64)

    def of(w: Tensor) -> Tensor:
        return cross_entropy(X @ w, y)

    def validation(w: Tensor) -> Tensor:
        return cross_entropy(X_val @ w, y_val)

    def weighted(w: Tensor, h: Tensor) -> Tensor:
        losses = cross_entropy(X @ w, y, reduction="none")
        return (2 * torch.sigmoid(h) * losses).mean() + penalty * (w @ w) / 2

    hyper = draws.one_of(["one penalty", "a penalty each", "centre", "weights"])
    if hyper == "weights":
        return hyper, torch.zeros(rows, dtype=F64), weighted, validation
    return hyper, *_penalised(draws, hyper, n, penalty, of), validation


def _penalised(
    draws: Draws, hyper: str, n: int, penalty: float, of: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Loss]:
    """A quadratic penalty with one logarithmic weight, one for each unknown, or a centre."""
    if hyper == "centre":
        return 0.3 * draws.normal(
            n
        ) / n**0.5, lambda w, h: of(w) + penalty * (w - h).square().sum() / 2
    shape = () if hyper == "one penalty" else (n,)
    return torch.full(
        shape, math.log(penalty), dtype=F64
    ), lambda w, h: of(w) + (h.exp() * w * w).sum() / 2


def _hessian(inner: Loss, w: Tensor, h: Tensor) -> Tensor:
    matrix: Tensor = hessian(inner)(w, h)
    return (matrix + matrix.T) / 2


def _newton(inner: Loss, h: Tensor, n: int) -> Tensor:
    """Newton's method with step halving, to rounding."""
    w = torch.zeros(n, dtype=F64)
    for _ in range(100):
        step = torch.linalg.solve(_hessian(inner, w, h), grad(inner)(w, h))
        size, before = 1.0, inner(w, h)
        while size > 1e-4 and inner(w - size * step, h) > before:
            size /= 2
        w = w - size * step
        if torch.linalg.vector_norm(step) <= 1e-13 * torch.linalg.vector_norm(w):
            break
    return w


def _hypergradient(judge: Callable[[Tensor], Tensor], inner: Loss, w: Tensor, h: Tensor) -> Tensor:
    u = torch.linalg.solve(_hessian(inner, w, h), grad(judge)(w))
    (cross,) = vjp(lambda h: grad(inner)(w, h), h)[1](u)
    return -cross


def _stopped(
    draws: Draws, how: str, inner: Loss, h: Tensor, solution: Tensor, length: Tensor
) -> Tensor:
    """Where an inner solver stopped."""
    n = len(solution)
    if how == "noise":
        return solution + draws.normal(n) * length * draws.log_uniform(1e-8, 0.3)
    w = draws.normal(n) * length * draws.one_of([0.0, 1.0])
    if how == "gradient steps":
        step = 0.95 / torch.linalg.matrix_norm(_hessian(inner, w, h), 2)
        before, ahead = w, w
        for i in range(round(draws.log_uniform(1, 2000))):
            w = ahead - step * grad(inner)(ahead, h)
            before, ahead = w, w + (w - before) * i / (i + 3)  # Nesterov's
        return w
    if how == "L-BFGS":
        w = w.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [w],
            max_iter=round(draws.log_uniform(1, 300)),
            tolerance_grad=1e-14,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )

        def closure() -> Tensor:
            optimiser.zero_grad()
            value = inner(w, h)
            value.backward()
            return value

        optimiser.step(closure)
        return w.detach()
    return solution


def _solver(draws: Draws, n: int) -> tuple[str, hypergrad.Solver]:
    steps, rtol = round(draws.log_uniform(1, n)), draws.log_uniform(1e-9, 0.3)
    return draws.one_of([
        ("Exact", hypergrad.Exact()),
        ("Auto", hypergrad.Auto()),
        ("CG", hypergrad.CG()),
        ("CG cut short", hypergrad.CG(maxiter=steps)),
        ("CG to a tolerance", hypergrad.CG(rtol=rtol)),
        ("MINRES", hypergrad.MINRES()),
        ("MINRES cut short", hypergrad.MINRES(maxiter=steps)),
    ])
