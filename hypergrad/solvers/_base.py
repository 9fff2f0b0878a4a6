"""The base of all linear solvers, and how a method of one's own is written."""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._autograd.refusals import refuse_derivatives
from .._autograd.trace import versions
from .._errors import UnsupportedOperation
from .._info import SolveInfo, Status
from .._mistakes import Fields
from .._pytrees import Layout, Tree, refuse_meta
from ._recycle import refuse_recycling
from ._system import Counted, LinearSystem, Solution, Units, graded
from ._vectors import Product, dense_by_products, norm
from ._watch import watching


class Solver(Fields, ABC):
    """A method for ``(A + damping I) x = b``, as a value: frozen, printable and shareable.

    A method of one's own is a frozen dataclass derived from it that defines `run`, which gets a
    `LinearSystem` and returns a `Solution`; that may hold `x` alone. It works wherever a solver is
    asked for, under ``torch.func.vmap`` and in second derivatives too, if it treats the last
    dimension of its vectors as the system and all others as tasks. A field `damping` means that
    ``A + damping I`` is solved, which `run` sees to itself; a field `rtol` is the tolerance that a
    residual is judged by, and None or no such field one that the dtype can reach.

    Attributes
    ----------
    needs_symmetry : bool
        Class variable: whether A must be symmetric. False by default, like those that follow.
    needs_transpose : bool
        Class variable: whether products with the transpose are needed, `rmatvec`, where A is not
        symmetric.
    takes_rectangles : bool
        Class variable: whether A may have more rows than columns, or fewer.

    Examples
    --------
    Richardson's iteration:

    >>> import dataclasses, torch, hypergrad
    >>> from hypergrad.solvers import LinearSystem, Solution, Solver
    >>> @dataclasses.dataclass(frozen=True)
    ... class Richardson(Solver):
    ...     step_size: float
    ...     steps: int = 100
    ...
    ...     def run(self, system: LinearSystem) -> Solution:
    ...         x = torch.zeros_like(system.b)
    ...         for _ in range(self.steps):
    ...             x = x + self.step_size * (system.b - system.matvec(x))
    ...         return Solution(x)
    >>> x, info = Richardson(step_size=0.4).solve(lambda v: 2.0 * v, torch.ones(3))
    >>> x, info.success, int(info.matvecs)
    (tensor([0.5000, 0.5000, 0.5000]), tensor(True), 101)
    >>> inner = lambda params, target: ((params - target) ** 2).sum()
    >>> outer = lambda params, target: params.sum()
    >>> target = torch.tensor([1.0, 2.0])
    >>> hypergrad.implicit_grad(outer, inner, target, target, solver=Richardson(0.4))
    tensor([1., 1.])
    """

    needs_symmetry: ClassVar[bool] = False
    needs_transpose: ClassVar[bool] = False
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
        refuse_recycling(self)
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
                    value = product(domain.rebuild(split.split(v)))
                if open_ and not there and not _alike(value, image):
                    raise _Rectangular(value)
                return join.flatten([t.detach() for t in image.match(f"{name}(v)", value)])

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
                solution = self.solve_flat(system)
        except RuntimeError:
            refuse_meta(tree)
            raise
        leaves = refuse_derivatives(layout.split(solution.x), of_b.variables, _not_differentiable)
        x = tree.rebuild(leaves)
        return x, info_of(solution, solution=x, eigenvalues=solution.eigenvalues)

    def solve_flat(self, system: LinearSystem) -> Solution:
        """Run, and measure what `run` leaves out.

        Parameters
        ----------
        system : LinearSystem
            What is solved.

        Returns
        -------
        solution : Solution
            That of `run`, judged.

        Raises
        ------
        TypeError
            If `run` returns anything else.
        UnsupportedOperation
            If it changes the right-hand side in place.
        """
        products = Counted(system.matvec, 0.0, system.rmatvec)
        rmatvec = None if system.rmatvec is None else products.transposed
        before = versions([system.b])
        with watching(self, products, system.looks) as watch:
            own = dataclasses.replace(system, matvec=products, rmatvec=rmatvec, watch=watch)
            solution = self.run(own)
        self._check(system, solution)
        if versions([system.b]) != before:
            raise UnsupportedOperation(
                f"{type(self).__name__}.run changes system.b in place. Work on system.b.clone()."
            )
        solution.method = solution.method or type(self).__name__
        if not solution.unsaid.isdisjoint(("residual_norm", "status")):
            self._judge(system, products, solution)
        solution.matvecs = solution.matvecs or products.count
        return solution

    def _check(self, system: LinearSystem, solution: Solution) -> None:
        """Refuse what is no solution of a system.

        Raises
        ------
        TypeError
            If it is no `Solution`, or its x has another dtype or shape than the system asks for.
        """
        name, b = f"{type(self).__name__}.run", system.b
        if not isinstance(solution, Solution):
            raise TypeError(
                f"{name} must return a hypergrad.solvers.Solution, such as Solution(x); it "
                f"returned {type(solution).__name__}."
            )
        shape = (*b.shape[:-1], system.layout.n)
        if tuple(solution.x.shape) != shape or solution.x.dtype != b.dtype:
            raise TypeError(
                f"{name} must return x of shape {shape} and dtype {b.dtype}, as system.b asks for; "
                f"it returned {tuple(solution.x.shape)} and {solution.x.dtype}."
            )

    def _judge(self, system: LinearSystem, products: Counted, solution: Solution) -> None:
        """Measure the residual where it is not known, and take the status from it."""
        units, unsaid, status = Units(system.b), solution.unsaid, solution.status
        size, precision = solution.residual_norm, system.layout.precision
        if "residual_norm" in unsaid:
            if solution.residual is None:
                products.damping = getattr(self, "damping", 0.0)
                solution.residual = system.b - products(solution.x)
            size = norm(solution.residual / units.unit)
        if "status" in unsaid:
            rtol, atol = getattr(self, "rtol", None), getattr(self, "atol", 0.0)
            met = size <= units.tolerance(rtol, atol, precision)
            lost = ~torch.isfinite(size)
            ends = {Status.CONVERGED: met, Status.NOT_FINITE: lost}
            status = graded(ends, Status.MAX_ITERATIONS)
        solution.x, solution.status, solution.residual_norm = units.settled(
            solution.x, status, size
        )
        if "success" in unsaid:
            solution.success = solution.status == Status.CONVERGED

    @abstractmethod
    def run(self, system: LinearSystem) -> Solution:
        """Solve a flat system.

        Parameters
        ----------
        system : LinearSystem
            The system. Gradients are off. `LinearSystem` describes its fields.

        Returns
        -------
        solution : Solution
            Its x, shaped like ``system.b`` (for a system that is not square, ``(*tasks, n)`` with
            ``n = system.layout.n``), and as much evidence as the method has.
        """

    def as_preconditioner(self, matvec: Counted, b: Tensor) -> Product:
        """Make an approximate inverse for another method, on flat vectors.

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
    """An image under the transpose that is not shaped like the right-hand side."""

    def __init__(self, image: Any) -> None:
        super().__init__("rmatvec(v) is not shaped like b.")
        self.image = image


def _alike(value: Any, tree: Tree) -> bool:
    """Say whether a pytree has the structure of another, and its tensors the same shapes."""
    other = Tree("rmatvec(v)", value)
    return other.spec == tree.spec and [t.shape for t in other.variables] == [
        t.shape for t in tree.variables
    ]


def _not_differentiable() -> Exception:
    return UnsupportedOperation(
        "The answer of solver.solve is detached: its derivative would go through the iterations. "
        "Use custom_root or root_vjp with F(x, b) = A x - b."
    )


# The figures that a solve by itself does not know.
_OF_EVIDENCE = (
    "inner_residual", "outer_error", "error_estimate", "product_error", "degeneracy",
    "outer_value", "eigenvalues",
)  # fmt: skip


def info_of(solved: Solution, *, solution: Any, **evidence: Any) -> SolveInfo:
    """Make the `SolveInfo` of a flat solution; figures that are left out are NaN."""
    nan = torch.full_like(solved.residual_norm, math.nan)
    figures = {"success": solved.success, **dict.fromkeys(_OF_EVIDENCE, nan)}
    return SolveInfo(
        status=solved.status,
        iterations=solved.iterations,
        matvecs=_counted(solved),
        residual_norm=solved.residual_norm,
        negative_curvature=solved.negative_curvature,
        solution=solution,
        method=solved.method,
        **{**figures, **evidence},
    )


def _counted(solved: Solution) -> Tensor:
    """Give the products of a solution, as a tensor like its other figures."""
    made = solved.matvecs  # of a solve that a compiled program leaves as it is, a tensor
    return made if isinstance(made, Tensor) else torch.full_like(solved.iterations, made)


def mapped_by_caller(solver: Solver) -> bool:
    """Say whether a solver calls a function of the caller's, which may reach batched tensors."""
    preconditioner = getattr(solver, "preconditioner", None)
    return preconditioner is not None and not isinstance(preconditioner, Solver)


def check_symmetry(solver: Solver, symmetric: bool | None) -> None:
    """Refuse a solver that needs symmetry where the matrix is known to lack it."""
    if solver.needs_symmetry and symmetric is False:
        raise UnsupportedOperation(
            f"{type(solver).__name__} needs a symmetric matrix, and this condition's is not. Use "
            "GMRES() or Exact(), or declare symmetric=True on the condition where it holds."
        )
