"""The systems that are compared, each made of four choices that can be changed one by one.

What is learned (the program), how a task is adapted to (the inner solver), how the linear system
of the implicit gradient is solved, and how one differentiates.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias, get_args

import hypergrad
from hypergrad.solvers import Solver
from reproduction.method.hessian_free import HessianFree
from reproduction.method.inner import (
    Curvature,
    FirstOrderSteps,
    GaussNewtonSteps,
    GradientDescent,
    HeadFirst,
    InnerSolver,
    Nesterov,
)
from reproduction.method.torchopt_steps import TorchOptSteps

Method: TypeAlias = Literal[
    "imaml-head", "imaml", "imaml-gd", "imaml-neumann", "imaml-hf",
    "maml", "maml-nesterov", "truncated", "fomaml", "reptile",
]  # fmt: skip
Differentiation: TypeAlias = Literal[
    "implicit", "unrolled", "truncated", "first-order", "reptile"
]  # fmt: skip
SolverName: TypeAlias = Literal[
    "gradient-descent", "nesterov", "gauss-newton", "hessian-free", "newton",
    "torchopt-sgd", "torchopt-adam", "torchopt-rmsprop", "torchopt-adagrad",
]  # fmt: skip
LinearSolverName: TypeAlias = Literal["cg", "minres", "neumann", "identity"]

METHODS: tuple[Method, ...] = get_args(Method)
LEAST_HEAD_LAM, LEAST_LAM = 1e-4, 1e-3
"""Of the proximal term where it is meta-learnt: of `imaml-head`, and of a whole network's leaf."""


@dataclass(frozen=True)
class System:
    """How one differentiates; the inner solver is a part of a problem's `Recipe`.

    Parameters
    ----------
    name
        For tables and curves.
    differentiation
        'implicit', at the adapted parameters; 'unrolled', through all inner steps; 'truncated',
        through the last of them; 'first-order', the query gradient as it is; 'reptile', the way
        from the adapted parameters back.
    linear_solver
        Of the implicit gradient.
    curvature
        The matrix of that system, and of Hessian-free steps.
    proximal
        Whether inner steps that follow a gradient see the proximal term.
    adapted
        What a task adapts: the whole network, or its last layer alone.
    """

    name: str
    differentiation: Differentiation
    linear_solver: LinearSolverName = "cg"
    curvature: Curvature = "hessian"
    proximal: bool = True
    adapted: Literal["network", "head"] = "network"


SYSTEMS: dict[Method, System] = {
    "imaml-head": System("iMAML, head", "implicit", adapted="head"),
    "imaml": System("iMAML, Gauss-Newton", "implicit", curvature="gauss-newton"),
    "imaml-gd": System("iMAML, GD and CG", "implicit"),
    "imaml-neumann": System("iMAML, Neumann", "implicit", linear_solver="neumann"),
    # Martens's products are those with the Gauss-Newton matrix too.
    "imaml-hf": System("iMAML, Hessian-free", "implicit", curvature="gauss-newton"),
    "maml": System("MAML, GD", "unrolled", proximal=False),
    "maml-nesterov": System("MAML, Nesterov", "unrolled", proximal=False),
    "truncated": System("truncated", "truncated"),
    "fomaml": System("first-order", "first-order"),
    "reptile": System("Reptile", "reptile", proximal=False),
}


@dataclass(frozen=True)
class Recipe:
    """What is tuned for each method by itself; a flag that is given replaces it for all.

    Parameters
    ----------
    inner_solver, inner_steps, inner_lr
        How a task is adapted to; the rate is that of steps along a gradient.
    lam
        Strength of the proximal term.
    lr
        Adam's rate at the start.
    tasks_per_step
        Tasks in a meta-step.
    compile
        Whether an implicit gradient is compiled; no other one is.
    cg_steps
        Of the linear solve of an implicit gradient, at most; or terms of the Neumann series.
    head_steps
        Newton steps on the last layer alone, before the others.
    learn_lam
        Whether each leaf of the network has a lam of its own, which is meta-learnt.
    """

    inner_solver: SolverName
    inner_steps: int
    inner_lr: float
    lam: float
    lr: float
    tasks_per_step: int
    compile: bool = False
    cg_steps: int = 5
    head_steps: int = 0
    learn_lam: bool = False


def build_inner_solver(
    recipe: Recipe, system: System, *, momentum: float = 0.9, head: tuple[str, ...] = ()
) -> InnerSolver:
    """Make the inner solver.

    Parameters
    ----------
    recipe
        Which, and how many steps.
    system
        Whether with the proximal term, and with which curvature.
    momentum
        Of Nesterov's steps.
    head
        Names of the last layer's parameters, for `head_steps`.

    Returns
    -------
    InnerSolver
        The solver.
    """
    if recipe.head_steps:
        others = build_inner_solver(replace(recipe, head_steps=0), system, momentum=momentum)
        return HeadFirst(recipe.head_steps, head, others)
    steps, lr, proximal = recipe.inner_steps, recipe.inner_lr, system.proximal
    optimiser = recipe.inner_solver.removeprefix("torchopt-")
    if optimiser != recipe.inner_solver:
        return TorchOptSteps(optimiser, steps, lr, proximal)
    build: dict[str, Callable[[], InnerSolver]] = {
        "gradient-descent": lambda: GradientDescent(steps, lr, proximal),
        "nesterov": lambda: Nesterov(steps, lr, proximal, momentum),
        "gauss-newton": lambda: GaussNewtonSteps(steps),
        "hessian-free": lambda: HessianFree(steps, curvature=system.curvature),
    }
    return build[recipe.inner_solver]()


def build_linear_solver(
    name: LinearSolverName, steps: int, damping: float, lam: float,
    *, looks: bool = True, rtol: float | None = None,
) -> Solver:  # fmt: skip
    """Make the linear solver of an implicit gradient.

    Parameters
    ----------
    name
        Which.
    steps
        Its budget: steps of a Krylov method, or terms of the Neumann series.
    damping
        Added to the matrix.
    lam
        Strength of the proximal term; 'identity' takes lam I for the matrix, which is
        first-order MAML.
    looks
        Whether the host may read a residual, to stop early; a GPU would be waited for each time.
    rtol
        Where it stops then. None: at the library's tolerance, and `steps` are a budget.

    Returns
    -------
    Solver
        The solver.
    """
    rtol = rtol if looks else 0.0
    build: dict[LinearSolverName, Callable[[], Solver]] = {
        "cg": lambda: hypergrad.CG(maxiter=steps, rtol=rtol, damping=damping),
        "minres": lambda: hypergrad.MINRES(maxiter=steps, rtol=rtol, damping=damping),
        "neumann": lambda: hypergrad.Neumann(terms=steps, rtol=rtol, damping=damping),
        "identity": lambda: hypergrad.Identity(scale=lam),
    }
    return build[name]()


def refuse(method: Method, recipe: Recipe, system: System) -> str | None:
    """Say why four choices do not go together, or that torchopt is missing.

    Parameters
    ----------
    method
        The method's name, for the message.
    recipe, system
        The choices.

    Returns
    -------
    str or None
        What is wrong; None: nothing.
    """
    where = f"--method {method} with --inner-solver {recipe.inner_solver}"
    if system.adapted == "head":
        return _refuse_for_head(method, recipe, system)
    if recipe.learn_lam and (
        system.differentiation != "implicit" or system.linear_solver == "identity"
    ):
        return f"--method {method} with --learn-lam: a lam is learnt by the implicit gradient alone"
    if recipe.learn_lam and recipe.lam <= LEAST_LAM:
        return f"--method {method} with --learn-lam: --lam above {LEAST_LAM:g}, not {recipe.lam:g}"
    if recipe.head_steps and not system.proximal:
        return f"--method {method} with --head-steps: it needs the proximal term, so --proximal"
    if recipe.inner_solver == "newton":
        return f"{where}: Newton's steps are for the last layer alone, so --method imaml-head"
    try:
        solver = build_inner_solver(recipe, system)
    except ImportError:
        return f"{where}: torchopt is not installed; pip install torchopt, or gradient-descent"
    steps = solver if isinstance(solver, FirstOrderSteps) else None
    if system.differentiation in {"unrolled", "truncated"} and not (steps and steps.unrollable):
        return (
            f"{where}: one differentiates through gradient-descent, nesterov, torchopt-sgd and "
            "torchopt-adam only"
        )
    if system.differentiation == "truncated" and not system.proximal:
        return (
            f"--method {method} with --no-proximal: the last steps depend on the meta-parameters "
            "through the proximal term alone; take --differentiation unrolled"
        )
    if not system.proximal and steps is None:
        return f"{where}: it needs the proximal term, so --proximal"
    return None


def _refuse_for_head(method: Method, recipe: Recipe, system: System) -> str | None:
    """Say why the last layer is not adapted to in this way."""
    if recipe.inner_solver != "newton":
        return f"--method {method}: its inner solver is newton, not {recipe.inner_solver}"
    if recipe.head_steps or recipe.learn_lam:
        return f"--method {method}: without --head-steps and --learn-lam, which are for networks"
    if system.differentiation != "implicit":
        return f"--method {method}: --differentiation implicit alone, not {system.differentiation}"
    if not system.proximal:
        return f"--method {method}: it needs the proximal term, so --proximal"
    if recipe.lam <= LEAST_HEAD_LAM:
        return f"--method {method}: --lam above {LEAST_HEAD_LAM:g}, not {recipe.lam:g}"
    return None
