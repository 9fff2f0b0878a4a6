"""What all linear solvers share: the system, the meaning of their fields, and the evidence.

A solver works on flat vectors of shape ``(*tasks, n)``. Every task is a system of its own, with
its own status; a task that has stopped is frozen while the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from .._autograd.refusals import refuse_derivatives
from .._autograd.rows import by_rows
from .._autograd.transforms import is_wrapped
from .._errors import UnsupportedOperation
from .._info import SolveInfo
from .._mistakes import Fields
from .._pytrees import Layout, Tree, refuse_meta

if TYPE_CHECKING:
    from ._units import Probe

Product = Callable[[Tensor], Tensor]

# What ``rtol=None`` means, by the dtype in which products are formed.
_REACHABLE = {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}

# Norms between these are right to rounding, though their squares are summed in the dtype.
_SAFE = {torch.float64: (1e-140, 1e140), torch.float32: (1e-15, 1e15)}


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
        The inner condition F at the parameters, where the inner Newton step is of interest.
    explores : bool
        Whether an iteration that ends soon goes on from a little off its answer, in general
        position, so that it also meets what the right-hand side does not reach: a saddle, where
        that is symmetric.
    transposed : bool
        Whether the matrix is the transpose of the condition's, whose Newton step is asked for.
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
    explores: bool = False
    transposed: bool = False
    shared: int = 1


@dataclasses.dataclass
class NewtonStep:
    """``A^-1 F`` for the inner condition F, as far as a method knows it.

    Attributes
    ----------
    step : Tensor
        ``(*tasks, n)``.
    left : Tensor
        ``F - A step``.
    beyond : Tensor
        About how long ``A^-1 left`` is.
    again : callable, optional
        ``v -> A^-1 v``.
    """

    step: Tensor
    left: Tensor
    beyond: Tensor
    again: Callable[[Tensor], Tensor] | None = None


@dataclasses.dataclass
class Solution:
    """A flat answer and its evidence; every figure has the tasks' shape.

    What costs something is a function, called by who wants to know. `linear_error` and what
    follows it are there where the system came with a condition F, and the method knows them.

    Attributes
    ----------
    spectrum : callable, optional
        The lowest and the highest Ritz value, ``(*tasks, 2)``.
    condition_number : callable, optional
        That of A as far as the method has seen it: a lower bound.
    residual : Tensor, optional
        ``b - A x``.
    null : Tensor, optional
        A vector ``(*tasks, n)`` in the null space of A, in general position; zero for the tasks
        of full rank. None: none was seen.
    linear_error : Tensor, optional
        The relative error of `x`, from the residual, the rounding and the inverse that was seen.
    newton : NewtonStep, optional
        The way from the inner solution to the parameters.
    metric : Tensor, optional
        What entries of the inner variables are multiplied by before a length is taken of them,
        ``(*tasks, n)``; None: one.
    further : callable, optional
        ``v -> A^-1 v`` for further right-hand sides.
    probe : Probe, optional
        What a product with a vector in general position has shown.
    """

    x: Tensor
    status: Tensor
    success: Tensor
    iterations: Tensor
    matvecs: int
    residual_norm: Tensor
    negative_curvature: Tensor
    method: str
    spectrum: Callable[[], Tensor] | None = None
    condition_number: Callable[[], Tensor] | None = None
    residual: Tensor | None = None
    null: Tensor | None = None
    linear_error: Tensor | None = None
    newton: NewtonStep | None = None
    metric: Tensor | None = None
    further: Callable[[Tensor], Tensor] | None = None
    probe: Probe | None = None

    @functools.cached_property
    def eigenvalues(self) -> Tensor:
        """The lowest and the highest Ritz value, ``(*tasks, 2)``; NaN: not known."""
        if self.spectrum is None:
            return self.x.new_full((*self.residual_norm.shape, 2), math.nan)
        return self.spectrum()


class Solver(Fields, ABC):
    """A method for ``(A + damping I) x = b``, as a value: frozen, printable and shareable."""

    needs_symmetry: ClassVar[bool] = False
    #: Whether products with the transpose are needed: `rmatvec`, where A is not symmetric.
    needs_transpose: ClassVar[bool] = False
    #: Whether A may have more rows than columns, or fewer.
    takes_rectangles: ClassVar[bool] = False

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
            ``v -> A v``, from pytrees shaped like x to such as are shaped like `b`.
        b : pytree of Tensor
            The right-hand side.
        x0 : pytree of Tensor, optional
            Where an iteration starts; zeros by default. Direct methods have no use for it.
        rmatvec : callable, optional
            ``v -> A^T v``, for methods that need the transpose.

        Returns
        -------
        x : pytree of Tensor
            The answer, shaped like `b`. With `LSMR` and `NormalCG` the system may be rectangular:
            x is then shaped like `x0` or, where that is None, like the first ``rmatvec(v)``; like
            `b` where no product is made, since `b` is 0 or below `atol`.
        info : SolveInfo
            Its evidence. Nothing is raised or warned of here: look at ``info.success``. Both are
            detached; the decorators and `root_vjp` have the derivative of a solution.

        Raises
        ------
        RuntimeError
            Whatever a product raises.
        """
        of_b = Tree("b", b)
        if x0 is not None and self.takes_rectangles:
            return self._solved(matvec, of_b, Tree("x0", x0), x0, rmatvec)
        try:
            return self._solved(matvec, of_b, of_b, x0, rmatvec)
        except _Rectangular as seen:
            x, info = self._solved(matvec, of_b, Tree("rmatvec(b)", seen.image), x0, rmatvec)
            return x, dataclasses.replace(info, matvecs=info.matvecs + 1)

    def _solved(
        self,
        matvec: Callable[[Any], Any],
        of_b: Tree,
        tree: Tree,
        x0: Any,
        rmatvec: Callable[[Any], Any] | None,
    ) -> tuple[Any, SolveInfo]:
        """Solve a system whose unknown is shaped like a tree.

        Returns
        -------
        x : pytree of Tensor
            The answer.
        info : SolveInfo
            Its evidence.

        Raises
        ------
        _Rectangular
            If a square system was meant to be one, and the transpose says that it is none.
        RuntimeError
            Whatever a product raises.
        """
        open_ = self.takes_rectangles and x0 is None and tree is of_b
        rows, layout = Layout(of_b, of_b.variables), Layout(tree, tree.variables)

        def flat(product: Callable[[Any], Any], name: str, there: bool) -> Product:
            domain, image = (tree, of_b) if there else (of_b, tree)
            split, join = (layout, rows) if there else (rows, layout)

            def form(v: Tensor) -> Tensor:
                with torch.enable_grad():  # it may take derivatives itself
                    found = product(domain.rebuild(split.split(v)))
                if open_ and not there and not _alike(found, image):
                    raise _Rectangular(found)
                return join.flatten([t.detach() for t in image.match(f"{name}(v)", found)])

            return form

        system = LinearSystem(
            matvec=flat(matvec, "matvec", True),
            b=rows.flatten(of_b.variables).detach(),
            layout=layout,
            tree=tree,
            x0=None if x0 is None else layout.flatten(tree.match("x0", x0)).detach(),
            rmatvec=None if rmatvec is None else flat(rmatvec, "rmatvec", False),
        )
        system.dense = lambda: dense_by_products(system.matvec, system.b)
        try:
            with torch.no_grad():
                found = self.run(system)
        except RuntimeError:
            refuse_meta(tree)
            raise
        parts = refuse_derivatives(layout.split(found.x), of_b.variables, _not_differentiable)
        x = tree.rebuild(parts)
        return x, info_of(found, solution=x, eigenvalues=found.eigenvalues)

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


class _Rectangular(Exception):
    """What a product with the transpose returned, where that is not shaped like the right side."""

    def __init__(self, image: Any) -> None:
        super().__init__("rmatvec(v) is not shaped like b.")
        self.image = image


def _alike(value: Any, tree: Tree) -> bool:
    """Whether a pytree has the structure of another, and its tensors the same shapes."""
    other = Tree("rmatvec(v)", value)
    return other.spec == tree.spec and [t.shape for t in other.variables] == [
        t.shape for t in tree.variables
    ]


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
        "eigenvalues": nan,
    }
    return SolveInfo(
        status=found.status,
        iterations=found.iterations,
        matvecs=torch.full_like(found.iterations, found.matvecs),
        residual_norm=found.residual_norm,
        negative_curvature=found.negative_curvature,
        solution=solution,
        method=found.method,
        **{**figures, **evidence},
    )


class Counted:
    """Products with ``A + damping I`` and its transpose that count how often they are formed."""

    def __init__(self, matvec: Product, damping: float, rmatvec: Product | None = None) -> None:
        self.matvec, self.rmatvec, self.damping, self.count = matvec, rmatvec, damping, 0

    def __call__(self, v: Tensor) -> Tensor:
        """Form one product."""
        self.count += 1
        found = self.matvec(v)
        return found if self.damping == 0 else torch.add(found, v, alpha=self.damping)

    def transposed(self, v: Tensor) -> Tensor:
        """Form one product with the transpose."""
        assert self.rmatvec is not None
        self.count += 1
        found = self.rmatvec(v)
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
    if v.dtype in _SAFE and v.device.type == "cpu" and not is_wrapped(v):
        # Several times as fast, and right where no square leaves the range of the dtype.
        found = torch.linalg.vector_norm(v, dim=-1)
        low, high = _SAFE[v.dtype]
        if found.ndim == 0:
            safe = low < found.item() < high
        else:
            safe = bool(((found > low) & (found < high)).all())
        if safe:
            return found
    if v.dtype != torch.float64:  # squares fit into the wider dtype, without a look at the largest
        return torch.linalg.vector_norm(v, dim=-1, dtype=torch.float64).to(v.dtype)
    largest = v.abs().amax(dim=-1)
    unit = torch.where((largest > 0) & torch.isfinite(largest), largest, torch.ones_like(largest))
    return unit * torch.linalg.vector_norm(v / unit[..., None], dim=-1)


def dense_by_products(matvec: Product, b: Tensor) -> Tensor:
    """The matrix of a product, column by column, for one system."""
    eye = torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)
    columns: Tensor = by_rows(matvec, eye)
    return columns.mT


def mapped_by_caller(solver: Solver) -> bool:
    """Whether a solver calls a function of the caller's, which may close over batched tensors."""
    preconditioner = getattr(solver, "preconditioner", None)
    return preconditioner is not None and not isinstance(preconditioner, Solver)


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
