"""Inner problems with penalties and constraints whose hypergradient has a closed form.

All matrices are full, so that A, which is not symmetric, differs from its transpose.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from scipy.optimize import brentq
from torch import Tensor

import hypergrad
from hypergrad import KKT, ProjectedGradient, ProximalGradient, projections, prox
from tests.problems import F64, Problem, data


@dataclasses.dataclass(frozen=True, eq=False)
class Constrained(Problem):
    """A problem whose `inner` is a condition object."""

    @property
    def condition(self) -> Any:
        return self.inner

    def decorated(self, **options: Any) -> Callable[[Any], Any]:
        @hypergrad.custom_argmin(self.inner, **options)
        def fit(init: None, hparams: Any) -> Any:
            return self.solve(hparams)

        return lambda hparams: fit(None, hparams)


def regression(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor, Tensor]:
    """The Hessian ``(6, 6)`` and slope ``(6,)`` of a squared error, and a target ``(6,)``."""
    X, noise = data(30, 40, 6, dtype=F64), data(31, 40, dtype=F64)
    y = X @ torch.tensor([2.0, -1.5, 1.0, 0.0, 0.05, 0.0], dtype=F64) + noise
    target = data(32, 6, dtype=F64)
    return (X.T @ X / 40).to(dtype), (X.T @ y / 40).to(dtype), target.to(dtype)


def quadratic(H: Tensor, c: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda w: w @ H @ w / 2 - c @ w


def iterated(step: Callable[[Tensor], Tensor], start: Tensor, steps: int = 3000) -> Tensor:
    """A fixed point by plain iteration, in float64."""
    x = start.to(F64)
    for _ in range(steps):
        new = step(x)
        if torch.equal(new, x):
            break
        x = new
    return x


def thresholded(v: Tensor, by: Tensor) -> Tensor:
    return torch.where(v > by, v - by, torch.where(v < -by, v + by, torch.zeros_like(v)))


def sparse(dtype: torch.dtype, l2: float, step_size: Any) -> Constrained:
    """Elastic net (of l2=0 the lasso) in both penalties; the closed form is on the active set."""
    H, c, target = regression(dtype)
    slope = 1 / torch.linalg.matrix_norm(H.to(F64), 2)

    def solve(hparams: tuple[Tensor, Tensor]) -> Tensor:
        l1, l2 = (h.to(F64) for h in hparams)

        def step(w: Tensor) -> Tensor:
            moved = w - slope * (H.to(F64) @ w - c.to(F64))
            return thresholded(moved, slope * l1) / (1 + slope * l2)

        w = iterated(step, torch.zeros(6), 1000)
        on = w != 0  # and there to the last digit
        matrix = H.to(F64)[on][:, on] + l2 * torch.eye(int(on.sum()), dtype=F64)
        w[on] = torch.linalg.solve(matrix, c.to(F64)[on] - l1 * w[on].sign())
        return w.to(dtype)

    def hypergradient(hparams: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        w = solve(hparams)
        on = w != 0
        assert 0 < on.sum() < 6
        matrix = H[on][:, on] + hparams[1] * torch.eye(int(on.sum()), dtype=dtype)
        u = torch.linalg.solve(matrix, (w - target)[on])
        return -(u @ w[on].sign()), -(u @ w[on]) + 0.2 * hparams[1]

    return Constrained(
        "minimum",
        ProximalGradient(
            lambda w, hparams: quadratic(H, c)(w),
            lambda v, s, hparams: prox.elastic_net(v, s, *hparams),
            step_size,
        ),
        lambda w, hparams: (w - target).square().sum() / 2 + 0.1 * hparams[1] ** 2,
        (torch.tensor(0.3, dtype=dtype), torch.tensor(l2, dtype=dtype)),
        solve,
        hypergradient,
    )


def lasso(dtype: torch.dtype = F64, step_size: Any = 0.4) -> Constrained:
    """The lasso, as an elastic net whose second penalty is zero."""
    return sparse(dtype, 0.0, step_size)


def elastic_net(dtype: torch.dtype = F64, step_size: Any = 0.4) -> Constrained:
    """The elastic net in both penalties."""
    return sparse(dtype, 0.5, step_size)


def box_qp(dtype: torch.dtype = F64, step_size: Any = 0.4) -> Constrained:
    """A quadratic program in a box, in its slope and its upper bound."""
    H, c, target = regression(dtype)

    def solve(hparams: dict[str, Tensor]) -> Tensor:
        c64, upper = hparams["slope"].to(F64), hparams["upper"].to(F64)
        step = lambda x: torch.clamp(x - 0.4 * (H.to(F64) @ x - c64), -0.5 * upper, upper)
        return iterated(step, torch.zeros(6)).to(dtype)

    def hypergradient(hparams: dict[str, Tensor]) -> dict[str, Tensor]:
        x, upper = solve(hparams), hparams["upper"]
        free, at_upper, at_lower = (x < upper) & (x > -0.5 * upper), x >= upper, x <= -0.5 * upper
        assert free.any()
        assert at_upper.any()
        assert at_lower.any()
        g = x - target
        u = torch.zeros_like(x)
        u[free] = torch.linalg.solve(H[free][:, free], g[free])
        by_bounds = g - H @ u  # what a unit of a held entry is worth
        worth = by_bounds[at_upper].sum() - 0.5 * by_bounds[at_lower].sum()
        return {"slope": u, "upper": worth}

    return Constrained(
        "minimum",
        ProjectedGradient(
            lambda x, hparams: quadratic(H, hparams["slope"])(x),
            lambda v, hparams: projections.box(v, -0.5 * hparams["upper"], hparams["upper"]),
            step_size,
        ),
        lambda x, hparams: (x - target).square().sum() / 2,
        {"slope": c, "upper": torch.tensor(1.2, dtype=dtype)},
        solve,
        hypergradient,
    )


def simplex_projection(dtype: torch.dtype = F64, step_size: Any = 1.0) -> Constrained:
    """The closest point of the simplex to theta: its Jacobian is I - 11^T/k on k entries."""
    target = data(33, 6, dtype=dtype)

    def solve(theta: Tensor) -> Tensor:
        # By bisection for the threshold, which has nothing to do with sorting.
        threshold = brentq(
            lambda t: float(torch.relu(theta.to(F64) - t).sum()) - 1, -10, 10, xtol=1e-15
        )
        return torch.relu(theta.to(F64) - threshold).to(dtype)

    def hypergradient(theta: Tensor) -> Tensor:
        x = solve(theta)
        on = (x > 0).to(dtype)
        assert 1 < on.sum() < 6
        g = (x - target) * on
        return g - on * g.sum() / on.sum()

    return Constrained(
        "minimum",
        ProjectedGradient(
            lambda x, theta: (x - theta).square().sum() / 2,
            lambda v, theta: projections.simplex(v),
            step_size,
        ),
        lambda x, theta: (x - target).square().sum() / 2,
        torch.tensor([0.9, 0.6, 0.3, -0.4, 0.2, -1.0], dtype=dtype),
        solve,
        hypergradient,
    )


def multiplier(radius: Tensor) -> tuple[Tensor, Tensor]:
    """The regression in a ball, and half its multiplier: (H + mu) w = c with ||w|| = radius."""
    H, c, _ = regression()
    eye = torch.eye(6, dtype=F64)
    excess = lambda mu: float(torch.linalg.solve(H + mu * eye, c).norm() - radius.to(F64))
    mu = torch.tensor(brentq(excess, 0.0, 100.0, xtol=1e-15), dtype=F64)
    return torch.linalg.solve(H + mu * eye, c), mu


def of_ball(radius: Tensor) -> Tensor:
    """d outer / d radius of the regression in a ball, by the derivative of the secular equation."""
    H, _, target = regression()
    w, mu = multiplier(radius)
    slope = -torch.linalg.solve(H + mu * torch.eye(6, dtype=F64), w)  # dw / dmu
    return ((w - target) @ slope / (w @ slope / w.norm())).to(radius.dtype)


def ball(dtype: torch.dtype = F64, step_size: Any = 0.4) -> Constrained:
    """Regression in a ball, in the radius."""
    H, c, target = regression(dtype)
    return Constrained(
        "minimum",
        ProjectedGradient(
            lambda w, radius: quadratic(H, c)(w),
            lambda v, radius: projections.l2_ball(v, radius),
            step_size,
        ),
        lambda w, radius: (w - target).square().sum() / 2,
        torch.tensor(1.5, dtype=dtype),
        lambda radius: multiplier(radius)[0].to(dtype),
        of_ball,
    )


def kkt_ball(dtype: torch.dtype = F64) -> Constrained:
    """The same by its multiplier: ||w||^2 - radius^2 <= 0."""
    H, c, target = regression(dtype)

    def solve(radius: Tensor) -> Any:
        w, mu = multiplier(radius)
        return w.to(dtype), None, (mu / 2).to(dtype)  # L = f + lam (w.w - radius^2)

    return Constrained(
        "minimum",
        KKT(
            lambda w, radius: quadratic(H, c)(w),
            inequalities=lambda w, radius: w @ w - radius**2,
        ),
        lambda params, radius: (params[0] - target).square().sum() / 2,
        torch.tensor(1.5, dtype=dtype),
        solve,
        of_ball,
    )


def equality_system(dtype: torch.dtype = F64) -> tuple[Tensor, Tensor]:
    """Constraints ``(2, 6)``, and the KKT matrix ``(8, 8)`` of a quadratic program with them."""
    H, _, _ = regression(dtype)
    C = data(34, 2, 6, dtype=dtype)
    zero = torch.zeros(2, 2, dtype=dtype)
    return C, torch.cat([torch.cat([H, C.T], dim=1), torch.cat([C, zero], dim=1)])


def equality_qp(dtype: torch.dtype = F64) -> Constrained:
    """A quadratic program with equalities, in its slope and its right-hand side.

    The outer loss depends on the multipliers too.
    """
    H, c, target = regression(dtype)
    C, K = equality_system(dtype)

    def solve(hparams: dict[str, Tensor]) -> Any:
        z = torch.linalg.solve(
            K.to(F64), torch.cat([hparams["slope"], hparams["level"]]).to(F64)
        ).to(dtype)
        return z[:6], z[6:], None

    def outer(params: Any, hparams: Any) -> Tensor:
        return (params[0] - target).square().sum() / 2 + params[1].square().sum()

    def hypergradient(hparams: dict[str, Tensor]) -> dict[str, Tensor]:
        x, nu, _ = solve(hparams)
        u = torch.linalg.solve(K, torch.cat([x - target, 2 * nu]))
        return {"slope": u[:6], "level": u[6:]}

    return Constrained(
        "minimum",
        KKT(
            lambda x, hparams: quadratic(H, hparams["slope"])(x),
            equalities=lambda x, hparams: C @ x - hparams["level"],
        ),
        outer,
        {"slope": c, "level": torch.tensor([0.5, -1.0], dtype=dtype)},
        solve,
        hypergradient,
    )


def inequality_qp(dtype: torch.dtype = F64) -> Constrained:
    """The box program, with one equality more: some inequalities are active, others are not."""
    H, c, target = regression(dtype)
    C = data(35, 1, 6, dtype=dtype)
    G = torch.cat([torch.eye(6), -torch.eye(6)]).to(dtype)
    scale = torch.cat([torch.ones(6), 0.5 * torch.ones(6)]).to(dtype)

    def system(active: Tensor) -> Tensor:
        J = torch.cat([C, G[active]]).to(F64)
        return torch.cat([
            torch.cat([H.to(F64), J.T], dim=1),
            torch.cat([J, torch.zeros(len(J), len(J), dtype=F64)], dim=1),
        ])

    def solve(hparams: dict[str, Tensor]) -> Any:
        slope, upper = hparams["slope"].to(F64), hparams["upper"].to(F64)
        active = torch.zeros(12, dtype=torch.bool)
        for _ in range(50):  # the primal-dual active set method
            bound = (scale * upper)[active]
            z = torch.linalg.solve(system(active), torch.cat([slope, torch.zeros(1), bound]))
            lam = torch.zeros(12, dtype=F64)
            lam[active] = z[7:]
            g = G.to(F64) @ z[:6] - scale * upper
            new = lam + g > 0
            if torch.equal(new, active):
                break
            active = new
        assert torch.equal(new, active)
        return z[:6].to(dtype), z[6:7].to(dtype), lam.to(dtype)

    def hypergradient(hparams: dict[str, Tensor]) -> dict[str, Tensor]:
        x, _, lam = solve(hparams)
        active = lam > 0
        assert active[:6].any()
        assert active[6:].any()
        assert not (active[:6] | active[6:]).all()
        rhs = torch.zeros(7 + int(active.sum()), dtype=F64)
        rhs[:6] = (x - target).to(F64)
        u = torch.linalg.solve(system(active), rhs).to(dtype)
        return {"slope": u[:6], "upper": u[7:] @ scale[active]}

    return Constrained(
        "minimum",
        KKT(
            lambda x, hparams: quadratic(H, hparams["slope"])(x),
            equalities=lambda x, hparams: C @ x,
            inequalities=lambda x, hparams: G @ x - scale * hparams["upper"],
        ),
        lambda params, hparams: (params[0] - target).square().sum() / 2,
        {"slope": c, "upper": torch.tensor(0.5, dtype=dtype)},
        solve,
        hypergradient,
    )


STEPS = [lasso, elastic_net, box_qp, simplex_projection, ball]
PROGRAMS = [kkt_ball, equality_qp, inequality_qp]
EVERY = [*STEPS, *PROGRAMS]
