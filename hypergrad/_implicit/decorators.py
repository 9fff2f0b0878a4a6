"""The decorators that make an inner solver's solution differentiable."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from torch import Tensor

from .._autograd.captured import captured_by, carries_something, names_of_captured
from .._autograd.detached_call import call_outside
from .._autograd.random_numbers import Draw
from .._autograd.refusals import never_compiled
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached
from .._autograd.transforms import forward_mode_active, transforms_active
from .._errors import UnsupportedOperation
from .._info import SolveInfo
from .._mistakes import explained, refuse_signatures
from .._pytrees import Tree
from .._warnings import OnFailure, check_on_failure
from ..conditions._base import Condition, as_condition
from ..conditions._fixed_point import FixedPoint
from ..conditions._inner_problem import Problem, without_aux
from ..conditions._minimum import Minimum
from ..conditions._root import Root
from ..solvers import Solver
from ..solvers._auto import choose
from .choices import Choices
from .differentiable import ImplicitSolution, Rule
from .keywords import Arguments, bound
from .linearisation import Linearisation

Fit = TypeVar("Fit", bound=Callable[..., Any])
Batching = Literal["vmap", "loop"]


@explained
def custom_argmin(
    inner: Callable[..., Tensor | tuple[Tensor, Any]] | Condition,
    *,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    solver: Solver | None = None,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    batching: Batching = "vmap",
    callback: Callable[[SolveInfo], Any] | None = None,
) -> Callable[[Fit], Fit]:
    """Make a minimiser differentiable: ``fit(init, *args)`` minimises ``inner(params, *args)``.

    The decorated function is called as before. Its solution takes part in autograd and in
    `torch.func`: first and higher derivatives, forward and reverse, and `vmap`, by implicit
    differentiation of the inner problem; how `fit` finds it plays no part.

    `fit` is called with plain detached tensors, outside the caller's transforms and with grad
    mode on, so that any solver can be used in it. It returns `init`'s structure, shapes and
    dtypes (any, where `init` is None).

    Arguments may be passed by keyword. A keyword is the inner problem's where its function has a
    parameter of that name, ``fit(None, X=X, y=y, lam=lam)`` with ``inner(w, lam, X, y)``, and is
    differentiated like one that is passed by position. Any other keyword reaches `fit` alone.

    Parameters
    ----------
    inner : callable or condition
        ``inner(params, *args)``, a scalar tensor, or a condition object whose functions receive
        ``(params, *args)``. A part that is not smooth, such as `abs` or a hinge loss, is no part of
        the objective but a proximal map, in a `ProximalGradient`; or take a smooth loss, or `KKT`.
    argnums : int or sequence of int, optional
        Positions, in the decorated function, of the arguments that are differentiated. None:
        every floating-point tensor after the initial guess. Position 0, the initial guess, has
        no gradient and is refused.
    has_aux : bool
        Whether `fit` returns ``(params, aux)``; aux is passed on, without gradient.
    solver : Solver, optional
        The linear solver; None: as in `implicit_grad`.
    inner_tol : float, optional
        Above this relative inner residual the inner problem counts as unsolved; judged when a
        derivative is taken. None: not judged, but for a `Minimum` with negative curvature.
    on_failure : {"warn", "raise", "ignore"}
        What to do when a derivative may be wrong.
    batching : {"vmap", "loop"}
        Under `torch.func.vmap`: map `fit`, or call it once a task.
    callback : callable, optional
        ``callback(info)``, called for every linear solve that a derivative makes.

    Returns
    -------
    decorator : callable
        Takes `fit`, returns it made differentiable.

    Raises
    ------
    UnsupportedOperation
        Where a derivative would be lost: by a captured tensor under a transform, a keyword
        that reaches `fit` alone and requires grad, or ``argnums=0``.

    References
    ----------
    Blondel et al., Efficient and modular implicit differentiation, 2022.

    Examples
    --------
    >>> import torch, hypergrad
    >>> def ridge(w, X, y, lam):
    ...     return ((X @ w - y) ** 2).sum() / 2 + lam * (w @ w) / 2
    >>> @hypergrad.custom_argmin(ridge)
    ... def fit(init, X, y, lam):
    ...     return torch.linalg.solve(X.T @ X + lam * torch.eye(X.shape[1]), X.T @ y)
    >>> X, y = torch.tensor([[1.0], [2.0]]), torch.tensor([1.0, 1.0])
    >>> torch.func.grad(lambda lam: fit(None, X, y, lam).sum())(torch.tensor(1.0))
    tensor(-0.0833)
    """
    settings = Settings(argnums, has_aux, solver, inner_tol, on_failure, batching, callback)
    return differentiable(as_condition(inner, Minimum), settings)


@explained
def custom_root(
    F: Callable[..., Any] | Condition,
    *,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    solver: Solver | None = None,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    batching: Batching = "vmap",
    callback: Callable[[SolveInfo], Any] | None = None,
) -> Callable[[Fit], Fit]:
    """Make a root finder differentiable: ``fit(init, *args)`` solves ``F(params, *args) = 0``.

    Parameters
    ----------
    F : callable or condition
        ``F(params, *args)``, shaped like ``params``.
    argnums, has_aux, solver, inner_tol, on_failure, batching, callback
        As in `custom_argmin`.

    Returns
    -------
    decorator : callable
        Takes `fit`, returns it made differentiable.

    Examples
    --------
    >>> import torch, hypergrad
    >>> @hypergrad.custom_root(lambda x, a: x**2 - a)
    ... def sqrt(init, a):
    ...     return a.sqrt()
    >>> torch.func.grad(lambda a: sqrt(None, a))(torch.tensor(4.0))
    tensor(0.2500)
    """
    settings = Settings(argnums, has_aux, solver, inner_tol, on_failure, batching, callback)
    return differentiable(as_condition(F, Root), settings)


@explained
def custom_fixed_point(
    T: Callable[..., Any] | Condition,
    *,
    argnums: int | Sequence[int] | None = None,
    has_aux: bool = False,
    solver: Solver | None = None,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    batching: Batching = "vmap",
    callback: Callable[[SolveInfo], Any] | None = None,
) -> Callable[[Fit], Fit]:
    """Make a fixed-point solver differentiable: ``T(params, *args) = params`` at its solution.

    Parameters
    ----------
    T : callable or condition
        ``T(params, *args)``, shaped like ``params``.
    argnums, has_aux, solver, inner_tol, on_failure, batching, callback
        As in `custom_argmin`.

    Returns
    -------
    decorator : callable
        Takes `fit`, returns it made differentiable.

    References
    ----------
    Bai, Kolter and Koltun, Deep equilibrium models, 2019.

    Examples
    --------
    >>> import torch, hypergrad
    >>> @hypergrad.custom_fixed_point(lambda x, a: torch.cos(a * x))
    ... def equilibrium(x, a):
    ...     for _ in range(100):
    ...         x = torch.cos(a * x)
    ...     return x
    >>> a = torch.tensor(0.5, requires_grad=True)
    >>> equilibrium(torch.tensor(1.0), a).backward()
    >>> a.grad
    tensor(-0.3218)
    """
    settings = Settings(argnums, has_aux, solver, inner_tol, on_failure, batching, callback)
    return differentiable(as_condition(T, FixedPoint), settings)


@dataclasses.dataclass(frozen=True)
class Settings:
    """The keywords of a decorator, as `custom_argmin` describes them."""

    argnums: int | Sequence[int] | None
    has_aux: bool
    solver: Solver | None
    inner_tol: float | None
    on_failure: OnFailure
    batching: Batching
    callback: Callable[[SolveInfo], Any] | None


def differentiable(condition: Condition, settings: Settings) -> Callable[[Fit], Fit]:
    """Make the decorator of a condition, whose options are those of `custom_argmin`."""
    check_on_failure(settings.on_failure)
    if settings.batching not in ("vmap", "loop"):
        raise ValueError(f"batching must be 'vmap' or 'loop'; got {settings.batching!r}.")
    positions = _positions(settings.argnums)

    def decorate(fit: Fit, *others: Any) -> Fit:
        if others or not callable(fit):
            raise TypeError(
                "This is a decorator, which takes the inner solver, and it was called with "
                f"{'several arguments' if others else f'a {type(fit).__name__}'}. The decorators "
                "take the objective or the condition first and the solver after it: "
                "fit = custom_argmin(objective)(solver), and then fit(init, *args)."
            )

        @never_compiled
        @functools.wraps(fit)
        def solve(*args: Any, **keywords: Any) -> Any:
            functions = condition.functions()
            call = bound(fit, functions[0] if functions else fit, args, keywords)
            return _solve(condition, fit, settings, positions, call)

        return solve  # type: ignore[return-value]

    return decorate


def _positions(argnums: int | Sequence[int] | None) -> tuple[int, ...] | None:
    if argnums is None:
        return None
    positions = (argnums,) if isinstance(argnums, int) else tuple(argnums)
    if 0 in positions:
        raise UnsupportedOperation(
            "argnums=0 is the initial guess, on which an inner solution does not depend: its "
            "gradient is zero. If it is the centre of a proximal term, pass it as a further "
            "argument too.",
            argument="argnums",
        )
    if any(p < 0 for p in positions):
        raise ValueError(f"argnums must be positive; got {argnums!r}.")
    return positions


def _solve(
    condition: Condition,
    fit: Callable[..., Any],
    settings: Settings,
    positions: tuple[int, ...] | None,
    call: Arguments,
) -> Any:
    _refuse_keywords(call.keywords)
    init = call.init
    trees = [
        Tree(name, value, constants=True) for name, value in zip(call.names, call.args, strict=True)
    ]
    start = Tree("init", init)
    name = getattr(fit, "__name__", "the inner solver")
    solution = call_outside(
        fit, (init, *call.positional), call.keywords, settings.batching, named=call.named
    )
    solution, aux = without_aux(name, solution, settings.has_aux, "params")
    if init is not None:
        start.match(f"What {name} returned", solution)
    params = Tree("params", solution)
    problem = _restricted(Problem.of(condition, params, trees), positions, call.places)
    problem.layout()  # raises, here and not in a backward, where nothing can be differentiated
    solver, callback = choose(settings.solver, condition.symmetric), settings.callback
    choices = Choices(solver, settings.inner_tol, settings.on_failure, callback is not None)
    rule = Rule(problem, choices, callback, Draw())
    try:
        rule, captured = _with_captured(rule)
    except TypeError as error:
        refuse_signatures("inner", condition, ("params", *call.names), error)
        raise
    leaves = ImplicitSolution.apply(rule, captured, *problem.tensors)
    rebuilt = params.rebuild(leaves)
    return (rebuilt, aux) if settings.has_aux else rebuilt


def _refuse_keywords(keywords: dict[str, Any]) -> None:
    for path, leaf in pytree.tree_flatten_with_path(keywords)[0]:
        if isinstance(leaf, Tensor) and carries_something(leaf):
            raise UnsupportedOperation(
                f"The keyword argument {pytree.keystr(path)} carries a derivative or a batch, but "
                "the inner problem has no parameter of that name, so that it reaches the inner "
                "solver alone and has no gradient. Give the inner problem that parameter, pass it "
                "by position, or detach it.",
                leaf=pytree.keystr(path),
            )


def _restricted(problem: Problem, argnums: tuple[int, ...] | None, places: list[int]) -> Problem:
    if argnums is None:
        return problem
    if not set(argnums) <= set(places):
        raise ValueError(
            f"argnums={argnums} is out of range: there are {len(places) + 1} arguments."
        )
    return problem.restricted({i for i, place in enumerate(places) if place in argnums})


def _with_captured(rule: Rule) -> tuple[Rule, Tensor | None]:
    """Find tensors that the inner problem captures and that carry derivatives.

    Under plain autograd their derivative is taken too. Elsewhere it would be lost, and that is
    an error.

    Returns
    -------
    rule : Rule
        With the names of what is captured.
    captured : Tensor or None
        The condition's value as a function of what is captured.

    Raises
    ------
    UnsupportedOperation
        Under a function transform or in forward mode.
    """
    problem, condition = rule.problem, rule.problem.condition
    if not captured_by(problem):
        return rule, None
    if transforms_active() or forward_mode_active():
        raise UnsupportedOperation(
            f"The inner problem captures {_names(condition)}, which "
            "carries a derivative or a batch that would be lost under a function transform or in "
            "forward mode. Pass it as an argument of the decorated function (and of the inner "
            "problem), or detach it if it is a constant. Random numbers under vmap count as "
            "captured too: draw them outside."
        )
    if not condition.replays:
        raise UnsupportedOperation(
            f"The inner problem captures {_names(condition)}, which carries a derivative. Where "
            "products are differences, or passes over batches, only what is passed as an argument "
            "is differentiated: pass it as an argument of the decorated function (and of the inner "
            "problem), or detach it if it is a constant."
        )
    lin = Linearisation(problem, [detached(t) for t in problem.tensors], rule.draw)
    captured = lin.layout.flatten(lin.record.residual)
    names = _names(condition)
    return dataclasses.replace(rule, captured=names), captured


def _names(condition: Condition) -> str:
    return names_of_captured(condition.functions(), carries_something) or "a tensor"
