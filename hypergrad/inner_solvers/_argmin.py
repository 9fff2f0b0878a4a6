"""A differentiable solver from an objective alone: the inner solvers, and their conditions."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import inner_solvers
from .._autograd.torch_pytrees import pytree
from .._errors import StructureMismatch
from .._implicit.decorators import Batching, Settings, differentiable
from .._implicit.keywords import bound
from .._info import SolveInfo
from .._mistakes import explained, refuse_unknown
from .._warnings import OnFailure
from ..conditions._base import Condition, as_condition
from ..conditions._gradient_step import ProjectedGradient, ProximalGradient
from ..conditions._minimum import Minimum
from ..inner_solvers import FISTA, LBFGS, Anderson, Bisection, InnerSolver, LevenbergMarquardt
from ..prox import from_projection
from ..solvers import Solver

Function = Callable[..., Any]


@explained
def argmin(
    objective: Function,
    *,
    solver: InnerSolver | None = None,
    project: Function | None = None,
    prox: Function | None = None,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    linear_solver: Solver | None = None,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    batching: Batching = "vmap",
    callback: Callable[[SolveInfo], Any] | None = None,
) -> Function:
    """Make a differentiable minimiser of an objective: ``fit(init, *args)`` returns its argmin.

    It is `custom_argmin`, which is for any solver, around one of `hypergrad.inner_solvers`, with
    the condition that belongs to it. All that holds there holds here: first and higher derivatives
    in every argument but `init`, forward and reverse, plain or by `torch.func`, and `vmap` over
    tasks.

    Parameters
    ----------
    objective : callable
        ``objective(params, *args)``, a scalar tensor. A part that is not smooth, such as `abs` or a
        hinge loss, is no part of it but a `prox`; or take a smooth loss, or `KKT`. For
        `LevenbergMarquardt` the residuals, of which half the sum of squares is minimised.
    solver : InnerSolver, optional
        One of `hypergrad.inner_solvers`, or None: ``LBFGS()``, or with `project` or `prox`
        ``FISTA()``, which alone can take them.
    project : callable, optional
        The projection onto a convex set, ``project(v, *args)`` or ``project(v)``, in which the
        objective is minimised.
    prox : callable, optional
        The proximal map, ``prox(v, step_size, *args)``, ``prox(v, step_size)`` or ``prox(v)``, of
        what is added to the objective. The one that a ``FISTA(prox)`` has need not be repeated.
    argnums : int or sequence of int, optional
        Positions, in `fit`, of the arguments that are differentiated. None: every floating-point
        tensor after the initial guess.
    has_aux : bool
        Whether `fit` returns ``(params, info)``, with the `InnerInfo` of the inner solver.
    linear_solver : Solver, optional
        What solves the linear systems of the derivatives; None: as in `implicit_grad`.
    inner_tol, on_failure, batching, callback
        As in `custom_argmin`.

    Returns
    -------
    fit : callable
        ``fit(init, *args)``, with `init` a pytree of tensors where the iteration starts. Arguments
        may be passed by the names that they have in `objective`.

    Raises
    ------
    TypeError
        If an argument is of the wrong kind, such as a linear solver passed as `solver`.
    ValueError
        If both `project` and `prox` are passed, or two proximal maps.
    StructureMismatch
        If an optional argument of `project` or `prox` would take a hyperparameter of another name
        that the objective uses too: a lambda then says which is meant.

    Notes
    -----
    Without `project` and `prox` the condition is `Minimum`, else `ProjectedGradient` or
    `ProximalGradient`. The length of its step is the solver's where that is a number, and is
    otherwise measured at the solution, for each task: one over the largest curvature of the
    objective, as eight products with its Hessian see it. The solution and its derivatives are the
    same for every length; it decides on how well the linear system is conditioned.

    Nothing is raised where the inner solver fails. A derivative is then warned of, or is an
    error, as `on_failure` says; ``has_aux=True`` shows how each task has ended.

    References
    ----------
    Blondel et al., Efficient and modular implicit differentiation, 2022.

    Examples
    --------
    >>> import torch, hypergrad
    >>> def ridge(w, lam):
    ...     return ((w - 1) ** 2).sum() / 2 + lam * (w @ w) / 2
    >>> fit = hypergrad.argmin(ridge)  # w = 1 / (1 + lam)
    >>> torch.func.grad(lambda lam: fit(torch.zeros(2), lam).sum())(torch.tensor(1.0))
    tensor(-0.5000)

    The closest point of a box moves with its point where it is inside.

    >>> def distance(x, y):
    ...     return ((x - y) ** 2).sum() / 2
    >>> clip = hypergrad.argmin(distance, project=lambda v: hypergrad.projections.box(v, 0.0, 1.0))
    >>> torch.func.jacrev(clip, argnums=1)(torch.zeros(2), torch.tensor([3.0, 0.25])).round() + 0.0
    tensor([[0., 0.],
            [0., 1.]])
    """
    _refuse_no_functions(objective, project, prox)
    _refuse_no_linear_solver(linear_solver)
    condition, minimise = _posed(objective, solver, project, prox)
    settings = Settings(argnums, has_aux, linear_solver, inner_tol, on_failure, batching, callback)
    return differentiable(condition, settings)(_fit(objective, minimise, has_aux=has_aux))


def _posed(
    objective: Function, solver: Any, project: Function | None, prox: Function | None
) -> tuple[Condition, Function]:
    """Pose the problem: its condition, and ``minimise(init, *args)``."""
    _refuse_no_solver(solver)
    if isinstance(solver, FISTA) and solver.prox is not None:
        if project is not None or prox not in (None, solver.prox):
            raise ValueError(
                "The solver has a proximal map already, FISTA(prox), and argmin was passed another "
                "one. Pass it once: argmin(objective, solver=FISTA(), project=...) or prox=..."
            )
        prox = solver.prox
    if project is None and prox is None:
        return _smooth(objective, LBFGS() if solver is None else solver)
    method = FISTA() if solver is None else solver
    if not isinstance(method, FISTA):
        raise TypeError(
            f"{type(method).__name__} has no use for a projection or a proximal map. Of the inner "
            f"solvers {_with_prox()} has: solver=hypergrad.inner_solvers.FISTA(), or leave solver "
            "out."
        )
    step = method.step_size if isinstance(method.step_size, int | float) else None
    if project is None:
        assert prox is not None
        condition: Condition = ProximalGradient(objective, prox, step)
    else:
        condition, prox = ProjectedGradient(objective, project, step), from_projection(project)
    return condition, functools.partial(dataclasses.replace(method, prox=prox), objective)


def _smooth(objective: Function, solver: InnerSolver) -> tuple[Condition, Function]:
    """Pose the problem of an objective alone."""
    if isinstance(solver, FISTA):
        raise TypeError(
            "FISTA is for an objective with a projection or a proximal map: pass project=... or "
            "prox=... to argmin, or leave solver out."
        )
    if isinstance(solver, LevenbergMarquardt):
        residuals = _several(objective)
        return Minimum(_half_squares(residuals)), functools.partial(solver, residuals)
    # The losses of `supervised` are functions, and know their own condition.
    condition = as_condition(objective, Minimum)
    return condition, functools.partial(solver, objective)


def _several(residuals: Function) -> Function:
    """Refuse one number in place of residuals: an objective, whose square is not to be least."""

    @functools.wraps(residuals)
    def checked(params: Any, *args: Any) -> Any:
        returned = residuals(params, *args)
        if isinstance(returned, Tensor) and returned.ndim == 0:
            raise StructureMismatch(
                "LevenbergMarquardt takes residuals, of which it minimises half the sum of "
                "squares, and the function returned one number. If that is the objective, take "
                "LBFGS() or NewtonCG(); a single residual is returned with the shape (1,)."
            )
        return returned

    return checked


def _half_squares(residuals: Function) -> Function:
    @functools.wraps(residuals)
    def objective(params: Any, *args: Any) -> Tensor:
        leaves = pytree.tree_leaves(residuals(params, *args))
        return torch.stack([leaf.square().sum() for leaf in leaves]).sum() / 2

    return objective


def _refuse_count(fit: Function, arguments: tuple[Any, ...], error: TypeError) -> None:
    """Raise where a call has too few arguments for the objective, or too many."""
    signature = inspect.signature(fit)
    try:
        signature.bind(*arguments)
    except TypeError as miscounted:
        raise TypeError(f"fit takes {signature}, as the objective does: {miscounted}.") from error


def _fit(objective: Function, minimise: Function, *, has_aux: bool) -> Function:
    """Make the function that is decorated, with the names that the objective's arguments have."""

    def fit(init: Any, *args: Any, **keywords: Any) -> Any:
        """Minimise the objective from an initial guess; differentiable in all other arguments."""
        if init is None:
            raise StructureMismatch(
                "fit needs an initial guess, a pytree of tensors shaped like the solution; got "
                "None."
            )
        if keywords:
            call = bound(fit, objective, (init, *args), keywords)
            if call.keywords:
                refuse_unknown("fit()", list(inspect.signature(fit).parameters), call.keywords)
            args = call.args
        try:
            params, info = minimise(init, *args)
        except TypeError as error:
            _refuse_count(fit, (init, *args), error)
            raise
        return (params, info) if has_aux else params

    try:
        first, *others = inspect.signature(objective).parameters.values()
        if first.kind is not inspect.Parameter.VAR_POSITIONAL:
            initial = inspect.Parameter("init", inspect.Parameter.POSITIONAL_OR_KEYWORD)
            fit.__signature__ = inspect.Signature([initial, *others])  # type: ignore[attr-defined]
    except (TypeError, ValueError):  # no signature, or none with such a first argument
        pass
    return fit


def _with_prox() -> str:
    """Name the inner solvers that have a proximal map."""
    classes = [getattr(inner_solvers, name) for name in inner_solvers.__all__]
    return ", ".join(c.__name__ for c in classes if "prox" in getattr(c, "__match_args__", ()))


def _refuse_no_functions(objective: Any, project: Any, prox: Any) -> None:
    if project is not None and prox is not None:
        raise ValueError(
            "argmin takes project or prox, not both: the proximal map of a sum is in general not "
            "made of theirs. A projection as a proximal map is hypergrad.prox.from_projection."
        )
    if isinstance(objective, Condition) and not callable(objective):
        raise TypeError(
            f"argmin takes the objective itself and makes its condition; got a "
            f"{type(objective).__name__}. A condition object is for custom_argmin."
        )
    for name, value in (("objective", objective), ("project", project), ("prox", prox)):
        optional = value is None and name != "objective"
        if not optional and (not callable(value) or isinstance(value, InnerSolver)):
            raise TypeError(f"{name} must be a function; got {_kind(value)}.")


def _refuse_no_linear_solver(solver: Any) -> None:
    if solver is None or isinstance(solver, Solver):
        return
    if isinstance(solver, type) and issubclass(solver, Solver):
        cure = f"Pass a value: linear_solver={solver.__name__}()."
    elif _is_of(solver, InnerSolver):
        cure = "An inner solver is passed as solver."
    else:
        cure = "Pass one such as linear_solver=hypergrad.CG(), or leave it out."
    raise TypeError(f"linear_solver must be a linear solver, or None; got {_kind(solver)}. {cure}")


def _refuse_no_solver(solver: Any) -> None:
    if solver is None:
        return
    if isinstance(solver, Anderson | Bisection):
        other = "custom_fixed_point(T)" if isinstance(solver, Anderson) else "custom_root(F)"
        raise TypeError(
            f"{type(solver).__name__} minimises no objective. Call it in a function that "
            f"{other} decorates."
        )
    if isinstance(solver, InnerSolver):
        return
    if isinstance(solver, type) and issubclass(solver, InnerSolver):
        cure = f"Pass a value: solver={solver.__name__}()."
    elif _is_of(solver, Solver):
        cure = "A linear solver, which the derivatives need, is passed as linear_solver."
    elif _is_of(solver, torch.optim.Optimizer):
        cure = "Write the loop of an optimiser as a function that custom_argmin decorates."
    elif isinstance(solver, str):
        cure = f"Pass a value: solver=hypergrad.inner_solvers.{_closest(solver)}()."
    elif callable(solver):
        cure = "A solver that you wrote is made differentiable by custom_argmin(objective)(solver)."
    else:
        cure = "Pass one such as solver=hypergrad.inner_solvers.LBFGS(), or leave it out."
    raise TypeError(
        f"solver must be one of hypergrad.inner_solvers, or None; got {_kind(solver)}. {cure}"
    )


def _is_of(value: Any, kind: type) -> bool:
    """Say if a value is of a class, or is a class that derives from it."""
    return issubclass(value if isinstance(value, type) else type(value), kind)


def _closest(word: str) -> str:
    """Name the inner solver that a word is closest to."""
    names = {
        name.lower(): name
        for name in inner_solvers.__all__
        if name not in {"InnerSolver", "InnerInfo", "Anderson", "Bisection"}
    }
    plain = "".join(letter for letter in word.lower() if letter.isalnum())
    return names[(difflib.get_close_matches(plain, names, n=1) or ["lbfgs"])[0]]


def _kind(value: Any) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    if isinstance(value, str):
        return repr(value)
    return f"an object of type {type(value).__name__}"
