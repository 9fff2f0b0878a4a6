"""What all linear solvers share: the system, the meaning of their fields, and the evidence.

A solver works on flat vectors of shape ``(*tasks, n)``. Every task is a system of its own, with
its own status; a task that has stopped is frozen while the others go on.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._errors import UnsupportedOperation
from .._info import SolveInfo, Status
from .._transforms import any_task, refuse_derivatives, transforms_active
from .._tree import Layout, Tree

if TYPE_CHECKING:
    from ._observer import Observer

Product = Callable[[Tensor], Tensor]

# What ``rtol=None`` means, by the dtype in which products are formed.
_REACHABLE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# Where a singular system has no solution, residuals can be bought with answers of any length:
# the answer is then the iterate with the least ||r|| + PRICE ||A|| ||x||.
PRICE = 1e-4


@dataclasses.dataclass
class LinearSystem:
    """``A x = b`` on flat vectors ``(*tasks, n)``.

    Attributes
    ----------
    matvec, rmatvec : callable
        Products with A and, where known, with its transpose.
    b : Tensor
        The right-hand side.
    x0 : Tensor, optional
        Where an iteration starts.
    symmetric : bool, optional
        Whether A is known to be symmetric; None: the caller did not say.
    dense : callable, optional
        A as a matrix, ``(*tasks, n, n)`` or with fewer task dimensions where tasks share it.
    layout, tree : Layout, Tree
        How a vector becomes a pytree, for preconditioners.
    looks : bool
        Whether the host may look at values between iterations.
    contraction : bool
        Whether A = I - J with J the derivative of a map that is meant to contract.
    condition : Tensor, optional
        The inner condition F at the parameters, where the Newton step ``A^-1 F`` is of interest.
    shared : int
        How many right-hand sides, along the first axis of `b`, have one matrix in common.
    """

    matvec: Product
    b: Tensor
    layout: Layout
    tree: Tree
    x0: Tensor | None = None
    rmatvec: Product | None = None
    symmetric: bool | None = None
    dense: Callable[[], Tensor] | None = None
    looks: bool = True
    contraction: bool = False
    condition: Tensor | None = None
    shared: int = 1


@dataclasses.dataclass
class Solution:
    """A flat answer and its evidence; every figure has the tasks' shape.

    The last three are there where the system came with a condition F, and the method knows them.

    Attributes
    ----------
    inverse : Tensor, optional
        ``||A^-1 v|| / ||v||`` for a v like the residual.
    newton : Tensor, optional
        The length of ``A^-1 F``.
    largest : Tensor, optional
        The largest ``||A v|| / ||v||`` that was met.
    """

    x: Tensor
    status: Tensor
    success: Tensor
    iterations: Tensor
    matvecs: int
    residual_norm: Tensor
    negative_curvature: Tensor
    eigenvalues: Tensor
    method: str
    inverse: Tensor | None = None
    newton: Tensor | None = None
    largest: Tensor | None = None
    #: The condition number of A as far as the method has seen it: a lower bound, when asked.
    condition_number: Callable[[], Tensor] | None = None


class Solver(ABC):
    """A method for ``(A + damping I) x = b``, as a value: frozen, printable and shareable."""

    needs_symmetry: ClassVar[bool] = False
    #: Whether products with the transpose are needed: `rmatvec`, where A is not symmetric.
    needs_transpose: ClassVar[bool] = False

    def solve(
        self,
        matvec: Callable[[Any], Any],
        b: Any,
        *,
        x0: Any = None,
        rmatvec: Callable[[Any], Any] | None = None,
    ) -> tuple[Any, SolveInfo]:
        """Solve ``(A + damping I) x = b`` on pytrees.

        Parameters
        ----------
        matvec : callable
            ``v -> A v`` on pytrees shaped like `b`.
        b : pytree of Tensor
            The right-hand side.
        x0 : pytree of Tensor, optional
            Where an iteration starts; zeros by default. Direct methods have no use for it.
        rmatvec : callable, optional
            ``v -> A^T v``, for methods that need the transpose.

        Returns
        -------
        x : pytree of Tensor
            The answer, shaped like `b`.
        info : SolveInfo
            Its evidence. Nothing is raised or warned of here: look at ``info.success``. Both are
            detached; the decorators and `root_vjp` have the derivative of a solution.
        """
        tree = Tree("b", b)
        layout = Layout(tree, tree.variables)

        def flat(product: Callable[[Any], Any], name: str) -> Product:
            return lambda v: layout.flatten(
                tree.match(f"{name}(v)", product(tree.rebuild(layout.split(v))))
            )

        system = LinearSystem(
            matvec=flat(matvec, "matvec"),
            b=layout.flatten(tree.variables).detach(),
            layout=layout,
            tree=tree,
            x0=None if x0 is None else layout.flatten(tree.match("x0", x0)).detach(),
            rmatvec=None if rmatvec is None else flat(rmatvec, "rmatvec"),
        )
        system.dense = lambda: dense_by_products(system.matvec, system.b)
        with torch.no_grad():
            found = self.run(system)
        parts = refuse_derivatives(layout.split(found.x), tree.variables, _not_differentiable)
        x = tree.rebuild(parts)
        return x, info_of(found, solution=x)

    @abstractmethod
    def run(self, system: LinearSystem) -> Solution:
        """Solve a flat system."""

    def as_preconditioner(self, matvec: Counted, b: Tensor) -> Product:
        """An approximate inverse for another method, on flat vectors.

        Parameters
        ----------
        matvec : Counted
            Products with the other method's matrix.
        b : Tensor
            Its right-hand sides.

        Raises
        ------
        UnsupportedOperation
            For all methods but `Nystrom`.
        """
        raise UnsupportedOperation(
            f"{type(self).__name__} is no preconditioner. Pass a callable that approximates the "
            "inverse, or Nystrom(rank=...)."
        )


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "The answer of solver.solve is detached: its derivative would go through the iterations. "
        "Use custom_root or root_vjp with F(x, b) = A x - b."
    )


def info_of(found: Solution, *, solution: Any, **evidence: Any) -> SolveInfo:
    """The `SolveInfo` of a flat solution; figures that are not given are NaN."""
    nan = torch.full_like(found.residual_norm, math.nan)
    figures: dict[str, Any] = {
        "success": found.success,
        "inner_residual": nan,
        "outer_error": nan,
        "error_estimate": nan,
        "degeneracy": nan,
        "outer_value": nan,
    }
    return SolveInfo(
        status=found.status,
        iterations=found.iterations,
        matvecs=torch.full_like(found.iterations, found.matvecs),
        residual_norm=found.residual_norm,
        negative_curvature=found.negative_curvature,
        eigenvalues=found.eigenvalues,
        solution=solution,
        method=found.method,
        **{**figures, **evidence},
    )


@dataclasses.dataclass(frozen=True)
class Iterative(Solver):
    """The fields that all Krylov methods share.

    Parameters
    ----------
    maxiter : int, optional
        Most iterations. None: ten times the unknowns, at most 5000. Given without `rtol` it is
        a budget: running out of it is no failure.
    rtol, atol : float
        Stop when ``||r|| <= max(rtol ||b||, atol)``. ``rtol=None`` is a tolerance that the dtype
        can reach (1e-6 in float64, 1e-4 in float32, 5e-3 in float16, 3e-2 in bfloat16) and
        counts as met at the rounding floor.
    damping : float
        The system solved is ``(A + damping I) x = b``.
    preconditioner : callable or Nystrom, optional
        ``v -> approximately (A + damping I)^-1 v`` on pytrees shaped like `b`.
    """

    maxiter: int | None = None
    rtol: float | None = None
    atol: float = 0.0
    damping: float = 0.0
    preconditioner: Callable[[Any], Any] | Solver | None = None

    #: Whether an answer that was cut short is kept only where its residual is the smaller one.
    judged_by_residual: ClassVar[bool] = False

    def __post_init__(self) -> None:
        """Refuse values that mean nothing."""
        at_least("maxiter", self.maxiter, 1)
        at_least("rtol", self.rtol, 0.0)
        at_least("atol", self.atol, 0.0)
        finite("damping", self.damping)

    def run(self, system: LinearSystem) -> Solution:
        """Iterate from `x0`, and again from the answer where its true residual is too large.

        The right-hand side is scaled to norm one, so that neither a tiny nor a huge one loses
        accuracy; the residual that is reported is ``b - A x`` of the x that is returned.

        Parameters
        ----------
        system : LinearSystem
            What is solved.

        Returns
        -------
        solution : Solution
            The answer and its evidence.
        """
        transpose = self._transpose(system) if self.needs_transpose else None
        matvec = Counted(system.matvec, self.damping, transpose)
        precondition = batched_preconditioner(self.preconditioner, system, matvec)
        scale = norm(system.b)
        present = (scale > 0) & torch.isfinite(scale)
        unit = torch.where(present, scale, torch.ones_like(scale))[..., None]
        b = system.b / unit
        precision = system.layout.precision
        tol = (self.atol / unit[..., 0]).clamp(min=tolerance(self.rtol, precision))
        looks = system.looks or self.rtol != 0
        limit = self.maxiter or min(10 * b.shape[-1], 5000)

        x, r = torch.zeros_like(b), b
        if system.x0 is not None and (not looks or any_task(present)):
            x = torch.where(present[..., None], system.x0.to(b.dtype) / unit, x)
            r = b - matvec(x)
            size = norm(r)
        else:
            size = present.to(b.dtype)  # b has norm one, or is zero or not finite
        active = present & (size > tol)
        status = torch.where(
            torch.isfinite(scale + size), int(Status.CONVERGED), int(Status.NOT_FINITE)
        )
        iterations = torch.zeros_like(status)
        negative = torch.zeros_like(present)
        eigenvalues = b.new_full((*scale.shape, 2), math.nan)
        reached = torch.zeros_like(scale)  # ||A|| ||x||, the scale of rounding errors
        broken = torch.zeros_like(present)
        inverse = newton = largest = None
        condition_number: Callable[[], Tensor] | None = None
        first = True
        alone = b.ndim == 1 and looks and b.device.type == "cpu" and not transforms_active()
        while limit > 0 and (not looks or any_task(active)):
            part = self._iterate(
                matvec,
                precondition,
                r,
                tol,
                active,
                limit,
                looks,
                system.condition if first else None,
            )
            limit -= part.steps
            candidate = x + part.x
            r_new = b - matvec(candidate)
            size_new = norm(r_new)
            if first and looks and part.ritz is not None and precondition is None:
                eigenvalues = part.ritz()
            if part.observer is not None:
                inverse = part.observer.inverse(part.x)
                newton = norm(part.observer.step) + inverse * norm(part.observer.left)
                largest = part.largest
            if first and precondition is None:
                condition_number = part.condition_number
            if alone and first and self._as_expected(part, size_new, tol, limit):
                # What follows would say the same, in some forty small operations.
                x, size = candidate, size_new
                status = torch.where(size <= tol, int(Status.CONVERGED), part.status)
                iterations, negative = part.iterations, part.negative
                break
            # A truncated iteration is closer in the energy norm also where its residual is not.
            truncated = part.status == Status.MAX_ITERATIONS
            better = (size_new < size) | ~torch.isfinite(size_new)
            if first and not self.judged_by_residual:
                better = better | truncated
            keep = active & better
            x = torch.where(keep[..., None], candidate, x)
            r = torch.where(keep[..., None], r_new, r)
            met = size_new <= tol
            claimed = part.status == Status.CONVERGED
            stalled = claimed & ~met & ~(size_new < 0.5 * size)
            ended = torch.where(stalled, int(Status.STAGNATED), part.status)
            # At the rounding floor a regular matrix looks singular.
            rounding = 100 * torch.finfo(precision).eps * (1 + part.largest * norm(candidate))
            floored = (ended == Status.SINGULAR) & (size_new <= rounding.clamp(max=1e-3))
            ended = torch.where(floored, int(Status.STAGNATED), ended)
            ended = torch.where(met, int(Status.CONVERGED), ended)
            ended = torch.where(torch.isfinite(size_new), ended, int(Status.NOT_FINITE))
            again = claimed & ~met & ~stalled
            # A method that broke down on its way gets one more try, from the true residual.
            retried = (part.status == Status.BREAKDOWN) & ~met & ~broken & (size_new < size)
            broken = broken | (active & retried)
            again = active & (again | retried) & torch.isfinite(size_new)
            ended = torch.where(again, int(Status.MAX_ITERATIONS), ended)
            status = torch.where(active, ended, status)
            iterations = torch.where(active, iterations + part.iterations, iterations)
            negative = negative | (active & part.negative)
            size = torch.where(keep, size_new, size)
            reached = torch.where(active, part.largest * norm(x), reached)
            active, first = again, False
            if not looks:
                break
        size = torch.where(scale == 0, torch.zeros_like(size), size)
        unknown = (status == Status.NOT_FINITE)[..., None]
        x = torch.where(unknown, torch.full_like(x, math.nan), x * unit)
        x = torch.where((scale == 0)[..., None], torch.zeros_like(x), x)
        return Solution(
            x=x,
            status=status,
            success=self._succeeded(status, size, reached, precision),
            iterations=iterations,
            matvecs=matvec.count,
            residual_norm=torch.where(torch.isfinite(scale), size, torch.full_like(size, math.nan)),
            negative_curvature=negative,
            eigenvalues=eigenvalues,
            method=type(self).__name__,
            inverse=inverse,
            newton=newton,
            largest=largest,
            condition_number=condition_number,
        )

    def _as_expected(self, part: Part, size: Tensor, tol: Tensor, limit: int) -> bool:
        """Whether one system was solved at once, or cut short where that was the plan."""
        if part.status == Status.CONVERGED:
            return bool(size <= tol)
        cut = part.status == Status.MAX_ITERATIONS and limit <= 0
        return bool(cut) and not self.judged_by_residual and bool(torch.isfinite(size))

    def _succeeded(
        self, status: Tensor, size: Tensor, reached: Tensor, precision: torch.dtype
    ) -> Tensor:
        """Converged, or as close as was asked for: to the rounding floor, or to the budget."""
        good = status == Status.CONVERGED
        if self.rtol is None:
            floor = 100 * torch.finfo(precision).eps * (1 + reached)
            near = size <= floor.clamp(max=tolerance(None, precision) ** 0.5)
            good = good | ((status == Status.STAGNATED) & near)
            if self.maxiter is not None:
                good = good | (status == Status.MAX_ITERATIONS)
        return good

    def _transpose(self, system: LinearSystem) -> Product:
        """The product with the transpose, which is at hand where A is symmetric."""
        if system.rmatvec is not None:
            return system.rmatvec
        if system.symmetric:
            return system.matvec
        name = type(self).__name__
        raise UnsupportedOperation(
            f"{name} needs products with the transpose: pass rmatvec=... to {name}.solve (the "
            "same function as matvec where the matrix is symmetric), or use GMRES()."
        )

    @abstractmethod
    def _iterate(
        self,
        matvec: Counted,
        precondition: Product | None,
        r: Tensor,
        tol: Tensor,
        active: Tensor,
        limit: int,
        looks: bool,
        condition: Tensor | None = None,
    ) -> Part:
        """Correct an answer whose residual is `r`, until ``||r|| <= tol`` by the recursion.

        With the inner condition F a method that knows how lets an `Observer` follow it.
        """


@dataclasses.dataclass
class Part:
    """One pass of an iteration: the correction, and how it ended for each task."""

    x: Tensor
    status: Tensor
    iterations: Tensor
    steps: int
    negative: Tensor
    largest: Tensor  # of ||A v|| / ||v|| over the vectors met
    ritz: Callable[[], Tensor] | None = None  # lowest and highest Ritz value, when asked
    observer: Observer | None = None
    condition_number: Callable[[], Tensor] | None = None  # condition number seen, when asked


class Counted:
    """Products with ``A + damping I`` and its transpose that count how often they are formed."""

    def __init__(self, matvec: Product, damping: float, rmatvec: Product | None = None) -> None:
        self.matvec, self.rmatvec, self.damping, self.count = matvec, rmatvec, damping, 0

    def __call__(self, v: Tensor) -> Tensor:
        """Form one product."""
        return self._damped(self.matvec, v)

    def transposed(self, v: Tensor) -> Tensor:
        """Form one product with the transpose."""
        assert self.rmatvec is not None
        return self._damped(self.rmatvec, v)

    def _damped(self, product: Product, v: Tensor) -> Tensor:
        self.count += 1
        found = product(v)
        return found if self.damping == 0 else torch.add(found, v, alpha=self.damping)


def tolerance(rtol: float | None, dtype: torch.dtype) -> float:
    """`rtol`, or where it is None one that the dtype can reach."""
    return _REACHABLE[dtype] if rtol is None else rtol


def dot(a: Tensor, b: Tensor) -> Tensor:
    """The inner product of each task's vectors."""
    return torch.linalg.vecdot(a, b)


def norm(v: Tensor) -> Tensor:
    """The Euclidean norm of each task's vector, safe for entries of 1e-30 and 1e30."""
    if v.shape[-1] == 0:
        return v.new_zeros(v.shape[:-1])
    if v.dtype != torch.float64:  # squares fit into the wider dtype, without a look at the largest
        return torch.linalg.vector_norm(v, dim=-1, dtype=torch.float64).to(v.dtype)
    largest = v.abs().amax(dim=-1)
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    return unit * torch.linalg.vector_norm(v / unit[..., None], dim=-1)


def dense_by_products(matvec: Product, b: Tensor) -> Tensor:
    """The matrix of a product, column by column, for one system."""
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    columns: Tensor = torch.func.vmap(matvec, chunk_size=128)(eye)
    return columns.mT


def batched_preconditioner(
    preconditioner: Callable[[Any], Any] | Solver | None, system: LinearSystem, matvec: Counted
) -> Product | None:
    """A preconditioner on pytrees as one on flat vectors, mapped over the tasks."""
    if preconditioner is None:
        return None
    if isinstance(preconditioner, Solver):
        return preconditioner.as_preconditioner(matvec, system.b)
    tree, layout = system.tree, system.layout

    def one(v: Tensor) -> Tensor:
        answer = preconditioner(tree.rebuild(layout.split(v)))
        return layout.flatten(tree.match("preconditioner(v)", answer))

    mapped = one
    for _ in system.b.shape[:-1]:
        mapped = torch.func.vmap(mapped)
    return mapped


def check_symmetry(solver: Solver, symmetric: bool | None) -> None:
    """Refuse a solver that needs symmetry where the matrix is known to lack it."""
    if solver.needs_symmetry and symmetric is False:
        raise UnsupportedOperation(
            f"{type(solver).__name__} needs a symmetric matrix, and this condition's is not. Use "
            "GMRES() or Exact(), or declare symmetric=True on the condition where it holds."
        )


def at_least(name: str, value: float | None, bound: float) -> None:
    """Raise ValueError unless the field is None or at least the bound."""
    if value is not None and not value >= bound:
        raise ValueError(f"{name} must be at least {bound}; got {value!r}.")


def finite(name: str, value: float) -> None:
    """Raise ValueError unless the field is a finite number."""
    if not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number; got {value!r}.")
