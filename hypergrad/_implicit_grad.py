"""One hypergradient: the direct term minus the cross derivative times the linear solve."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal, Unpack, overload

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ._captures import refuse_distributed, refuse_past_arguments
from ._conditions import Minimum, as_condition
from ._errors import NotConnected, UnsupportedOperation
from ._evidence import finite, needs_product, of_sum, solve_linear
from ._info import SolveInfo
from ._linearise import Linearisation
from ._outer import outer_gradient
from ._overloads import Hparams, Inner, Options, Outer, Params
from ._problem import Problem, TakesDerivatives
from ._randomness import Draw, generators, restore
from ._report import OnFailure, check_on_failure, judge, warn_of_unused
from ._trace import being_traced, detached
from ._transforms import (
    forward_mode_active,
    is_wrapped,
    never_compiled,
    refuse_derivatives,
    transforms_active,
)
from ._tree import Tree
from ._vmaps import Vmaps
from .solvers import Solver, choose
from .solvers._base import mapped_by_caller, norm


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
    NotConverged, IndefiniteHessian, SingularHessian, Diverged, NotDifferentiable
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
    call = _Call(
        outer=outer,
        problem=Problem.of(condition, P, [H]),
        solver=choose(solver, condition.symmetric),
        x0=None if x0 is None else P.match("x0", x0),
        has_aux=has_aux,
        inner_tol=inner_tol,
        on_failure=on_failure,
        return_info=return_info,
    )
    refuse_distributed(condition.functions(), outer)
    vmaps = None if forward_mode_active() or mapped_by_caller(call.solver) else Vmaps.around()
    if vmaps is None:
        return call.answer()
    random = generators()
    try:
        with vmaps.left():
            return call.answer(vmaps)
    except TakesDerivatives:
        restore(random)
    return call.answer()


@dataclasses.dataclass(frozen=True)
class _Call:
    """One hypergradient: of one system, or outside the caller's vmaps of all their tasks at once.

    Inside, tensors have the task dimensions of `vmaps` in front, and `lead` are their sizes.
    """

    outer: Callable[[Any, Any], Any]
    problem: Problem
    solver: Solver
    x0: list[Tensor] | None
    has_aux: bool
    inner_tol: float | None
    on_failure: OnFailure
    return_info: bool

    def answer(self, vmaps: Vmaps | None = None) -> _Answer:
        problem = self.problem if vmaps is None else self.problem.outside(vmaps)
        P, H = problem.params, problem.args[0]
        layout = problem.layout()
        lead = () if vmaps is None else vmaps.sizes

        def plain(tensor: Tensor) -> Tensor:
            return detached(tensor if vmaps is None else vmaps.unwrapped(tensor))

        # Autograd stops a loss that changes a float argument in place; the others are copies.
        tensors = [plain(t) if t.is_floating_point() else plain(t).clone() for t in problem.tensors]
        start = None if self.x0 is None else layout.flatten([plain(t) for t in self.x0], lead)
        looks = self.on_failure != "ignore" or getattr(self.solver, "rtol", None) != 0
        versions = _versions(tensors)
        value, aux, cotangent, direct, sources = outer_gradient(
            self.outer, problem, tensors, self.has_aux
        )
        forward = needs_product(self.solver, problem.condition, transpose=True)
        lin = Linearisation(problem, tensors, Draw(), forward=forward)
        refuse_past_arguments("inner", lin.record.values, lin.aliases, [P, H])

        _refuse_changed(problem, tensors, versions)
        b = layout.flatten(cotangent, lead)
        u, info, found = solve_linear(
            lin,
            self.solver,
            b,
            layout.flatten([tensors[i] for i in problem.inner], lead),
            transpose=True,
            inner_tol=self.inner_tol,
            x0=start,
            looks=looks,
            estimate=self.return_info,
        )
        indirect = lin.cross(u)
        outer_variables = [tensors[i] for i in problem.outer]
        leaves = [
            _difference(d, c, h) for d, c, h in zip(direct, indirect, outer_variables, strict=True)
        ]
        estimate = info.error_estimate
        if self.return_info:
            estimate = of_sum(estimate, indirect, leaves)
        info = dataclasses.replace(info, error_estimate=estimate, outer_value=value)

        def places() -> Any:
            for position, place in enumerate(problem.inner):
                yield P.variable_path(position), tensors[place]
            for position, place in enumerate(problem.outer):
                yield H.variable_path(position), tensors[place]
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

        judge(
            info,
            found,
            self.solver,
            inner_tol=self.inner_tol,
            on_failure=self.on_failure,
            condition=norm(lin.residual),
            sound=finite(lead, value, lin.residual, u, *leaves),
            places=places,
            kink=problem.condition.kink,
        )
        if self.on_failure != "ignore":
            warn_of_unused(H, "Neither outer nor inner", direct, indirect)
        sources = [*self.problem.tensors, *sources, *lin.captured]
        with nullcontext() if vmaps is None else vmaps.entered():
            if self.return_info:
                solution = layout.split(u)
                if vmaps is not None:
                    solution, info = vmaps.wrapped_tree((solution, info))
                info = dataclasses.replace(info, solution=P.fill(solution))
            if vmaps is not None:
                leaves = [vmaps.wrapped(leaf) for leaf in leaves]
            leaves = refuse_derivatives(leaves, sources, _not_differentiable, plain=being_traced())
            aux = pytree.tree_map_only(Tensor, torch.Tensor.detach, aux)
            info = dataclasses.replace(info, aux=aux)
            return _Answer(H.fill(leaves), leaves, info)


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
