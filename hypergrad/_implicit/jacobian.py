"""`jacobian`: the derivative of many outputs through one inner solution."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .._autograd.captured import refuse_one_level_reduced
from .._autograd.refusals import never_compiled
from .._compiled.session import EVERYWHERE, compiling
from .._mistakes import explained
from .._pytrees import Tree
from .._warnings import OnFailure, check_on_failure
from ..conditions._base import as_condition
from ..conditions._inner_problem import Problem
from ..conditions._minimum import Minimum
from ..solvers import Solver
from ..solvers._auto import choose
from .blocks import checked_memory, leaves_of_start, refuse_transforms
from .choices import Choices
from .compiled_jacobian import replayed_jacobian
from .jacobian_call import JacobianCall
from .signatures import Hparams, Inner, Params


@never_compiled
@explained
def jacobian(
    outers: Callable[[Params, Hparams], Any],
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
    memory: float = 2**30,
    compile: bool = False,
) -> Any:
    """Compute the derivative of many outputs through the solution of an inner problem.

    Each row is what `implicit_grad` returns for that output, and is judged as it is there. The
    inner problem is evaluated and recorded once for all of them, and their linear systems, which
    have the matrix in common, are solved in blocks: with `CG`, and so by default above 600
    unknowns, by block conjugate gradients, which take fewer products the more right-hand sides
    there are; with `Exact` by one factorisation a block; with any other solver side by side.
    Outputs that are equal, dependent or constant do no harm.

    Parameters
    ----------
    outers : callable
        ``outers(params, hparams)``, a tensor or a pytree of tensors; with `has_aux` a pair of that
        and anything.
    inner, params, hparams, solver
        As in `implicit_grad`. Of a condition with `batches` a pass serves a whole block; by
        differences each output takes passes of its own.
    x0 : pytree of Tensor, optional
        Where the linear solves start: the last call's ``info.solution``, shaped like `params` with
        an axis of all outputs in front.
    has_aux : bool
        Whether `outers` returns ``(outputs, aux)``.
    inner_tol, on_failure
        As in `implicit_grad`; a warning or an error comes once for all outputs ("3 of 32
        outputs: ...").
    return_info : bool
        Whether to return a `SolveInfo` too, with one entry an output in each figure.
    memory : float
        Bytes that the vectors and products of a block may take. It sets how many right-hand sides
        are solved together: from one, where not even that fits, to 256. The answer and the matrix
        of `Exact` come on top. The answers of two budgets differ by no more than the tolerance of
        the solver allows.
    compile : bool
        As in `implicit_grad`. The product is traced once for a block of right-hand sides, with all
        that does not depend on them computed before. Up to four blocks are compiled.

    Returns
    -------
    jacobian : pytree of Tensor
        As `torch.func.jacrev` returns it: for each tensor that `outers` returns a pytree shaped
        like `hparams`, whose leaves have the shape of the output followed by that of the leaf.
        Detached.
    info : SolveInfo
        With `return_info`. Outputs are counted in the order of the pytree, each flattened;
        ``info.outer_value`` holds them, ``info.aux`` what `outers` returned beside them.
    aux : pytree
        With `has_aux` and without `return_info`.

    Raises
    ------
    NotConnected
        If no output depends on `params`, or `inner` not on some leaf of it.
    NotFinite, NotConverged, IndefiniteHessian, SingularHessian, Diverged, NotDifferentiable
        As in `implicit_grad`.
    StructureMismatch
        If an argument has the wrong structure.
    UnsupportedOperation
        As in `implicit_grad`, if `params` are DTensors, and inside a function transform: there
        `torch.func.jacrev` through `custom_argmin` works.

    References
    ----------
    O'Leary, The block conjugate gradient algorithm and related methods, 1980; Dubrulle, Retooling
    the method of block conjugate gradients, 2001; Ji and Li, A breakdown-free block conjugate
    gradient method, 2017.

    Examples
    --------
    The predictions of ridge regression, by the logarithm of its penalty:

    >>> import torch, hypergrad
    >>> X = torch.tensor([[1.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    >>> y = torch.tensor([1.0, 2.0, 3.0])
    >>> def inner(w, log_lam):
    ...     return ((X @ w - y) ** 2).sum() / 2 + log_lam.exp() * (w @ w) / 2
    >>> def predictions(w, log_lam):
    ...     return X @ w
    >>> log_lam = torch.tensor(0.0)
    >>> w = torch.linalg.solve(X.T @ X + torch.eye(2), X.T @ y)
    >>> hypergrad.jacobian(predictions, inner, w, log_lam)
    tensor([-0.2941, -0.2353, -0.4118])
    """
    check_on_failure(on_failure)
    refuse_transforms("jacobian")
    condition = as_condition(inner, Minimum)
    P = Tree("params", params, skip_frozen=True, of_autograd=condition.of_objective)
    H = Tree("hparams", hparams, of_autograd=True)
    problem = Problem.of(condition, P, [H])
    choices = Choices(choose(solver, condition.symmetric), inner_tol, on_failure, return_info)
    refuse_one_level_reduced(condition.functions(), outers)
    start = None if x0 is None else leaves_of_start(P, x0)
    call = JacobianCall(outers, problem, choices, start, has_aux, checked_memory(memory))
    session = compiling() or (EVERYWHERE if compile else None)
    compiled = None if session is None else replayed_jacobian(call, session)
    answer, info = call.answer() if compiled is None else compiled
    if return_info:
        return answer, info
    return (answer, info.aux) if has_aux else answer
