"""One hypergradient: the direct term minus the cross derivative times the linear solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._advice import advice
from ._captures import refuse_distributed, refuse_past_arguments
from ._conditions import Minimum, as_condition
from ._errors import NotConnected, UnsupportedOperation
from ._evidence import finite, needs_product, of_sum, solve_linear
from ._info import SolveInfo
from ._linearise import Linearisation
from ._problem import Problem, scalar, without_aux
from ._randomness import Draw
from ._report import OnFailure, check_on_failure, judge, warn_of_unused
from ._trace import being_traced, detached, further_out, trace
from ._transforms import is_wrapped, never_compiled, refuse_derivatives, transforms_active
from ._tree import Tree
from .solvers import Solver, choose
from .solvers._base import norm


@never_compiled
def implicit_grad(
    outer: Callable[[Any, Any], Any],
    inner: Any,
    params: Any,
    hparams: Any,
    *,
    solver: Solver | None = None,
    x0: Any = None,
    has_aux: bool = False,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Any:
    """Hypergradient of an outer loss through the solution of an inner problem.

    Computes d/d hparams of ``outer(params*(hparams), hparams)`` by implicit differentiation:
    the direct term minus ``(dF/dhparams)^T u``, where ``A^T u = d outer / d params``.

    Each loss is evaluated once. Random numbers are drawn as by one call of each, and all
    products of the solve see the same draw. Nothing of the caller's is changed.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor; with `has_aux` a pair of it and anything.
    inner : callable or condition
        ``inner(params, hparams)``, an objective that `params` minimises, or a condition object
        such as `GaussNewton`, `Root` or `FixedPoint`.
    params : pytree of Tensor
        The inner solution, found in any way. Parameters that are frozen beside others that are
        not are constants.
    hparams : pytree of Tensor
        The outer variables. The answer is shaped like them.
    solver : Solver, optional
        The linear solver. None: `Auto`, which is `Exact` up to 100 unknowns, else `CG` for a
        symmetric A and `GMRES` otherwise, with others to fall back on.
    x0 : pytree of Tensor, optional
        Where the linear solve starts, shaped like `params`: the last call's ``info.solution``.
    has_aux : bool
        Whether `outer` returns ``(loss, aux)``.
    inner_tol : float, optional
        Above this relative inner residual the inner problem counts as unsolved. None: measured,
        not judged.
    on_failure : {"warn", "raise", "ignore"}
        What to do when the answer may be wrong.
    return_info : bool
        Whether to return a `SolveInfo` too.

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
    NotConverged, IndefiniteHessian, SingularHessian, Diverged
        With ``on_failure="raise"``.
    UnsupportedOperation
        If the solver needs a symmetric matrix and the condition's is not, or when the answer
        is differentiated: use `custom_argmin` for that.

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
        outer, inner, params, hparams, solver, x0, has_aux, inner_tol, on_failure, return_info
    )
    if return_info:
        return answer.grads, answer.info
    return (answer.grads, answer.info.aux) if has_aux else answer.grads


@never_compiled
def implicit_backward(
    outer: Callable[[Any, Any], Any],
    inner: Any,
    params: Any,
    hparams: Any,
    *,
    solver: Solver | None = None,
    x0: Any = None,
    has_aux: bool = False,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
) -> Any:
    """Accumulate the hypergradient into the ``.grad`` of the hyperparameters.

    Acts as ``torch.autograd.backward(leaves of hparams, grads)``: the gradient passes through
    hyperparameters that are not leaves, such as ``log_wd.exp()``, and those that need no
    gradient are skipped.

    Parameters
    ----------
    outer, inner, params, hparams, solver, x0, has_aux, inner_tol, on_failure, return_info
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
    leaves = [h for h in Tree("hparams", hparams).variables if h.requires_grad]
    if not leaves:
        raise NotConnected(
            "No tensor in hparams requires grad, so there is nowhere to accumulate a gradient. "
            "Set requires_grad_() on the hyperparameters, or call implicit_grad."
        )
    answer = _hypergradient(
        outer, inner, params, hparams, solver, x0, has_aux, inner_tol, on_failure, return_info
    )
    pairs = [
        (h, g)
        for h, g in zip(Tree("hparams", hparams).variables, answer.leaves, strict=True)
        if h.requires_grad
    ]
    torch.autograd.backward([h for h, _ in pairs], [g for _, g in pairs])
    if return_info:
        return answer.info.outer_value, answer.info
    if has_aux:
        return answer.info.outer_value, answer.info.aux
    return answer.info.outer_value


@dataclasses.dataclass
class _Answer:
    grads: Any
    leaves: list[Tensor]
    info: SolveInfo


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
) -> _Answer:
    check_on_failure(on_failure)
    condition = as_condition(inner, Minimum)
    P, H = Tree("params", params, skip_frozen=True), Tree("hparams", hparams)
    problem = Problem.of(condition, P, [H])
    layout = problem.layout()
    refuse_distributed(condition.functions(), outer)
    solver = choose(solver, condition.symmetric)
    looks = on_failure != "ignore" or getattr(solver, "rtol", None) != 0

    # Autograd stops a loss that changes a float argument in place; the others are copies.
    tensors = [detached(t) if t.is_floating_point() else t.clone() for t in problem.tensors]
    start = None
    if x0 is not None:
        start = layout.flatten([detached(t) for t in P.match("x0", x0)])
    versions = _versions(tensors)
    value, aux, cotangent, direct, sources = _outer_gradient(outer, problem, tensors, has_aux)
    forward = needs_product(solver, condition, transpose=True)
    lin = Linearisation(problem, tensors, Draw(), forward=forward)
    refuse_past_arguments("inner", lin.record.values, lin.aliases, [P, H])

    _refuse_changed(problem, tensors, versions)
    b = layout.flatten(cotangent)
    flat_params = layout.flatten([tensors[i] for i in problem.inner])
    u, info = solve_linear(
        lin,
        solver,
        b,
        flat_params,
        transpose=True,
        inner_tol=inner_tol,
        x0=start,
        looks=looks,
        estimate=return_info,
    )
    indirect = lin.cross(u)
    leaves = [_difference(d, c, h) for d, c, h in zip(direct, indirect, H.variables, strict=True)]
    estimate = info.error_estimate
    if return_info:
        estimate = of_sum(estimate, indirect, leaves)
    info = dataclasses.replace(
        info,
        error_estimate=estimate,
        solution=P.fill(layout.split(u)),
        outer_value=value,
        aux=pytree.tree_map(lambda t: t.detach() if isinstance(t, Tensor) else t, aux),
    )

    def places() -> Any:
        for tree in (P, H):
            for i, variable in enumerate(tree.variables):
                yield tree.variable_path(i), variable.detach()
        yield "the outer loss", value
        for i, part in enumerate(cotangent):
            if part is not None:
                yield f"the gradient of the outer loss by {P.variable_path(i)}", part
        for i, part in enumerate(direct):
            if part is not None:
                yield f"the gradient of the outer loss by {H.variable_path(i)}", part
        for i, part in enumerate(layout.split(lin.residual)):
            yield f"the inner condition (its gradient) at {P.variable_path(i)}", part
        for i, part in enumerate(layout.split(lin.transposed(torch.ones_like(b)))):
            yield f"the product with the inner Hessian at {P.variable_path(i)}", part
        for i, part in enumerate(layout.split(u)):
            yield f"the solution of the linear system at {P.variable_path(i)}", part
        for i, part in enumerate(indirect):
            if part is not None:
                yield f"the cross derivative by {H.variable_path(i)}", part

    sound = finite(value, lin.residual, u, *leaves)
    judge(
        info,
        solver,
        inner_tol=inner_tol,
        on_failure=on_failure,
        condition=norm(lin.residual),
        sound=sound,
        places=places,
    )
    if on_failure != "ignore":
        warn_of_unused(H, "Neither outer nor inner", direct, indirect)
    sources = [*problem.tensors, *sources, *lin.captured]
    leaves = refuse_derivatives(leaves, sources, _not_differentiable, plain=being_traced())
    return _Answer(H.fill(leaves), leaves, info)


def _outer_gradient(
    outer: Callable[[Any, Any], Any], problem: Problem, tensors: list[Tensor], has_aux: bool
) -> tuple[Tensor, Any, list[Tensor | None], list[Tensor | None], list[Tensor]]:
    """Value, aux, the gradients of the outer loss by the inner and outer variables, captures."""
    inner, places = problem.inner, list(problem.outer)

    def evaluate(
        aliases: list[Tensor],
    ) -> tuple[Tensor, Any, list[Tensor | None], list[Tensor]]:
        given = list(tensors)
        for place, alias in zip([*inner, *places], aliases, strict=True):
            given[place] = alias
        returned, aux = without_aux("outer", outer(*problem.arguments(given)), has_aux, "loss")
        value = scalar("outer", returned)
        refuse_past_arguments("outer", [value], aliases, [problem.params, *problem.args])
        found: list[Tensor | None] = [None] * len(aliases)
        if value.requires_grad:
            found = list(torch.autograd.grad(value, aliases, allow_unused=True))
        return value, aux, found, further_out(value, aliases)

    with advice([problem.params, *problem.args]):
        value, aux, found, captured = trace(evaluate, [tensors[i] for i in [*inner, *places]])
    cotangent, direct = found[: len(inner)], found[len(inner) :]
    if all(part is None for part in cotangent):
        raise NotConnected(
            "outer does not depend on params, so the inner problem plays no part in its gradient. "
            "Use params in outer: a module must be called as torch.func.functional_call(module, "
            "params, args), and a .detach(), .item() or torch.no_grad() inside outer cuts the "
            "connection."
        )
    return value.detach(), aux, cotangent, direct, captured


def _difference(direct: Tensor | None, indirect: Tensor | None, like: Tensor) -> Tensor:
    if direct is None and indirect is None:
        return torch.zeros_like(like.detach())
    if indirect is None:
        assert direct is not None
        return direct.detach().clone(memory_format=torch.contiguous_format)
    if direct is None:
        return -indirect.detach()
    return (direct - indirect).detach()


def _versions(tensors: list[Tensor]) -> list[int]:
    return [0 if is_wrapped(t) else t._version for t in tensors]


def _refuse_changed(problem: Problem, tensors: list[Tensor], versions: list[int]) -> None:
    """Raise if a loss has changed one of its arguments in place."""
    names = [
        tree.path(i)
        for tree in (problem.params, *problem.args)
        for i, leaf in enumerate(tree.leaves)
        if isinstance(leaf, Tensor)
    ]
    for name, before, after in zip(names, versions, _versions(tensors), strict=True):
        if before != after:
            raise UnsupportedOperation(
                f"A loss changes {name} in place. Use an operation that returns a new tensor, or "
                "tensor.clone()."
            )


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "implicit_grad returns a detached hypergradient that cannot be differentiated again. Make "
        "the inner solver differentiable with custom_argmin, and differentiate outer through it."
    )
