"""A bi-level problem taken apart: each part can be evaluated by itself, anywhere."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .._autograd.guard import Guard
from .._autograd.random_numbers import Draw
from .._autograd.trace import detached
from .._errors import StructureMismatch
from .._implicit.entrance import implicit_grad
from .._implicit.linearisation import Linearisation
from .._implicit.outer_slopes import outer_gradient
from .._info import SolveInfo
from .._pytrees import Tree
from ..conditions._base import Condition
from ..conditions._inner_problem import Problem, scalar
from ..solvers import GMRES, Exact, Solver
from .differences import Direction

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
                f"returned {type(self.solution).__name__}. Is a return missing?"
            )
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
        try:
            with self._solving.evaluation():
                return kept(self.solve(self.given(variables)))
        except Exception as error:
            if variables is not self.at:
                error.add_note(
                    "check_hypergrad: solve raised this at hparams a small step from those given, "
                    "where a difference is to be taken."
                )
            raise

    def value(self, params: Any, variables: Sequence[Tensor]) -> float:
        """The outer loss."""
        with self._outer.evaluation(), Guard():
            loss = self.outer(kept(params), self.given(variables))
        return float(scalar("outer", loss).detach())

    def objective(self, params: Any) -> float:
        """The inner loss, of a condition that has one."""
        (fun,) = self.condition.functions()
        with self._inner.evaluation(), Guard():
            loss = fun(kept(params), self.given(self.at))
        return float(scalar("inner", loss).detach())

    def at_params(self, flat: Tensor) -> Any:
        """The params that lie in a vector as `flat` puts them there."""
        parts = self.problem(self.condition, self.solution, self.at).layout().split(flat)
        pairs = zip(self.params.variables, parts, strict=True)
        return self.params.rebuild([like(p, part) for p, part in pairs])

    def _taken_apart(self, params: Any) -> Tree:
        of_objective = self.condition.of_objective
        return Tree("params", params, skip_frozen=True, of_autograd=of_objective)

    def along(self, line: Direction, *, refined: bool = False) -> Callable[[float], float]:
        """The outer loss at the solution, as a function of a step in the hyperparameters."""

        def value(step: float) -> float:
            variables = line.moved(self.at, step)
            params = self.solved(variables)
            return self.value(self.newton(params, variables) if refined else params, variables)

        return value

    def flat(self, params: Any) -> Tensor:
        """The variables of `params` as one vector."""
        tree = self._taken_apart(params)
        layout = self.problem(self.condition, params, self.at).layout()
        return layout.flatten([detached(v) for v in tree.variables])

    def adjoint(self, info: SolveInfo) -> Tensor:
        """The solution of the linear system as one vector, laid out as `flat` does."""
        leaves = pytree.tree_leaves(info.solution)
        layout = self.problem(self.condition, self.solution, self.at).layout()
        return layout.flatten([leaves[i] for i in self.params.where])

    def problem(self, condition: Condition, params: Any, variables: Sequence[Tensor]) -> Problem:
        """The inner problem at some point."""
        P = self._taken_apart(params)
        return Problem.of(condition, P, [Tree("hparams", self.given(variables))])

    def linearised(
        self,
        params: Any,
        variables: Sequence[Tensor],
        *,
        forward: bool = False,
        cross_forward: bool = False,
    ) -> Linearisation:
        """The condition at some point, and its derivatives."""
        problem = self.problem(self.plain, params, variables)
        tensors = [detached(t) for t in problem.tensors]
        return Linearisation(
            problem, tensors, self._inner, forward=forward, cross_forward=cross_forward
        )

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

    def slopes(self) -> tuple[Tensor, list[Tensor | None]]:
        """The partial derivatives of the outer loss: by params, one vector, and by hparams."""
        problem = self.problem(self.plain, self.solution, self.at)
        tensors = [detached(t) for t in problem.tensors]
        with self._outer.evaluation():
            _, _, cotangent, direct, _ = outer_gradient(self.outer, problem, tensors, False)
        return problem.layout().flatten(cotangent), direct

    def terms(self, lines: Sequence[Direction], u: Tensor) -> list[float]:
        """The absolute sizes of the terms that add up to a hypergradient, along directions."""
        _, direct = self.slopes()
        lin = self.linearised(self.solution, self.at, cross_forward=True)
        found = []
        for line in lines:
            indirect = float((u * lin.cross_forward(line.parts)).abs().sum())
            found.append(indirect + line.dot(direct, torch.abs))
        return found

    def unrolled(self) -> tuple[list[Tensor] | None, str]:
        """The derivative through `solve`, or why there is none."""
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
            tree = self._taken_apart(params)
            moved = [p - d for p, d in zip(tree.variables, lin.layout.split(step), strict=True)]
            params = tree.rebuild([like(p, m) for p, m in zip(tree.variables, moved, strict=True)])
        return best


def _fields(condition: Condition) -> Sequence[Any]:
    return dataclasses.fields(condition) if dataclasses.is_dataclass(condition) else ()


def _copy(leaf: Any) -> Any:
    return detached(leaf).clone() if isinstance(leaf, Tensor) else leaf


def kept(tree: Any) -> Any:
    """Copies that are still parameters, frozen or not, and one where a leaf has several names."""
    copies: dict[int, Any] = {}

    def keep(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if id(leaf) not in copies or not leaf.requires_grad:
            copies[id(leaf)] = like(leaf, _copy(leaf))
        return copies[id(leaf)]

    return pytree.tree_map(keep, tree)


def like(leaf: Tensor, values: Tensor) -> Tensor:
    """Values as a parameter, or as a leaf that requires grad, where the leaf is one."""
    if isinstance(leaf, nn.Parameter):
        return nn.Parameter(values, requires_grad=leaf.requires_grad)
    return values.detach().requires_grad_() if leaf.requires_grad and leaf.is_leaf else values
