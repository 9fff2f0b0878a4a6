"""One hypergradient for a method that takes it from an estimator: by a word or by a callable."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._implicit.entrance import implicit_grad
from .._info import SolveInfo
from ..conditions._minimum import Minimum
from ..solvers import CG, GMRES, Solver
from ..solvers._recycle import recycling
from ._batches import Batch
from ._levels import Levels
from ._method import Method

_BUDGET = 10  # products of a step, which the next one goes on from
Estimator = str | Callable[[Any, Any, Any, Any], Any]


def check(name: str, estimator: Estimator) -> None:
    """Refuse a word that names no estimator."""
    if callable(estimator) or estimator == "implicit":
        return
    words = _words()
    if estimator not in words:
        _refuse_method(estimator)
        raise ValueError(
            f"There is no estimator {estimator!r} with the call (outer, inner, params, hparams): "
            f"there are {', '.join(sorted(words))}. Any callable with that call will do, such as "
            "lambda outer, inner, params, hparams: ..."
        )


def _refuse_method(word: str) -> None:
    """Raise where a word is the name of a method."""
    import hypergrad.bilevel as methods

    named = {name.lower(): name for name in methods.__all__}
    name = named.get(str(word).lower().replace("-", "").replace("_", ""))
    of = getattr(methods, name or "Method")
    if issubclass(of, Method) and not inspect.isabstract(of):
        raise TypeError(
            f"{word!r} is a method and no estimator: pass method=hypergrad.{name}(), a value."
        )


def estimate(
    levels: Levels,
    estimator: Estimator,
    solver: Solver | None,
    inner_tol: float | None,
    inner: Batch,
    outer: Batch,
) -> tuple[list[Tensor], Tensor, SolveInfo | None]:
    """Estimate the hypergradient on a batch of each level.

    Parameters
    ----------
    levels : Levels
        The problem; the linear system starts from the last step's solution in its state.
    estimator : str or callable
        How it is taken.
    solver : Solver, optional
        The linear solver of "implicit"; None: ten products, from the last step's solution.
    inner_tol : float, optional
        Of "implicit".
    inner, outer : Batch
        On which.

    Returns
    -------
    grads : list of Tensor
        A tensor for each hyperparameter.
    value : Tensor
        The outer loss; NaN where it is not known.
    info : SolveInfo or None
        The evidence, of "implicit".
    """
    condition = levels.inner_on(inner)
    if solver is None:
        solver = (
            CG(maxiter=_BUDGET, recycle=True) if condition.symmetric else GMRES(maxiter=_BUDGET)
        )
    # A plain loss is handed on as it came in.
    loss: Any = condition
    if type(condition) is Minimum and (condition.replays or estimator != "implicit"):
        loss = condition.f
    losses = levels.outer_on(outer), loss
    params, hparams = levels.now("params"), levels.now("hparams")
    if estimator != "implicit":
        call = estimator if callable(estimator) else _words()[estimator]
        grads = levels.hparams.match("What the estimator returned", call(*losses, params, hparams))
        unknown = torch.full((), math.nan, device=levels.layout.device)
        return [g.detach() for g in grads], unknown, None

    solve = functools.partial(
        implicit_grad,
        *losses,
        params,
        hparams,
        solver=solver,
        inner_tol=inner_tol,
        on_failure=levels.on_failure,
        return_info=True,
    )
    started, last = levels.state["started"], levels.layout.split(levels.state["u"])
    recycles = getattr(solver, "recycle", False)
    started = started and not (recycles and levels.memory.solution is not None)
    with recycling(levels.memory if recycles else None):
        grads, info = solve(x0=levels.params.fill(last) if started else None)
    if started and not recycles and float(info.residual_norm) > 1:
        # Farther away than zero: the last step's solution is of no use to this one.
        grads, info = solve()
    leaves = levels.hparams.match("grads", grads)
    solution = levels.layout.flatten(levels.params.match("solution", info.solution))
    if bool(torch.isfinite(solution).all()):
        levels.state["u"], levels.state["started"] = solution.clone(), True
    return leaves, info.outer_value, info


def _words() -> dict[str, Callable[[Any, Any, Any, Any], Any]]:
    """List the public estimators with the call of `implicit_grad`, by the word before ``_grad``."""
    import hypergrad

    words: dict[str, Callable[[Any, Any, Any, Any], Any]] = {}
    for name in hypergrad.__all__:
        call = getattr(hypergrad, name)
        if not (name.endswith("_grad") and inspect.isfunction(call)):
            continue
        parameters = list(inspect.signature(call).parameters.values())
        names = [p.name for p in parameters[:4]]
        optional = all(p.default is not p.empty for p in parameters[4:])
        if names == ["outer", "inner", "params", "hparams"] and optional:
            words[name.removesuffix("_grad")] = call
    return words
