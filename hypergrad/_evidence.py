"""The linear solve of a linearised problem, and the figures that say how good it is."""

from __future__ import annotations

import torch
from torch import Tensor

from ._conditions import Condition
from ._info import SolveInfo
from ._linearise import Linearisation
from .solvers._base import LinearSystem, Solver, dot, info_of, norm


def solve_linear(
    lin: Linearisation,
    solver: Solver,
    b: Tensor,
    params: Tensor,
    *,
    transpose: bool,
    inner_tol: float | None,
    x0: Tensor | None = None,
    looks: bool = True,
) -> tuple[Tensor, SolveInfo]:
    """Solve ``A u = b``, or with the transpose of A, and collect the evidence.

    Parameters
    ----------
    lin : Linearisation
        Where A comes from.
    solver : Solver
        The method.
    b : Tensor
        Right-hand sides ``(*tasks, n)``, with a further axis in front where several share A.
    params : Tensor
        The flat inner variables ``(*tasks, n)``, the scale of the inner residual.
    transpose : bool
        Whether the transpose of A is meant.
    inner_tol : float or None
        Above this relative inner residual the answer is no success.
    x0 : Tensor, optional
        Where the iteration starts.
    looks : bool
        Whether the host may look at values on the way.

    Returns
    -------
    u : Tensor
        The answer, like `b`.
    info : SolveInfo
        Its evidence, without `solution`, `outer_value` and `aux`.
    """
    condition = lin.problem.condition
    there, back = (lin.transposed, lin.product) if transpose else (lin.product, lin.transposed)
    system = LinearSystem(
        matvec=there,
        b=b,
        layout=lin.layout,
        tree=lin.problem.params,
        x0=x0,
        rmatvec=None if lin.record.product is None else back,
        symmetric=condition.symmetric,
        dense=lambda: lin.dense(transpose),
        looks=looks,
        contraction=condition.contraction,
        shared=b.shape[0] if b.ndim - 1 > len(lin.lead) else 1,
    )
    with torch.autocast(b.device.type, enabled=False):  # the solver's own arithmetic
        found = solver.run(system)
    size = norm(lin.residual)
    # Parameters this close to zero are zero: what is left of them is rounding.
    least = (torch.finfo(params.dtype).eps * lin.layout.n) ** 0.5
    inner = size * norm(found.x) / (norm(b) * norm(params).clamp(min=least))
    inner = torch.where(size == 0, torch.zeros_like(inner), inner)
    success = found.success
    if inner_tol is not None:
        # Without a right-hand side there is no curvature to judge by; NaN is no success.
        success = success & ((inner <= inner_tol) | (norm(b) == 0))
    success = success & torch.isfinite(found.x).all(dim=-1)
    info = info_of(
        found,
        solution=None,
        success=success,
        inner_residual=inner,
        outer_error=dot(found.x, lin.residual),
    )
    return found.x, info


def needs_product(solver: Solver, condition: Condition, *, transpose: bool) -> bool:
    """Whether a solve, with the transpose of A or with A, forms products with A itself."""
    return (not transpose or solver.needs_transpose) and not condition.symmetric


def finite(*tensors: Tensor | None) -> Tensor:
    """Whether all entries of all tensors of one task are finite, as a 0-d bool tensor."""
    present = [t for t in tensors if t is not None and t.numel()]
    device = present[0].device
    largest = [torch.linalg.vector_norm(t, float("inf")).to(device, torch.float64) for t in present]
    return torch.isfinite(torch.stack(largest)).all()
