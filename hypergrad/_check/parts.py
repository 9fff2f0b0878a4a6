"""A bi-level problem taken apart: each part can be evaluated by itself, anywhere."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .._autograd.guard import Guard
from .._autograd.products import filled
from .._autograd.random_numbers import Draw
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached
from .._errors import HypergradError, NotConnected, StructureMismatch
from .._implicit.entrance import implicit_grad
from .._implicit.linearisation import Linearisation
from .._implicit.outer_slopes import outer_gradient
from .._info import SolveInfo
from .._pytrees import Layout, Tree
from .._warnings import OnFailure
from ..conditions._base import Condition
from ..conditions._inner_problem import Problem, scalar
from ..conditions._minimum import Minimum
from ..conditions._passes import Passes
from ..solvers import GMRES, Exact, Solver
from .differences import Direction, first_step

_DENSE_BELOW = 1024
_NEWTON_STEPS = 10
_TOLERANCE = 0.4  # a solved problem's relative error is at most this power of eps, 5e-7 in float64


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
        solver: Solver | None,
    ) -> None:
        self.outer, self.condition, self.solve = outer, condition, solve
        self.tree, self.solver = tree, solver
        self._solving, self._outer, self._inner = Draw(), Draw(), Draw()
        self.at = [detached(v) for v in tree.variables]
        # Each leaf by itself, also where one tensor stands under two names.
        self.hparams = tree.rebuild(self.at)
        self.solution = self.solved(self.at)
        self.params = self._taken_apart(self.solution)
        if not any(v.numel() for v in self.params.variables):
            raise StructureMismatch(
                "solve must return params, a pytree with a floating-point tensor in it; it "
                f"returned {type(self.solution).__name__}. Is a return missing?",
                argument="solve",
            )
        self.layout = Layout(self.params, self.params.variables)
        # Nothing is taken on trust here: neither the solver nor the symmetry.
        self.plain = condition
        if any(f.name == "symmetric" for f in _fields(condition)):
            self.plain = dataclasses.replace(condition, symmetric=False)  # type: ignore[type-var]
        n = self.layout.n
        self.exact: Solver = Exact() if n <= _DENSE_BELOW else GMRES(rtol=1e-8, maxiter=5 * n)

    # The functions.

    def hparams_at(self, variables: Sequence[Tensor]) -> Any:
        """Put other variables into the hyperparameters, as copies that are the callee's own."""
        return pytree.tree_map(_copy, self.tree.rebuild(list(variables)))

    def solved(self, variables: Sequence[Tensor]) -> Any:
        """Call `solve` and copy what it returns: it may train one module in place."""
        try:
            with self._solving.evaluation():
                return kept(self.solve(self.hparams_at(variables)))
        except Exception as error:
            if variables is not self.at:
                error.add_note(
                    "check_hypergrad: solve raised this at hparams a small step from those given, "
                    "where a difference is to be taken."
                )
            raise

    def value(self, params: Any, variables: Sequence[Tensor]) -> float:
        """Evaluate the outer loss."""
        with self._outer.evaluation(), Guard():
            loss = self.outer(kept(params), self.hparams_at(variables))
        return float(scalar("outer", loss).detach())

    def objective(self, params: Any) -> float:
        """Evaluate the inner loss, of a condition that has one."""
        assert isinstance(self.condition, Minimum)
        total, count = 0.0, 0
        with self._inner.evaluation():
            for batch in Passes(self.condition.batches):
                with Guard():
                    loss = self.condition.of_batch(batch).f(kept(params), self.hparams_at(self.at))
                total, count = total + float(scalar("inner", loss).detach()), count + 1
        return total / count

    def at_params(self, flat: Tensor) -> Any:
        """Take params out of a vector in which they lie as `flat` puts them there."""
        pairs = zip(self.params.variables, self.layout.split(flat), strict=True)
        return self.params.rebuild([like(p, leaf) for p, leaf in pairs])

    def _taken_apart(self, params: Any) -> Tree:
        of_objective = self.condition.of_objective
        return Tree("params", params, skip_frozen=True, of_autograd=of_objective)

    def along(self, line: Direction, *, refined: bool = False) -> Callable[[float], float]:
        """Make the outer loss at the solution a function of a step in the hyperparameters."""

        def value(step: float) -> float:
            variables = line.moved(self.at, step)
            params = self.solved(variables)
            return self.value(self.newton(params, variables) if refined else params, variables)

        return value

    def flat(self, params: Any) -> Tensor:
        """Join the variables of `params` to one vector."""
        tree = self._taken_apart(params)
        return Layout(tree, tree.variables).flatten([detached(v) for v in tree.variables])

    def adjoint(self, info: SolveInfo) -> Tensor:
        """Lay out the solution of the linear system as one vector, as `flat` does."""
        leaves = pytree.tree_leaves(info.solution)
        return self.layout.flatten([leaves[i] for i in self.params.where])

    def problem(self, condition: Condition, params: Any, variables: Sequence[Tensor]) -> Problem:
        """Pose the inner problem at some point."""
        P = self._taken_apart(params)
        return Problem.of(condition, P, [Tree("hparams", self.hparams_at(variables))])

    def linearised(
        self,
        params: Any,
        variables: Sequence[Tensor],
        *,
        forward: bool = False,
        cross_forward: bool = False,
    ) -> Linearisation:
        """Linearise the condition at some point."""
        problem = self.problem(self.plain, params, variables)
        tensors = [detached(t) for t in problem.tensors]
        return Linearisation(
            problem, tensors, self._inner, forward=forward, cross_forward=cross_forward
        )

    def implicit(
        self,
        solver: Solver | None,
        params: Any = None,
        condition: Condition | None = None,
        on_failure: OnFailure = "ignore",
    ) -> tuple[list[Tensor], SolveInfo]:
        """Compute the implicit hypergradient, a tensor for each variable, and its evidence."""
        grads, info = implicit_grad(
            self.outer,
            condition or self.condition,
            self.solution if params is None else params,
            self.hparams,
            solver=solver,
            inner_tol=None,
            on_failure=on_failure,
            return_info=True,
        )
        return Tree("hparams", grads).variables, info

    @cached_property
    def hypergradient(self) -> tuple[list[Tensor], SolveInfo]:
        """The implicit hypergradient by the solver that is checked, and its evidence."""
        return self.implicit(self.solver)

    @cached_property
    def exactly(self) -> tuple[list[Tensor], SolveInfo]:
        """The same by a solver that takes nothing on trust."""
        return self.implicit(self.exact, condition=self.plain)

    @cached_property
    def refused(self) -> NotConnected | None:
        """The error where a function does not depend on an argument that it must depend on."""
        try:
            self.hypergradient  # noqa: B018
        except NotConnected as error:
            return error
        return None

    @property
    def known(self) -> SolveInfo | None:
        """The evidence of the hypergradient, where that has been computed."""
        return self.__dict__["hypergradient"][1] if "hypergradient" in self.__dict__ else None

    @property
    def finite(self) -> bool:
        """The outer loss and the hypergradient are finite."""
        gradient, info = self.hypergradient
        return all(bool(torch.isfinite(t).all()) for t in (*gradient, info.outer_value))

    @cached_property
    def judgement(self) -> HypergradError | None:
        """The error that `implicit_grad` raises where it is to raise one."""
        try:
            self.implicit(self.solver, on_failure="raise")
        except HypergradError as error:
            return error
        return None

    def slopes(self) -> tuple[Tensor, list[Tensor | None]]:
        """Differentiate the outer loss partially: by params, one vector, and by hparams."""
        problem = self.problem(self.plain, self.solution, self.at)
        tensors = [detached(t) for t in problem.tensors]
        with self._outer.evaluation():
            _, _, cotangent, direct, _ = outer_gradient(self.outer, problem, tensors, False)
        return self.layout.flatten(cotangent), direct

    def terms(self, lines: Sequence[Direction], u: Tensor) -> list[float]:
        """Add up the absolute sizes of a hypergradient's terms, along directions."""
        _, direct = self.slopes()
        lin = self.linearised(self.solution, self.at, cross_forward=True)
        sizes = []
        for line in lines:
            indirect = float((u * lin.cross_forward(line.tangents)).abs().sum())
            sizes.append(indirect + line.dot(direct, torch.abs))
        return sizes

    def unrolled(self) -> tuple[list[Tensor] | None, str]:
        """Differentiate through `solve`, or say why that cannot be done."""
        variables = [v.clone().requires_grad_() for v in self.at]
        hparams = self.tree.rebuild([v.view_as(v) for v in variables])
        try:
            with self._solving.evaluation(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tensors that require grad, float(hparams)
                params = self.solve(hparams)
            leaves = [p for p in pytree.tree_leaves(params) if isinstance(p, Tensor)]
            if not any(p.grad_fn is not None for p in leaves):
                return None, "solve returns detached tensors"
            with self._outer.evaluation(), Guard():
                value = scalar("outer", self.outer(params, hparams))
            gradient = torch.autograd.grad(value, variables, allow_unused=True)
        except Exception as error:  # whatever the caller's solver raises
            text = str(error).strip().split("\n")[0]
            return None, f"it raised {type(error).__name__}: {text[:200].rstrip('.')}"
        return filled(gradient, variables), ""

    def newton(self, params: Any, variables: Sequence[Tensor]) -> Any:
        """Make Newton steps from `params` on the condition, as long as they help."""
        best, size = params, math.inf
        for _ in range(_NEWTON_STEPS):
            lin = self.linearised(params, variables, forward=True)
            now = float(lin.residual.norm())
            if not now < size:
                return best
            best, size = params, now
            step, _ = self.exact.solve(lin.product, lin.residual, rmatvec=lin.transposed)
            tree = self._taken_apart(params)
            moved = [p - d for p, d in zip(tree.variables, lin.layout.split(step), strict=True)]
            params = tree.rebuild([like(p, m) for p, m in zip(tree.variables, moved, strict=True)])
        return best

    def rough(self, line: Direction) -> float:
        """Measure the error of a difference that is due to the tolerance of `solve`.

        Parameters
        ----------
        line : Direction
            That of the difference.

        Returns
        -------
        error : float
            Zero where Newton steps move params by more than a solver's tolerance: that is a
            problem which `solve` does not solve, or another one.
        """
        step = first_step(self.precision) * line.length / 4
        error = 0.0
        try:
            for variables in (line.moved(self.at, step), line.moved(self.at, -step)):
                params = self.solved(variables)
                refined = self.newton(params, variables)
                flat = self.flat(params)
                far = torch.finfo(self.precision).eps ** _TOLERANCE * flat.norm()
                if not bool((self.flat(refined) - flat).norm() <= far):
                    return 0.0
                change = self.value(refined, variables) - self.value(params, variables)
                error += abs(change) / (2 * step)
        except HypergradError:
            return 0.0
        return error


def _fields(condition: Condition) -> Sequence[Any]:
    return dataclasses.fields(condition) if dataclasses.is_dataclass(condition) else ()


def _copy(leaf: Any) -> Any:
    return detached(leaf).clone() if isinstance(leaf, Tensor) else leaf


def kept(tree: Any) -> Any:
    """Copy a pytree: parameters stay parameters, and a leaf of several names stays one."""
    copies: dict[int, Any] = {}

    def keep(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies or not leaf.requires_grad:
            copies[id(leaf)] = like(leaf, _copy(leaf))
        return copies[id(leaf)]

    return pytree.tree_map(keep, tree)


def like(leaf: Tensor, values: Tensor) -> Tensor:
    """Make values a parameter, or a leaf that requires grad, where the leaf is one."""
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(values, requires_grad=leaf.requires_grad)
    return values.detach().requires_grad_() if leaf.requires_grad and leaf.is_leaf else values
