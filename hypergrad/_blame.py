"""A bi-level problem taken apart, to say which part of it makes a hypergradient wrong."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ._conditions import Condition, GaussNewton
from ._differences import Direction, derivative, first_step
from ._errors import HypergradError, NotConnected, NotFinite
from ._guard import Guard
from ._implicit_grad import _outer_gradient, implicit_grad
from ._info import SolveInfo, Status
from ._linearise import Linearisation
from ._problem import Problem, scalar
from ._randomness import Draw
from ._trace import detached
from ._tree import Tree
from .solvers import GMRES, Exact, Solver

Verdict = tuple[str, str]

_DENSE_BELOW = 1024
_NEWTON_STEPS = 10


class Case:
    """A bi-level problem at given hyperparameters, and its parts.

    Each function sees the same random numbers at every evaluation, and copies of its arguments.
    """

    precision: torch.dtype
    rtol: float

    def __init__(
        self,
        outer: Callable[[Any, Any], Any],
        condition: Condition,
        solve: Callable[[Any], Any],
        tree: Tree,
        hparams: Any,
        solver: Solver | None,
    ) -> None:
        self.outer, self.condition, self.solve = outer, condition, solve
        self.tree, self.hparams, self.solver = tree, hparams, solver
        self._solving, self._outer, self._inner = Draw(), Draw(), Draw()
        self.at = [detached(v) for v in tree.variables]
        self.solution = self.solved(self.at)
        self.params = Tree("params", self.solution, skip_frozen=True)
        # Nothing is taken on trust here: neither the solver nor the symmetry.
        self.plain = condition
        if any(f.name == "symmetric" for f in _fields(condition)):
            self.plain = dataclasses.replace(condition, symmetric=False)  # type: ignore[type-var]
        n = sum(v.numel() for v in self.params.variables)
        self.exact: Solver = Exact() if n <= _DENSE_BELOW else GMRES(rtol=1e-8, maxiter=5 * n)

    # The functions.

    def given(self, variables: Sequence[Tensor]) -> Any:
        """The hyperparameters with other variables, as copies that are the callee's own."""
        return pytree.tree_map(_copy, self.tree.rebuild(list(variables)))

    def solved(self, variables: Sequence[Tensor]) -> Any:
        """What `solve` returns, copied: it may train one module in place."""
        with self._solving.evaluation():
            return pytree.tree_map(_keep, self.solve(self.given(variables)))

    def value(self, params: Any, variables: Sequence[Tensor]) -> float:
        """The outer loss."""
        with self._outer.evaluation(), Guard():
            loss = self.outer(pytree.tree_map(_keep, params), self.given(variables))
        return float(scalar("outer", loss).detach())

    def along(self, line: Direction, *, refined: bool = False) -> Callable[[float], float]:
        """The outer loss at the solution, as a function of a step in the hyperparameters."""

        def value(step: float) -> float:
            variables = line.moved(self.at, step)
            params = self.solved(variables)
            return self.value(self.newton(params, variables) if refined else params, variables)

        return value

    def flat(self, params: Any) -> Tensor:
        """The variables of `params` as one vector."""
        tree = Tree("params", params, skip_frozen=True)
        return self.problem(self.condition, params, self.at).layout().flatten(tree.variables)

    def problem(self, condition: Condition, params: Any, variables: Sequence[Tensor]) -> Problem:
        """The inner problem at some point."""
        P = Tree("params", params, skip_frozen=True)
        return Problem.of(condition, P, [Tree("hparams", self.given(variables))])

    def linearised(
        self, params: Any, variables: Sequence[Tensor], *, forward: bool = False
    ) -> Linearisation:
        """The condition at some point, and its derivatives."""
        problem = self.problem(self.plain, params, variables)
        tensors = [detached(t) for t in problem.tensors]
        return Linearisation(problem, tensors, self._inner, forward=forward)

    def implicit(
        self, solver: Solver | None, params: Any = None, condition: Condition | None = None
    ) -> tuple[list[Tensor], SolveInfo]:
        """The implicit hypergradient, a tensor for each variable, and its evidence."""
        grads, info = implicit_grad(
            self.outer,
            condition or self.condition,
            self.solution if params is None else params,
            self.hparams,
            solver=solver,
            inner_tol=None,
            on_failure="ignore",
            return_info=True,
        )
        return Tree("hparams", grads).variables, info

    def unrolled(self) -> tuple[list[Tensor] | None, str]:
        """The derivative through `solve`, or why there is none."""
        variables = [v.clone().requires_grad_() for v in self.at]
        hparams = self.tree.rebuild([v.view_as(v) for v in variables])
        try:
            with self._solving.evaluation():
                params = self.solve(hparams)
            leaves = [p for p in pytree.tree_leaves(params) if isinstance(p, Tensor)]
            if not any(p.grad_fn is not None for p in leaves):
                return None, "solve returns detached tensors"
            with self._outer.evaluation(), Guard():
                value = scalar("outer", self.outer(params, hparams))
            found = torch.autograd.grad(value, variables, allow_unused=True)
        except Exception as error:  # whatever the caller's solver raises
            text = str(error).strip().split("\n")[0]
            return None, f"it raised {type(error).__name__}: {text[:200].rstrip('.')}"
        return [
            torch.zeros_like(v) if g is None else g for v, g in zip(variables, found, strict=True)
        ], ""

    def newton(self, params: Any, variables: Sequence[Tensor]) -> Any:
        """`params` after Newton steps on the condition, as long as they help."""
        best, size = params, math.inf
        for _ in range(_NEWTON_STEPS):
            lin = self.linearised(params, variables, forward=True)
            now = float(lin.residual.norm())
            if not now < size:
                return best
            best, size = params, now
            step, _ = self.exact.solve(lin.product, lin.residual, rmatvec=lin.transposed)
            tree = Tree("params", params, skip_frozen=True)
            moved = [p - d for p, d in zip(tree.variables, lin.layout.split(step), strict=True)]
            params = tree.rebuild([_like(p, m) for p, m in zip(tree.variables, moved, strict=True)])
        return best

    # What may be wrong.

    def not_deterministic(self) -> Verdict | None:
        """A loss that gives two values at one point."""
        given = self.given(self.at)
        with Guard():
            values = [scalar("outer", self.outer(self.solution, given)).detach() for _ in range(2)]
        if self._differ(*values):
            return "loss not deterministic", (
                f"outer gave {float(values[0]):.6g} and {float(values[1]):.6g} at the same point. "
                "Call module.eval() (dropout), and draw random numbers and batches once, outside."
            )
        problem = self.problem(self.plain, self.solution, self.at)
        tensors = [detached(t) for t in problem.tensors]
        try:
            sizes = [Linearisation(problem, tensors, Draw()).residual for _ in range(2)]
        except NotConnected:
            return None  # said with the hypergradient
        if self._differ(*sizes):
            return "loss not deterministic", (
                f"The condition of inner (its gradient) changed by "
                f"{float((sizes[0] - sizes[1]).norm() / sizes[0].norm()):.1e}, relatively, between "
                "two evaluations at the same point. Call module.eval() (dropout), and draw random "
                "numbers and batches once, outside."
            )
        return None

    def not_finite(self, gradient: Sequence[Tensor], info: SolveInfo) -> Verdict | None:
        """NaN or infinity in a loss or the hypergradient."""
        if all(bool(torch.isfinite(t).all()) for t in (*gradient, info.outer_value)):
            return None
        text = "The hypergradient holds NaN or infinity."
        try:
            self._judged()
        except HypergradError as error:
            text = str(error)
            if not isinstance(error, NotFinite):
                return "linear system not solved", text
        return "not finite", text

    def restless(self) -> float:
        """How far two solutions with the same random numbers are apart, relatively."""
        first, second = self.flat(self.solution), self.flat(self.solved(self.at))
        return float((first - second).norm() / first.norm().clamp(min=1e-30))

    def asymmetry(self) -> float | None:
        """How far A is from the symmetry that it is declared to have; None: not far."""
        if self.plain is self.condition or not self.condition.symmetric:
            return None
        lin = self.linearised(self.solution, self.at)
        u, v = (_random(lin.residual, seed) for seed in (1, 2))
        there, back = lin.transposed(u), lin.transposed(v)
        scale = float(u.norm() * back.norm() + v.norm() * there.norm())
        apart = abs(float(v @ there - u @ back)) / max(scale, 1e-300)
        return apart if apart > 1e3 * torch.finfo(self.precision).eps else None

    def unlike(self, line: Direction, gap: float, u: Tensor) -> Verdict | None:
        """A partial derivative that is not the function's own."""
        lin = self.linearised(self.solution, self.at)
        problem = self.problem(self.plain, self.solution, self.at)
        tensors = [detached(t) for t in problem.tensors]
        with self._outer.evaluation():
            _, _, cotangent, direct, _ = _outer_gradient(self.outer, problem, tensors, False)

        flat = self.flat(self.solution)
        v = _random(flat, 3)
        v = v / v.norm()
        # Rounding in the condition, whose terms may be far larger than their sum.
        terms = float(u.norm() * lin.transposed(v).norm() * flat.norm()) * flat.numel() ** 0.5
        rounding = 10 * torch.finfo(self.precision).eps * terms / first_step(self.precision)

        def differs(found: float, f: Callable[[float], float], length: float, big: float) -> bool:
            expected, error = derivative(f, length, self.precision, 0.1 * self.rtol, abs(gap))
            return abs(found - expected) > big + 4 * error + rounding / length

        def residual(params: Any, variables: Sequence[Tensor]) -> float:
            return float(u @ self.linearised(params, variables).residual)

        for name, found, f in (
            (
                "outer",
                line.dot(direct),
                lambda s: self.value(self.solution, line.moved(self.at, s)),
            ),
            (
                "the condition of inner",
                line.dot(lin.cross(u)),
                lambda s: residual(self.solution, line.moved(self.at, s)),
            ),
        ):
            if differs(found, f, line.length, 0.3 * abs(gap)):
                return "hyperparameter not connected", (
                    f"{name} changes with {line.leaf or 'hparams'} in a way that its derivative "
                    "does not see: look for a .detach(), a .item(), a torch.no_grad() or a copy in "
                    f"it (found along {line.label})."
                )

        tree = self.params

        def moved(step: float) -> Any:
            parts = lin.layout.split(flat + step * v)
            pairs = zip(tree.variables, parts, strict=True)
            return tree.rebuild([_like(p, m) for p, m in pairs])

        length = float(flat.norm()) or 1.0
        slope = float(lin.layout.flatten(cotangent) @ v)
        bend = float(lin.transposed(u) @ v)
        for name, found, f in (
            ("outer", slope, lambda s: self.value(moved(s), self.at)),
            ("the condition of inner", bend, lambda s: residual(moved(s), self.at)),
        ):
            if differs(found, f, length, 1e-2 * abs(found)):
                why = "a .detach(), a torch.no_grad() or a custom Function with a wrong backward"
                if isinstance(self.condition, GaussNewton) and name != "outer":
                    why = (
                        "the Gauss-Newton matrix is not the Hessian where the residuals are not "
                        "small, and GaussNewton is meant for that; otherwise"
                    ) + f" look for {why}"
                return "implicit gradient", (
                    f"{name} changes with params in a way that its derivative does not see: {why}."
                )
        return None

    def unheard(self, line: Direction) -> Verdict | None:
        """A hyperparameter that `solve` and `inner` do not use in the same way."""
        step = first_step(self.precision) * line.length / 4
        up, down = (line.moved(self.at, sign * step) for sign in (1, -1))
        p_up, p_down = self.solved(up), self.solved(down)

        def slope(params: tuple[Any, Any]) -> Tensor:
            ends = [self.linearised(p, h).residual for p, h in zip(params, (up, down), strict=True)]
            return (ends[0] - ends[1]) / (2 * step)

        lin = self.linearised(self.solution, self.at, forward=True)
        dp = (self.flat(p_up) - self.flat(p_down)) / (2 * step)
        by_params = float(lin.product(dp).norm())
        by_hparams = float(slope((self.solution, self.solution)).norm())
        name = line.leaf or "hparams"
        if by_hparams == 0 and by_params > 0:
            return "hyperparameter not connected", (
                f"solve moves with {name} and inner does not depend on it: a closure captures it, "
                "a .detach() cuts it off, or solve alone uses it (a learning rate, a start). Use "
                "the argument that inner is given."
            )
        if by_params == 0 and by_hparams > 0:
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

    def unsolved(self, line: Direction, figures: tuple[float, float, float]) -> Verdict | None:
        """An inner problem whose derivatives agree once it is solved further."""
        _, info = self.implicit(self.exact, condition=self.plain)
        try:
            params = self.newton(self.solution, self.at)
            gradient, after = self.implicit(self.exact, params, self.plain)
            implicit = line.dot(gradient)
            found, error = derivative(
                self.along(line, refined=True),
                line.length,
                self.precision,
                0.1 * self.rtol,
                1e-3 * abs(implicit),
            )
        except HypergradError:
            implicit = found = error = math.nan
        size = max(abs(implicit), abs(found))
        agree = abs(implicit - found) <= self.rtol * size + 4 * error and error <= 0.1 * size
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
            "the same loss as inner."
        )

    def unsolved_system(self, *, mended: bool) -> Verdict:
        """What the linear solver has to say; `mended`: another one's answer agrees."""
        _, info = self.implicit(self.solver)
        so = "; with the system solved the gradient agrees" if mended else ""
        text = ""
        try:
            self._judged()
        except HypergradError as error:
            text = f" {error}"
        else:
            text = (
                " Raise maxiter (terms for Neumann) and set rtol; damping and Identity solve "
                "another system on purpose."
            )
        return "linear system not solved", (
            f"{info.method} ended with {Status(int(info.status)).name} at the relative residual "
            f"{float(info.residual_norm):.1e}{so}.{text}"
        )

    def _judged(self) -> None:
        implicit_grad(
            self.outer,
            self.condition,
            self.solution,
            self.hparams,
            solver=self.solver,
            inner_tol=None,
            on_failure="raise",
        )

    def _differ(self, a: Tensor, b: Tensor) -> bool:
        near = 1e3 * torch.finfo(self.precision).eps
        return not torch.allclose(a, b, rtol=near, atol=near * _largest(a), equal_nan=True)


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
    apart = case.restless()
    if apart > 1e4 * torch.finfo(case.precision).eps:
        return "solve not deterministic", (
            f"Two calls of solve with the same hparams and the same state of PyTorch's generators "
            f"returned params that are {apart:.1e} apart, relatively. Start it in the same way at "
            "each call, from a fixed seed and not from the last answer."
        )
    if useless:
        return case.unsolved(line, figures) or (
            "solve not smooth",
            f"Differences along {line.label} at different step sizes disagree: {difference:.3g} "
            f"with an estimated error of {error:.1e}. The solution jumps or is rough there: solve "
            "to a smaller tolerance, with a fixed number of steps"
            + ("." if case.precision == torch.float64 else ", and in float64: these are rounded."),
        )
    exact, info = case.implicit(case.exact, condition=case.plain)
    mended = agrees(exact)
    asymmetry = case.asymmetry()
    if asymmetry is not None:
        return "implicit gradient", (
            f"{type(case.condition).__name__} is declared symmetric=True, but u.Av and v.Au "
            f"differ by {asymmetry:.1e}, relatively. Declare symmetric=False."
        )
    if mended:
        return case.unsolved_system(mended=True)
    u = case.flat(info.solution)
    found = case.unlike(line, implicit - difference, u) or case.unheard(line)
    if found is None and bool(info.success):
        found = case.unsolved(line, figures)
    if found is not None:
        return found
    if not bool(info.success and case.implicit(case.solver)[1].success):
        return case.unsolved_system(mended=False)
    return "implicit gradient", (
        f"Along {line.label} the implicit derivative is {implicit:.6g} and the difference "
        f"{difference:.6g}, though the inner problem and the linear system are solved. Does inner "
        "state what solve solves, and is the solution an isolated one?"
    )


def _fields(condition: Condition) -> Sequence[Any]:
    return dataclasses.fields(condition) if dataclasses.is_dataclass(condition) else ()


def _copy(leaf: Any) -> Any:
    return detached(leaf).clone() if isinstance(leaf, Tensor) else leaf


def _keep(leaf: Any) -> Any:
    """A copy that is still a parameter, frozen or not, where the leaf is one."""
    return _like(leaf, _copy(leaf)) if isinstance(leaf, Tensor) else leaf


def _like(leaf: Tensor, values: Tensor) -> Tensor:
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(values, requires_grad=leaf.requires_grad)
    return values


def _random(like: Tensor, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like)


def _largest(a: Tensor) -> float:
    finite = a[torch.isfinite(a)]
    return float(finite.abs().max()) if finite.numel() else 0.0
