"""`influence`: what each training example does to the loss of each test point."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .._autograd.guard import Guard
from .._autograd.random_numbers import Draw, unnoticed
from .._autograd.recording import refuse_past_arguments
from .._autograd.refusals import never_compiled, refuse_derivatives
from .._autograd.trace import being_traced, detached, versions
from .._errors import StructureMismatch, UnsupportedOperation
from .._mistakes import explained
from .._pytrees import Tree
from .._warnings import OnFailure, check_on_failure
from ..conditions._inner_problem import Problem, scalar
from ..conditions._minimum import Minimum
from ..solvers import Solver
from ..solvers._auto import choose
from .blocks import BlockCall, checked_memory, plain_tensors, refuse_transforms
from .choices import Choices
from .hypergradient import refuse_changed
from .linearisation import Linearisation
from .outputs import Outputs, Pushed
from .signatures import Params


@never_compiled
@explained
def influence(
    outer_each: Callable[[Params], Tensor],
    inner_each: Callable[[Params], Tensor],
    params: Params,
    *,
    weights: Tensor | None = None,
    regulariser: Callable[[Params], Tensor] | None = None,
    solver: Solver | None = None,
    inner_tol: float | None = 1e-3,
    on_failure: OnFailure = "warn",
    return_info: bool = False,
    memory: float = 2**30,
) -> Any:
    """Compute what each training example does to the loss of each test point.

    The inner solution `params` minimises
    ``(weights * inner_each(params)).sum() + regulariser(params)``. Entry (j, i) of the answer is
    the change of test loss j, to first order, when the weight of training example i goes from
    what it is to zero (from 1, without `weights`): ``weights[i] * g_j^T H^-1 g_i`` with the
    gradients g of the two losses and the Hessian H of the inner objective, regulariser included.
    Positive: the test loss rises without the example, which has helped. It is minus the derivative
    by the weight, times the weight; Koh and Liang's ``I_up,loss``, for the mean over n examples,
    is n times minus that. For a loss that is quadratic in `params` leaving the example out for
    good changes `params` by ``1 / (1 - h_i)`` times as much, with the leverage
    ``h_i = weights[i] * x_i^T H^-1 x_i`` (Cook and Weisberg).

    One linear system is solved for each test point or for each training example, whichever are
    fewer, in blocks as in `jacobian`. Products are exact, and all examples are evaluated at once.

    Parameters
    ----------
    outer_each : callable
        ``outer_each(params)``, the loss of each test point: ``(n_test,)``.
    inner_each : callable
        ``inner_each(params)``, the loss of each training example: ``(n_train,)``. It is evaluated
        once more than in `implicit_grad`, to see how many there are.
    params : pytree of Tensor
        The inner solution, as in `implicit_grad`.
    weights : Tensor, optional
        ``(n_train,)``. None: ones. Of a mean over the examples they are ``1 / n_train``: with
        others `params` is no solution, and negative curvature or a residual may be what is said.
    regulariser : callable, optional
        ``regulariser(params)``, a scalar that belongs to the inner objective and to no example,
        such as weight decay.
    solver, inner_tol, on_failure
        As in `implicit_grad`. Of a network that is not trained to a minimum the Hessian may have
        negative curvature, which is said: ``CG(damping=...)`` adds to all of it.
    return_info : bool
        Whether to return a `SolveInfo` too, with one entry in each figure for each system that
        was solved: for each test point or, where they are fewer, for each training example.
    memory : float
        Bytes for a block, as in `jacobian`.

    Returns
    -------
    influence : Tensor
        ``(n_test, n_train)``, detached.
    info : SolveInfo
        With `return_info`.

    Raises
    ------
    NotConnected
        If a function does not depend on `params`.
    NotFinite, NotConverged, IndefiniteHessian, SingularHessian, Diverged
        As in `implicit_grad`.
    StructureMismatch
        If a function does not return a vector, or `weights` does not fit.
    UnsupportedOperation
        As in `jacobian`.

    References
    ----------
    Cook and Weisberg, Residuals and influence in regression, 1982, section 3.4; Koh and Liang,
    Understanding black-box predictions via influence functions, 2017, equation 2.

    Examples
    --------
    The mean of three numbers, and the squared distance of a fourth from it:

    >>> import torch, hypergrad
    >>> numbers = torch.tensor([0.0, 1.0, 5.0])
    >>> hypergrad.influence(
    ...     lambda mean: (mean - torch.tensor([4.0])) ** 2,
    ...     lambda mean: (mean - numbers) ** 2 / 2,
    ...     numbers.mean(),
    ... )
    tensor([[-2.6667, -1.3333,  4.0000]])

    The most harmful example, without which the test loss falls the most, is the first:
    ``change.sum(0).argsort()`` sorts them.
    """
    check_on_failure(on_failure)
    refuse_transforms("influence")
    P = Tree("params", params, skip_frozen=True, of_autograd=True)
    W = Tree("weights", _weights(inner_each, P, weights))
    objective = _Objective(inner_each, regulariser)
    problem = Problem.of(Minimum(objective), P, [W])
    choices = Choices(choose(solver, True), inner_tol, on_failure, return_info)
    tensors = plain_tensors(problem)
    before, of_outer, of_inner = versions(tensors), Draw(), Draw()

    outputs = Outputs(
        "outer_each", _Each("outer_each", outer_each), problem, tensors, False, of_outer
    )
    lin = Linearisation(problem, tensors, of_inner)
    refuse_past_arguments("inner_each", lin.record.values, lin.aliases, [P])
    refuse_changed(problem, tensors, before)
    sources = [*problem.tensors, *outputs.captured, *lin.captured]
    call = BlockCall(problem, tensors, choices, lin, outputs, lin, checked_memory(memory))
    of_examples = len(outputs.values) > W.tensors[0].numel()
    if of_examples:
        each = _Each("inner_each", inner_each)
        examples = Outputs("inner_each", each, problem, tensors, False, of_inner)
        call = dataclasses.replace(call, outputs=examples, finish=Pushed(outputs, tensors))
    (derivative,), info, _ = call.answer()
    answer = -(derivative.mT if of_examples else derivative) * tensors[problem.outer[0]]
    (answer,) = refuse_derivatives([answer], sources, _not_differentiable, plain=being_traced())
    return (answer, info) if return_info else answer


@dataclasses.dataclass(frozen=True)
class _Each:
    """A function of ``(params, weights)`` from one of `params` that returns a vector."""

    name: str
    function: Callable[[Any], Any]

    def __call__(self, params: Any, weights: Any) -> Tensor:
        """Call it, and look at what it returns."""
        value = self.function(params)
        if not isinstance(value, Tensor) or value.ndim != 1:
            shape = f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value)
            raise StructureMismatch(
                f"{self.name} must return a vector with the loss of each example; it returned "
                f"{shape}. Leave out .mean() and .sum(): pass reduction='none' to the loss.",
                argument=self.name,
            )
        return value


@dataclasses.dataclass(frozen=True)
class _Objective:
    """The inner objective, of the weights of the examples."""

    each: Callable[[Any], Any]
    regulariser: Callable[[Any], Any] | None

    def __call__(self, params: Any, weights: Any) -> Tensor:
        """Evaluate it."""
        value = (weights * _Each("inner_each", self.each)(params, weights)).sum()
        if self.regulariser is None:
            return value
        return value + scalar("regulariser", self.regulariser(params))


def _weights(inner_each: Callable[[Any], Any], P: Tree, weights: Tensor | None) -> Tensor:
    """Look at the weights, or make them."""
    with torch.no_grad(), unnoticed(), Guard():
        losses = _Each("inner_each", inner_each)(
            P.rebuild([detached(v) for v in P.variables]), None
        )
    if weights is None:
        return torch.ones_like(losses)
    if not isinstance(weights, Tensor) or weights.shape != losses.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise StructureMismatch(
            f"weights must be a tensor with one entry for each of the {len(losses)} losses that "
            f"inner_each returns; got {got}.",
            argument="weights",
        )
    return weights


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "influence returns detached numbers that cannot be differentiated again. Make the inner "
        "solver differentiable with custom_argmin, and differentiate through it."
    )
