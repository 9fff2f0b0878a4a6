"""Bilevel problems that Hypothesis draws, and faults to plant in them.

Conditions and their Jacobians are written out by hand, so that neither the solver nor the dense
reference uses a derivative of this library.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import dropout, softplus
from torch.utils import _pytree as pytree

import hypergrad
from hypergrad import CG, GMRES, LSMR, MINRES, BiCGSTAB, Exact, Neumann, NormalCG
from tests.problems import F64, data

MINIMA = ("quadratic", "logistic", "softplus", "log-sum-exp")
KINDS = (*MINIMA, "fixed point", "root")
ROLES = ("inner", "outer", "both", "neither")
SHAPES = ((), (1,), (3,), (2, 2), (0,), (1, 2, 1))


@dataclasses.dataclass(frozen=True, eq=False)
class Drawn:
    """A bilevel problem of a drawn kind, structure and dtype.

    With ``theta`` the hyperparameters that enter the inner problem, ``c = c0 + C tanh(theta)`` is
    its linear term and ``s = exp(mean(tanh(theta)) / 3)`` its curvature.
    """

    seed: int
    kind: str
    shapes: tuple[tuple[int, ...], ...]  # of the leaves of params
    container: str
    roles: tuple[tuple[str, tuple[int, ...]], ...]  # role and shape of the leaves of hparams
    dtype: torch.dtype

    def __post_init__(self) -> None:
        n, m = (
            self.n,
            max(1, sum(torch.Size(s).numel() for r, s in self.roles if r in "inner both")),
        )
        Q = torch.linalg.qr(self.data(0, n, n)).Q
        M = self.data(1, n, n)
        parts = {
            "H": Q * torch.linspace(1, 4, n, dtype=self.dtype) @ Q.T,
            "M": 0.7 * M / torch.linalg.matrix_norm(M, 2),
            "X": self.data(2, 6, n),
            "c0": self.data(3, n),
            "C": self.data(4, n, m) / m**0.5,
            "target": self.data(5, n),
            "hparams": {f"{r}{i}": self.data(10 + i, *s) for i, (r, s) in enumerate(self.roles)},
        }
        for name, value in parts.items():
            object.__setattr__(self, name, value)

    def __repr__(self) -> str:
        return f"Drawn{tuple(getattr(self, f.name) for f in dataclasses.fields(self))}"

    @property
    def n(self) -> int:
        return sum(torch.Size(shape).numel() for shape in self.shapes)

    def data(self, seed: int, *shape: int) -> Tensor:
        return data(100 * self.seed + seed, *shape, dtype=self.dtype)

    # Structure.

    def build(self, vector: Tensor) -> Any:
        sizes = [torch.Size(shape).numel() for shape in self.shapes]
        parts = torch.split(vector, sizes)
        leaves = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        if self.container == "dict":
            return {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
        return [leaves[0], {"rest": tuple(leaves[1:])}] if self.container == "nested" else leaves

    @staticmethod
    def vector(params: Any) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(params)])

    def entering(self, hparams: Any, place: str) -> Tensor:
        chosen = [h.reshape(-1) for name, h in hparams.items() if name[:4] in (place[:4], "both")]
        return torch.cat(chosen) if chosen else torch.zeros(0, dtype=self.dtype)

    # The two problems.

    @property
    def enters(self) -> bool:
        """Whether a hyperparameter enters the inner problem."""
        return self.entering(self.hparams, "inner").numel() > 0

    def terms(self, hparams: Any) -> tuple[Tensor, Tensor]:
        theta = self.entering(hparams, "inner").tanh()
        if not theta.numel():
            return torch.ones((), dtype=self.dtype), self.c0
        return (theta.mean() / 3).exp(), self.c0 + self.C @ theta

    def inner(self, params: Any, hparams: Any) -> Any:
        """The objective, the map or the equation, by the kind."""
        w, (s, c) = self.vector(params), self.terms(hparams)
        z = self.X @ w
        if self.kind == "fixed point":
            return self.build(torch.tanh(s * (self.M @ w) / 2 + c))
        if self.kind == "root":
            return self.build(self.M @ w + s * w + torch.sin(w) / 5 - c)
        if self.kind == "logistic":
            return (softplus(z) - z / 3).mean() + s * w.square().sum() / 2 - c @ w / 3
        if self.kind == "log-sum-exp":
            return z.logsumexp(0) + s * w.square().sum() / 2 - c @ w
        value = s * (w @ (self.H @ w)) / 2 - c @ w
        return value + softplus(z).mean() if self.kind == "softplus" else value

    def by_hand(self, w: Tensor, s: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """The condition and its Jacobian."""
        eye, z = torch.eye(self.n, dtype=w.dtype), self.X @ w
        p = torch.sigmoid(z)
        bent = self.X.T @ ((p * (1 - p))[:, None] * self.X) / 6
        match self.kind:
            case "quadratic":
                return s * (self.H @ w) - c, s * self.H
            case "softplus":
                return s * (self.H @ w) - c + self.X.T @ p / 6, s * self.H + bent
            case "logistic":
                return self.X.T @ (p - 1 / 3) / 6 + s * w - c / 3, bent + s * eye
            case "log-sum-exp":
                q = torch.softmax(z, 0)
                J = self.X.T @ (q.diag() - torch.outer(q, q)) @ self.X + s * eye
                return self.X.T @ q + s * w - c, J
            case "fixed point":
                t = torch.tanh(s * (self.M @ w) / 2 + c)
                return w - t, eye - (1 - t.square())[:, None] * s * self.M / 2
            case _:
                J = self.M + s * eye + (w.cos() / 5).diag()
                return self.M @ w + s * w + w.sin() / 5 - c, J

    def outer(self, params: Any, hparams: Any) -> Tensor:
        direct = torch.sin(self.entering(hparams, "outer")).sum() / 3
        return (self.vector(params) - self.target).square().mean() + direct

    def newton(self, hparams: Any, steps: int, rate: float = 1.0) -> Tensor:
        w, (s, c) = torch.zeros(self.n, dtype=self.dtype), self.terms(hparams)
        for _ in range(steps):
            F, J = self.by_hand(w, s, c)
            w = w - rate * torch.linalg.solve(J, F)
        return w

    def solve(self, hparams: Any) -> Any:
        return self.build(self.newton(hparams, 9))

    def hypergradient(self) -> Any:
        """The dense formula, with the Jacobian by hand."""
        w, (s, c) = self.newton(self.hparams, 20), self.terms(self.hparams)
        _, J = self.by_hand(w, s, c)
        given = pytree.tree_map(lambda h: h.clone().requires_grad_(), self.hparams)
        u = torch.linalg.solve(J.T, 2 * (w - self.target) / self.n)
        total = self.outer(self.build(w), given) - u @ self.by_hand(w, *self.terms(given))[0]
        leaves, spec = pytree.tree_flatten(given)
        total = total + 0 * sum(leaf.sum() for leaf in leaves)  # some reach nothing else
        grads = torch.autograd.grad(total, leaves)
        return pytree.tree_unflatten(list(grads), spec)

    def condition(self, inner: Callable[[Any, Any], Any] | None = None, **options: Any) -> Any:
        kinds = {"fixed point": hypergrad.FixedPoint, "root": hypergrad.Root}
        return kinds.get(self.kind, hypergrad.Minimum)(inner or self.inner, **options)

    def problem(self, **changes: Any) -> dict[str, Any]:
        """The arguments of `check_hypergrad`."""
        given = {"outer": self.outer, "inner": self.condition(), "solve": self.solve}
        return {**given, "hparams": self.hparams, **changes}


def drawn_problems(
    *, dtypes: tuple[torch.dtype, ...] = (F64,), entering: bool = False, unknowns: int = 1
) -> st.SearchStrategy[Drawn]:
    """Problems with so many unknowns; `entering`: with a hyperparameter in the inner problem."""
    leaf = st.tuples(st.sampled_from(ROLES), st.sampled_from(((), (2,), (1, 2), (0,), (4, 4))))
    first = st.tuples(st.sampled_from(("inner", "both")), st.sampled_from(((), (2,), (4, 4))))
    roles = st.tuples(first, leaf) if entering else st.lists(leaf, min_size=1, max_size=3)
    return st.builds(
        Drawn,
        st.integers(0, 10_000),
        st.sampled_from(KINDS),
        st
        .lists(st.sampled_from(SHAPES), min_size=1, max_size=4)
        .map(tuple)
        .filter(lambda shapes: sum(torch.Size(s).numel() for s in shapes) >= unknowns),
        st.sampled_from(("dict", "nested", "list")),
        roles.map(tuple).filter(lambda roles: any(0 not in shape for _, shape in roles)),
        st.sampled_from(dtypes),
    )


def solvers(problem: Drawn) -> st.SearchStrategy[Any]:
    """Solvers that can solve the problem's linear system, and None."""
    rtol = 1e-10 if problem.dtype == F64 else None
    found = [None, Exact(), *(S(rtol=rtol) for S in (GMRES, BiCGSTAB, NormalCG, LSMR))]
    if problem.kind in MINIMA:
        found += [CG(rtol=rtol), MINRES(rtol=rtol)]
    if problem.kind != "root":
        found.append(Neumann(terms=2000, rtol=rtol))
    return st.sampled_from(found)


# Faults. Each takes a problem to the arguments of `check_hypergrad` and the part to blame.


class Doubled(torch.autograd.Function):
    """The identity, with a wrong backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 2 * grad


class Square(torch.autograd.Function):
    """The square, whose backward uses a detached value: its second derivative is lost."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.slope = 2 * x.detach()
        return x.square()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.slope


def stopped_early(problem: Drawn) -> tuple[dict[str, Any], str]:
    solve = lambda h: problem.build(problem.newton(h, 3, rate=0.5))
    return problem.problem(solve=solve), "inner problem not solved"


def stopped_a_little_early(problem: Drawn) -> tuple[dict[str, Any], str]:
    solve = lambda h: problem.build(problem.newton(h, 7, rate=0.5))
    return problem.problem(solve=solve), "inner problem not solved"


def cut_short(problem: Drawn) -> tuple[dict[str, Any], str]:
    solver = GMRES(maxiter=1, restart=1, rtol=1e-12)
    return problem.problem(solver=solver), "linear system not solved"


def damped(problem: Drawn) -> tuple[dict[str, Any], str]:
    return problem.problem(solver=GMRES(rtol=1e-12, damping=0.5)), "linear system not solved"


def detached(problem: Drawn) -> tuple[dict[str, Any], str]:
    def inner(params: Any, hparams: Any) -> Any:
        return problem.inner(params, {name: h.detach() for name, h in hparams.items()})

    return problem.problem(inner=problem.condition(inner)), "hyperparameter not connected"


def half_detached(problem: Drawn) -> tuple[dict[str, Any], str]:
    def inner(params: Any, hparams: Any) -> Any:
        return problem.inner(params, {name: (h + h.detach()) / 2 for name, h in hparams.items()})

    return problem.problem(inner=problem.condition(inner)), "hyperparameter not connected"


def captured(problem: Drawn) -> tuple[dict[str, Any], str]:
    inner = lambda params, _: problem.inner(params, problem.hparams)
    return problem.problem(inner=problem.condition(inner)), "hyperparameter not connected"


def constant_solution(problem: Drawn) -> tuple[dict[str, Any], str]:
    solve = lambda _: problem.solve(problem.hparams)
    return problem.problem(solve=solve), "hyperparameter not connected"


def noisy_outer(problem: Drawn) -> tuple[dict[str, Any], str]:
    outer = lambda params, h: problem.outer(params, h) * (1 + 1e-3 * torch.rand(()))
    return problem.problem(outer=outer), "loss not deterministic"


def dropout_in_outer(problem: Drawn) -> tuple[dict[str, Any], str]:
    outer = lambda params, h: problem.outer(pytree.tree_map(dropout, params), h)
    return problem.problem(outer=outer), "loss not deterministic"


def dropout_in_inner(problem: Drawn) -> tuple[dict[str, Any], str]:
    inner = lambda params, h: problem.inner(pytree.tree_map(dropout, params), h)
    return problem.problem(inner=problem.condition(inner)), "loss not deterministic"


def wrong_backward_in_outer(problem: Drawn) -> tuple[dict[str, Any], str]:
    outer = lambda params, h: problem.outer(pytree.tree_map(Doubled.apply, params), h)
    return problem.problem(outer=outer), "implicit gradient"


def wrong_backward_in_inner(problem: Drawn) -> tuple[dict[str, Any], str]:
    def inner(params: Any, hparams: Any) -> Any:
        return problem.inner(pytree.tree_map(Doubled.apply, params), hparams)

    return problem.problem(inner=problem.condition(inner)), "implicit gradient"


def lost_second_derivative(problem: Drawn) -> tuple[dict[str, Any], str]:
    def inner(params: Any, hparams: Any) -> Any:
        w = problem.vector(params)
        return problem.inner(params, hparams) + (w.square() - Square.apply(w)).sum() / 5

    if problem.kind not in MINIMA:
        return wrong_backward_in_inner(problem)
    return problem.problem(inner=problem.condition(inner)), "implicit gradient"


def wrong_symmetry(problem: Drawn) -> tuple[dict[str, Any], str]:
    if problem.kind in MINIMA:
        problem = dataclasses.replace(problem, kind="root")
    condition = problem.condition(symmetric=True)
    return problem.problem(inner=condition, solver=MINRES(rtol=1e-8)), "implicit gradient"


def restless_solve(problem: Drawn) -> tuple[dict[str, Any], str]:
    generator = torch.Generator().manual_seed(0)

    def solve(hparams: Any) -> Any:
        noise = 1 + 1e-3 * torch.randn((), generator=generator)
        return pytree.tree_map(lambda w: w * noise, problem.solve(hparams))

    return problem.problem(solve=solve), "solve not deterministic"


FAULTS = (
    stopped_early,
    stopped_a_little_early,
    cut_short,
    damped,
    detached,
    half_detached,
    captured,
    constant_solution,
    noisy_outer,
    dropout_in_outer,
    dropout_in_inner,
    wrong_backward_in_outer,
    wrong_backward_in_inner,
    lost_second_derivative,
    wrong_symmetry,
    restless_solve,
)
