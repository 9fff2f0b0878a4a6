"""`implicit_grad` and `implicit_backward`: one hypergradient, returned or accumulated."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor

from .._autograd.captured import refuse_one_level_reduced
from .._autograd.in_place import group_of_replicas
from .._autograd.ranks import together
from .._autograd.refusals import never_compiled
from .._autograd.shards import group_of, refuse_transforms
from .._autograd.trace import being_traced
from .._autograd.transforms import transforms_active
from .._autograd.vmaps import outside_of_vmaps
from .._compiled.session import EVERYWHERE, Session, compiling
from .._errors import NotConnected, UnsupportedOperation
from .._info import SolveInfo
from .._mistakes import explained
from .._pytrees import Tree
from .._warnings import OnFailure, check_on_failure
from ..conditions._base import as_condition
from ..conditions._inner_problem import Problem
from ..conditions._minimum import Minimum
from ..solvers import Solver
from ..solvers._auto import choose
from ..solvers._base import mapped_by_caller
from ..solvers._recycle import claimed
from .choices import Choices
from .compiled import replayed
from .hypergradient import Call, Hypergradient
from .signatures import Hparams, Inner, Options, Outer, Params


@overload
def implicit_grad(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: Literal[False] = ...,
    return_info: Literal[False] = ...,
    **options: Unpack[Options],
) -> Hparams: ...
@overload
def implicit_grad(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: Literal[True],
    return_info: Literal[False] = ...,
    **options: Unpack[Options],
) -> tuple[Hparams, Any]: ...
@overload
def implicit_grad(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_info: Literal[True],
    **options: Unpack[Options],
) -> tuple[Hparams, SolveInfo]: ...
@overload
def implicit_grad(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_info: bool = ...,
    **options: Unpack[Options],
) -> Any: ...
@never_compiled
@explained
def implicit_grad(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    solver: Solver | None = None,
    x0: Any = None,
    has_aux: bool = False,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
    compile: bool = False,
) -> Hparams | tuple[Hparams, Any]:
    """Compute the hypergradient of an outer loss through the solution of an inner problem.

    It is d/d hparams of ``outer(params*(hparams), hparams)``, by implicit differentiation:
    the direct term minus ``(dF/dhparams)^T u``, where ``A^T u = d outer / d params``.

    Each loss is evaluated once, and once more, a Newton step of the inner problem further on,
    where the relative inner residual is above 1e-7 (2e-6 in float32): never once a product. By how
    much the answer moves there says how wrong it is. An answer that is about to be refused may
    cost one or two evaluations more. An operation whose second derivative nobody has tested is
    compared with a difference, once in a process. Random numbers are drawn as by one call of each
    loss, and all evaluations and products see the same draw. Nothing of the caller's is changed.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor; with `has_aux` a pair of it and anything.
    inner : callable or condition
        ``inner(params, hparams)``, an objective that `params` minimises, or a condition object
        such as `GaussNewton`, `Root` or `FixedPoint`.
    params : pytree of Tensor
        The inner solution, found in any way. Parameters that are frozen beside others that are
        not are constants, and of an objective plain tensors too that do not require grad beside
        leaves that do. There a tensor that requires grad, or a parameter, is one variable under
        however many names it stands; any other tensor is its values, one variable a name.
    hparams : pytree of Tensor
        The outer variables. The answer is shaped like them. One that requires grad and stands
        under two names has its whole derivative at each, as in `torch.autograd.grad`.
    solver : Solver, optional
        The linear solver. None: `Auto`, which is `Exact` up to 100 unknowns, else `CG` for a
        symmetric A and `GMRES` otherwise, with others to fall back on, and above a million
        unknowns a budget of 20 iterations.
    x0 : pytree of Tensor, optional
        Where the linear solve starts, shaped like `params`: the last call's ``info.solution``.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.
    inner_tol : float, optional
        Above this relative inner residual (`SolveInfo.inner_residual`) the inner problem counts as
        unsolved, unless the answer moves by less than 20 times `inner_tol` on a Newton step, up to
        an inner residual of as much. Below it the same holds if the answer moves by more. None:
        measured, not judged, but for a `Minimum` with negative curvature and for params that have
        run away. From such params a Newton step leads back to less than a third of their length,
        while the outer loss does not change on it as its slope says.
    on_failure : {"warn", "raise", "ignore"}
        What to do when the answer may be wrong.
    return_info : bool
        Whether to return a `SolveInfo` too.
    compile : bool
        Whether to replay the call as a compiled program where it is made again with losses of the
        same code, as inside of a function that `hypergrad.compile` has made.

    Returns
    -------
    grads : pytree of Tensor
        Shaped like `hparams`, same dtypes and devices, detached.
    info : SolveInfo
        With `return_info`; ``info.aux`` holds what `outer` returned beside its value.
    aux : pytree
        With `has_aux` and without `return_info`.

    Raises
    ------
    NotConnected
        If `outer` does not depend on `params`, or `inner` not on some leaf of it.
    StructureMismatch
        If a loss is no scalar or an argument has the wrong structure.
    NotFinite
        If a number is not finite, unless `on_failure` is "ignore".
    NotConverged, IndefiniteHessian, SingularHessian, Diverged, NotDifferentiable
        With ``on_failure="raise"``.
    UnsupportedOperation
        If the solver needs a symmetric matrix and the condition's is not, if an operation in
        `inner` has a wrong second derivative, or when the answer is differentiated: use
        `custom_argmin` for that.

    References
    ----------
    Bengio, Gradient-based optimization of hyperparameters, 2000; Pedregosa, Hyperparameter
    optimization with approximate gradient, 2016, equation 3.

    Examples
    --------
    >>> import torch, hypergrad
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> y = torch.tensor([1.0, 2.0, 3.0])
    >>> def inner(w, lam):
    ...     return ((X @ w - y) ** 2).sum() / 2 + lam * (w @ w) / 2
    >>> def outer(w, lam):
    ...     return ((w - 1) ** 2).sum()
    >>> lam = torch.tensor(0.5)
    >>> w = torch.linalg.solve(X.T @ X + lam * torch.eye(2), X.T @ y)
    >>> hypergrad.implicit_grad(outer, inner, w, lam)
    tensor(-0.1634)
    """
    answer = _hypergradient(
        outer,
        inner,
        params,
        hparams,
        solver,
        x0,
        has_aux,
        inner_tol,
        on_failure,
        return_info,
        EVERYWHERE if compile else None,
    )
    if return_info:
        return answer.grads, answer.info
    return (answer.grads, answer.info.aux) if has_aux else answer.grads


@overload
def implicit_backward(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: Literal[False] = ...,
    return_info: Literal[False] = ...,
    **options: Unpack[Options],
) -> Tensor: ...
@overload
def implicit_backward(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: Literal[True],
    return_info: Literal[False] = ...,
    **options: Unpack[Options],
) -> tuple[Tensor, Any]: ...
@overload
def implicit_backward(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_info: Literal[True],
    **options: Unpack[Options],
) -> tuple[Tensor, SolveInfo]: ...
@overload
def implicit_backward(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    has_aux: bool = ...,
    return_info: bool = ...,
    **options: Unpack[Options],
) -> Any: ...
@never_compiled
@explained
def implicit_backward(
    outer: Outer[Params, Hparams],
    inner: Inner[Params, Hparams],
    params: Params,
    hparams: Hparams,
    *,
    solver: Solver | None = None,
    x0: Any = None,
    has_aux: bool = False,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
    compile: bool = False,
) -> Tensor | tuple[Tensor, Any]:
    """Accumulate the hypergradient into the ``.grad`` of the hyperparameters.

    Acts as ``torch.autograd.backward(leaves of hparams, grads)``: the gradient passes through
    hyperparameters that are not leaves, such as ``log_wd.exp()``, and those that need no
    gradient are skipped.

    Parameters
    ----------
    outer, inner, params, hparams, solver, x0, has_aux, inner_tol, on_failure, return_info, compile
        As in `implicit_grad`.

    Returns
    -------
    loss : Tensor
        The value of the outer loss, detached.
    info : SolveInfo
        With `return_info`.
    aux : pytree
        With `has_aux` and without `return_info`.

    Raises
    ------
    NotConnected
        As `implicit_grad`, and if no leaf of `hparams` requires grad.
    UnsupportedOperation
        As `implicit_grad`, and inside a `torch.func` transform or another problem's loss.

    Examples
    --------
    >>> import torch, hypergrad
    >>> log_lam = torch.zeros((), requires_grad=True)
    >>> inner = lambda w, lam: (w - 1) ** 2 + lam * w**2  # w = 1 / (1 + lam)
    >>> hypergrad.implicit_backward(lambda w, lam: w, inner, torch.tensor(0.5), log_lam.exp())
    tensor(0.5000)
    >>> log_lam.grad
    tensor(-0.2500)
    """
    if transforms_active() or being_traced():
        raise UnsupportedOperation(
            "implicit_backward accumulates into .grad, which has no place inside a torch.func "
            "transform or the losses of another problem. Call implicit_grad there, or "
            "custom_argmin where the answer is to be differentiated."
        )
    variables = Tree("hparams", hparams, of_autograd=True).variables
    leaves = [h for h in variables if h.requires_grad]
    if not leaves:
        raise NotConnected(
            "No tensor in hparams requires grad, so there is nowhere to accumulate a gradient. "
            "Set requires_grad_() on the hyperparameters, or call implicit_grad.",
            argument="hparams",
        )
    answer = _hypergradient(
        outer, inner, params, hparams, solver, x0, has_aux, inner_tol, on_failure, return_info,
        EVERYWHERE if compile else None,
    )  # fmt: skip
    pairs = [(h, g) for h, g in zip(variables, answer.leaves, strict=True) if h.requires_grad]
    torch.autograd.backward([h for h, _ in pairs], [g for _, g in pairs])
    if return_info:
        return answer.info.outer_value, answer.info
    if has_aux:
        return answer.info.outer_value, answer.info.aux
    return answer.info.outer_value


def _hypergradient(
    outer: Callable[[Any, Any], Any],
    inner: Any,
    params: Any,
    hparams: Any,
    solver: Solver | None,
    x0: Any,
    has_aux: bool,
    inner_tol: float | None,
    on_failure: OnFailure,
    return_info: bool,
    session: Session | None = None,
) -> Hypergradient:
    """Compute what `implicit_grad` returns; the arguments are its own."""
    check_on_failure(on_failure)
    session = compiling() or session
    condition = as_condition(inner, Minimum)
    P = Tree("params", params, skip_frozen=True, of_autograd=condition.of_objective)
    H = Tree("hparams", hparams, of_autograd=True)
    with claimed() as memory:
        if memory is None and session is not None and getattr(solver, "recycle", False):
            memory = session.memory(outer, *condition.functions())
        chosen = choose(solver, condition.symmetric, memory)
        call = Call(
            outer=outer,
            problem=Problem.of(condition, P, [H]),
            choices=Choices(chosen, inner_tol, on_failure, return_info, memory),
            x0=None if x0 is None else P.match("x0", x0),
            has_aux=has_aux,
        )
        refuse_one_level_reduced(condition.functions(), outer)
        group = group_of(P.variables)
        if group is None and getattr(condition, "products", "exact") == "difference":
            group = group_of_replicas(P.variables)
        if group is not None:
            if session is not None:
                session.refuse("implicit_grad", "its params lie on several processes")
            refuse_transforms()
            with together(group):
                return call.answer(None)
        if mapped_by_caller(chosen):
            if session is not None:
                session.refuse("implicit_grad", "its solver's preconditioner is a function")
            return call.answer(None)
        answer = None if session is None else replayed(call, session)
        return outside_of_vmaps(call.answer) if answer is None else answer
