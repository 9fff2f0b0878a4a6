"""Three real problems on which every estimator of the hypergradient can be measured."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from sklearn.datasets import load_breast_cancer, load_digits
from torch import Tensor
from torch.func import grad, hessian
from torch.nn.functional import cross_entropy, softplus

import hypergrad

D = torch.float64
Run = Callable[[], Tensor]


@dataclass(frozen=True)
class Problem:
    """A hypergradient that is known, and the ways to it: families of sides, by their cost.

    Parameters
    ----------
    title
        What is differentiated by what.
    exact
        The hypergradient.
    gradient
        One gradient of the inner loss: the unit of time and memory.
    families
        A family's name -> a setting's name -> the estimate, as a flat vector.
    """

    title: str
    exact: Tensor
    gradient: Callable[[], Any]
    families: dict[str, dict[str, Run]]


def penalties() -> Problem:
    """A penalty for each of the 30 features of logistic regression on breast cancer."""
    X, y = load_breast_cancer(return_X_y=True)
    x = torch.tensor((X - X.mean(0)) / X.std(0), dtype=D)
    x, y = torch.cat([x, torch.ones(len(x), 1, dtype=D)], dim=1), torch.tensor(y, dtype=D)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = order[:400], order[400:]

    def loss(w: Tensor, rows: Tensor) -> Tensor:
        z = x[rows] @ w
        return (softplus(z) - y[rows] * z).mean()

    def inner(w: Tensor, h: Tensor) -> Tensor:
        return loss(w, train) + (h.exp() * w[:-1].square()).sum() / 2

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return loss(w, val)

    def newton(h: Tensor) -> Tensor:
        w = torch.zeros(31, dtype=D)
        for _ in range(12):
            p = torch.sigmoid(x[train] @ w)
            penalty = torch.cat([h.exp(), torch.zeros(1, dtype=D)])
            slope = x[train].T @ (p - y[train]) / len(train) + penalty * w
            H = x[train].T @ ((p * (1 - p))[:, None] * x[train]) / len(train) + penalty.diag()
            w = w - torch.linalg.solve(H, slope)
        return w

    h = torch.full((30,), -4.0, dtype=D)
    families = common(outer, inner, newton(h), h, torch.zeros(31, dtype=D))
    families["evolution strategies"] = {
        f"{pairs} pairs": lambda pairs=pairs: hypergrad.evolution_strategies_grad(
            outer,
            None,
            newton,
            h,
            pairs=pairs,
            chunk_size=4,
            generator=torch.Generator().manual_seed(0),
        )
        for pairs in (4, 16, 64)
    }
    return finished(
        "30 penalties of logistic regression, breast cancer", outer, inner, newton(h), h, families
    )


def weights() -> Problem:
    """A weight for each of 600 digits, half of them with a wrong label, in softmax regression."""
    X, y = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(X), generator=generator)
    x, y = torch.tensor(X / 16, dtype=D)[order], torch.tensor(y)[order]
    noisy = y.clone()
    noisy[:300] = (y[:300] + torch.randint(1, 10, (300,), generator=generator)) % 10

    def inner(w: Tensor, h: Tensor) -> Tensor:
        errors = cross_entropy(x[:600] @ w, noisy[:600], reduction="none")
        return (h.sigmoid() * errors).mean() + 5e-3 * w.square().sum()

    def outer(w: Tensor, h: Tensor) -> Tensor:
        return cross_entropy(x[600:1000] @ w, y[600:1000])

    h = torch.zeros(600, dtype=D)
    solution = minimised(lambda w: inner(w, h), torch.zeros(64, 10, dtype=D), 500)
    families = common(outer, inner, solution, h, torch.zeros(64, 10, dtype=D))
    rate = 1 / largest(inner, solution, h)
    families["evolution strategies"] = {
        f"{pairs} pairs": lambda pairs=pairs: hypergrad.evolution_strategies_grad(
            outer,
            descent(inner, rate),
            solution,
            h,
            steps=50,
            pairs=pairs,
            sigma=0.1,
            chunk_size=4,
            generator=torch.Generator().manual_seed(0),
        )
        for pairs in (4, 16)
    }
    return finished(
        "600 weights of examples, digits with wrong labels", outer, inner, solution, h, families
    )


def rates() -> Problem:
    """The learning rates of a network's four tensors and its decay, over 100 steps on digits."""
    X, y = load_digits(return_X_y=True)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(X), generator=generator)
    x, y = torch.tensor(X / 16, dtype=D)[order], torch.tensor(y)[order]
    shapes = {"W1": (64, 16), "b1": (16,), "W2": (16, 10), "b2": (10,)}
    start = {
        k: torch.randn(s, generator=generator, dtype=D) / (s[0] ** 0.5 if len(s) > 1 else 10)
        for k, s in shapes.items()
    }

    def loss(w: Any, rows: slice) -> Tensor:
        return cross_entropy((x[rows] @ w["W1"] + w["b1"]).tanh() @ w["W2"] + w["b2"], y[rows])

    def inner(w: Any, h: Tensor) -> Tensor:
        decay = h[4].exp() * sum(v.square().sum() for v in w.values())
        return loss(w, slice(0, 200)) + decay

    def outer(w: Any, h: Tensor) -> Tensor:
        return loss(w, slice(200, 500))

    def step(w: Any, h: Tensor) -> Any:
        g = grad(inner)(w, h)
        return {k: w[k] - h[i].exp() * g[k] for i, k in enumerate(w)}

    h = torch.tensor([-2.0, -2.0, -2.0, -2.0, -6.0], dtype=D)
    steps = 100

    def unrolled(**options: Any) -> Run:
        return lambda: hypergrad.unrolled_grad(outer, step, start, h, steps=steps, **options)

    families: dict[str, dict[str, Run]] = {
        "unrolled": {"100 steps": unrolled()},
        "unrolled, checkpoints": {"100 steps": unrolled(checkpoint=True)},
        "unrolled, forward mode": {"100 steps": unrolled(mode="forward")},
        "unrolled, truncated": {f"last {k}": unrolled(truncate=k) for k in (1, 5, 20, 50)},
        "evolution strategies": {
            f"{pairs} pairs": lambda pairs=pairs: hypergrad.evolution_strategies_grad(
                outer,
                step,
                start,
                h,
                steps=steps,
                pairs=pairs,
                chunk_size=4,
                generator=torch.Generator().manual_seed(0),
            )
            for pairs in (4, 16, 64)
        },
    }

    def value(h: Tensor) -> Tensor:
        w = start
        for _ in range(steps):
            w = step(w, h)
        return outer(w, h)

    exact = grad(value)(h)
    return Problem(
        "5 learning rates and decay of a network, digits",
        exact,
        lambda: grad(inner)(start, h),
        families,
    )


def descent(inner: Any, rate: float) -> Any:
    return lambda w, h: w - rate * grad(inner)(w, h)


def minimised(objective: Callable[[Tensor], Tensor], start: Tensor, iterations: int) -> Tensor:
    """The minimiser by L-BFGS."""
    w = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [w],
        max_iter=iterations,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = objective(w)
        value.backward()
        return value

    optimiser.step(closure)
    return w.detach()


def largest(inner: Any, w: Tensor, h: Tensor) -> float:
    """The largest curvature of the inner loss, by its Hessian."""
    H = hessian(lambda v: inner(v.view_as(w), h))(w.reshape(-1))
    return float(torch.linalg.eigvalsh(H)[-1])


def common(
    outer: Any, inner: Any, w: Tensor, h: Tensor, start: Tensor
) -> dict[str, dict[str, Run]]:
    """The families that need nothing but the losses and the solution."""
    curvature = largest(inner, w, h)
    step = descent(inner, 1 / curvature)
    given = (outer, inner, w, h)
    options: dict[str, Any] = {"on_failure": "ignore"}

    def implicit(solver: Any) -> Run:
        return lambda: hypergrad.implicit_grad(*given, solver=solver, **options)

    def unrolled(steps: int, begin: Tensor, **more: Any) -> Run:
        return lambda: hypergrad.unrolled_grad(outer, step, begin, h, steps=steps, **more)

    def penalty(size: float, steps: int) -> Run:
        return lambda: hypergrad.penalty_grad(
            *given, penalty=size, lr=1 / curvature, steps=steps, **options
        )

    def trained(size: float, iterations: int) -> Run:
        def run() -> Tensor:
            z = minimised(lambda z: inner(z, h) + outer(z, h) / size, w, iterations)
            found: Tensor = hypergrad.penalty_grad(*given, penalty=size, penalised=z, **options)
            return found

        return run

    return {
        "implicit, CG": {
            f"{k} products": implicit(hypergrad.CG(maxiter=k, rtol=1e-12))
            for k in (1, 3, 10, 30, 100)
        },
        "implicit, Neumann": {
            f"{k} terms": implicit(hypergrad.Neumann(terms=k, step_size=1 / curvature))
            for k in (3, 10, 30, 100, 300)
        },
        "T1-T2": {"identity": implicit(hypergrad.Identity(scale=curvature))},
        "one step": {
            "of descent": lambda: hypergrad.one_step_grad(outer, step, w, h),
        },
        "finite difference": {
            "identity": lambda: hypergrad.finite_difference_grad(*given, scale=curvature),
        },
        "unrolled": {f"{k} steps": unrolled(k, start) for k in (10, 30, 100, 300)},
        "unrolled, checkpoints": {
            f"{k} steps": unrolled(k, start, checkpoint=True) for k in (100, 300)
        },
        "penalty, L-BFGS": {
            f"{size:g}, {k} iterations": trained(size, k)
            for size, k in ((10.0, 5), (100.0, 15), (1000.0, 30))
        },
        "penalty, descent": {
            f"{size:g}, {k} steps": penalty(size, k)
            for size, k in ((10.0, 10), (30.0, 30), (100.0, 100))
        },
    }


def finished(
    title: str, outer: Any, inner: Any, w: Tensor, h: Tensor, families: dict[str, dict[str, Run]]
) -> Problem:
    """The problem with its exact hypergradient, from a dense Hessian."""
    flat = w.reshape(-1)
    b = grad(outer)(w, h).reshape(-1)
    u = torch.linalg.solve(hessian(lambda v: inner(v.view_as(w), h))(flat), b)
    exact = -grad(lambda h: grad(inner)(w, h).reshape(-1) @ u)(h)
    return Problem(title, exact, lambda: grad(inner)(w, h), families)
