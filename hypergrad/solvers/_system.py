"""A linear system and its solution on flat vectors, and the units in which one is solved.

Vectors have shape ``(*tasks, n)``. Every task is a system of its own, with its own status; a task
that has stopped is frozen while the others go on.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .._autograd.host import any_task
from .._info import Status
from .._pytrees import Layout, Tree
from ._fields import tolerance
from ._recycle import Memory
from ._vectors import Product, norm
from ._watch import Watch


@dataclasses.dataclass
class LinearSystem:
    """The system ``A x = b`` that `Solver.run` gets, on flat vectors ``(*tasks, n)``.

    Task dimensions stand in front, none or several: a solver works on the last dimension, and
    broadcasts over the rest. `b` may have one axis more in front of those of the tasks, for
    right-hand sides with one matrix in common, and a product takes vectors shaped like `b`.
    All tensors are detached, and gradients are off. Where `implicit_grad` or a
    decorated solver is mapped by ``torch.func.vmap``, the axis is a task dimension and the tensors
    are plain. Where `Solver.solve` itself is mapped they are batched: `goes_on` knows of it, an
    ``if`` of one's own does not.

    Attributes
    ----------
    matvec, rmatvec : callable
        Products with A and, where known, with its transpose. They hold no damping.
    b : Tensor
        The right-hand side. Its dtype is that of all vectors, never narrower than float32.
    x0 : Tensor, optional
        Where an iteration starts.
    symmetric : bool, optional
        Whether A is known to be symmetric; None: the caller did not say.
    dense : callable, optional
        A as a matrix, ``(*tasks, n, n)`` or with fewer task dimensions where tasks share it.
    layout, tree : Layout, Tree
        How a vector becomes a pytree, ``tree.rebuild(layout.split(v))``. ``layout.precision`` is
        the dtype to which products are rounded, which may be narrower than that of `b`.
    looks : bool
        Whether the host may look at values between iterations. Where it is false, `run` must read
        no value of a tensor: no ``.item()``, no tensor as the condition of an ``if``.
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
    noise : Tensor or float
        The relative error of a product beside its rounding, for each task, as products by
        differences have one; zero: there is none. No curvature below it is a verdict, and no
        residual below it is asked for unless by an `rtol`.
    steady : bool
        Whether a product is the same each time but for rounding, as those of one recorded graph
        are. Then a residual by recursion counts as the true one where rounding is far below it.
    goal : Tensor, optional
        At which norm of the residual each task is solved, in the place of the solver's tolerances.
    memory : Memory, optional
        What the loop around keeps of the system from step to step.
    watch : Watch, optional
        ``watch.tell(size)`` after an iteration, with the relative residual norms, tells the
        `callback` of a solver that has one.

    Examples
    --------
    >>> import dataclasses, torch, hypergrad
    >>> from hypergrad.solvers import LinearSystem, Solution, Solver
    >>> @dataclasses.dataclass(frozen=True)
    ... class Direct(Solver):
    ...     def run(self, system: LinearSystem) -> Solution:
    ...         return Solution(torch.linalg.solve(system.dense(), system.b[..., None])[..., 0])
    >>> inner = lambda w, t: ((w - t) ** 2).sum()
    >>> one = torch.ones(2)
    >>> hypergrad.implicit_grad(lambda w, t: w.sum(), inner, one, one.clone(), solver=Direct())
    tensor([1., 1.])
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
    watch: Watch | None = None
    noise: Tensor | float = 0.0
    steady: bool = False
    goal: Tensor | None = None
    memory: Memory | None = None

    @property
    def noisy(self) -> bool:
        """Whether products have errors beside rounding."""
        return isinstance(self.noise, Tensor)

    def goes_on(self, active: Tensor) -> bool:
        """Say whether an iteration goes on: where the host may not look, it always does.

        Parameters
        ----------
        active : Tensor
            bool, for each task: whether it is unsolved.

        Returns
        -------
        on : bool
            Whether any task is left, as far as the host may know. It reads one value.
        """
        return not self.looks or any_task(active)


class Counted:
    """Products with ``A + damping I`` and its transpose that count how often they are formed."""

    def __init__(self, matvec: Product, damping: float, rmatvec: Product | None = None) -> None:
        self.matvec, self.rmatvec, self.damping, self.count = matvec, rmatvec, damping, 0

    def __call__(self, v: Tensor) -> Tensor:
        """Form one product."""
        self.count += 1
        image = self.matvec(v)
        return image if self.damping == 0 else torch.add(image, v, alpha=self.damping)

    def transposed(self, v: Tensor) -> Tensor:
        """Form one product with the transpose."""
        assert self.rmatvec is not None
        self.count += 1
        image = self.rmatvec(v)
        return image if self.damping == 0 else torch.add(image, v, alpha=self.damping)


@dataclasses.dataclass
class NewtonStep:
    """The step ``A^-1 F`` for the inner condition F, as far as a method knows it.

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
class Probe:
    """One product with a vector in general position, which shows the size of every row.

    Attributes
    ----------
    rows : Tensor
        About the size of the rows of the matrix, ``(*tasks, n)``.
    hides : Tensor
        bool, for each task: the residual is small in units that hide a large error.
    """

    rows: Tensor
    hides: Tensor


#: The largest residual that noise excuses.
MOST_NOISE = 0.1
_UNSAID = torch.empty(0, device="cpu")  # stands for a figure that a method leaves out


@dataclasses.dataclass
class Solution:
    """A flat solution and its evidence; `x` is enough, and every figure has the tasks' shape.

    A figure that is left out gets a value that nothing contradicts, and `Solver.solve_flat`, by
    which the library calls a solver, puts a measured one in its place: the residual by one product,
    the status and the success by the residual. Figures that cost something are functions, called
    by who wants to know.

    Attributes
    ----------
    x : Tensor
        The solution, shaped like the right-hand side.
    status : Tensor
        int64, a `Status` for each task. Left out: CONVERGED where the residual is within the
        tolerance, else MAX_ITERATIONS.
    success : Tensor
        bool. Left out: where the status is CONVERGED.
    iterations : Tensor
        int64. Left out: zero.
    matvecs : int
        The products that were made. Left out: as many as were counted.
    residual_norm : Tensor
        ``||b - (A + damping I) x|| / ||b||``. Left out: measured.
    negative_curvature : Tensor
        bool. Left out: false.
    method : str
        Left out: the name of the solver's class.
    spectrum : callable, optional
        The lowest and the highest Ritz value, ``(*tasks, 2)``.
    condition_number : callable, optional
        That of A as far as the method has seen it: a lower bound.
    residual : Tensor, optional
        ``b - (A + damping I) x``.
    null : Tensor, optional
        A vector ``(*tasks, n)`` in the null space of A, in general position; zero for the tasks
        of full rank. None: none was seen.
    linear_error : Tensor, optional
        The relative error of `x`, from the residual, the rounding and the inverse that was seen.
        Like what follows, it is there where the system came with a condition F, and the method
        knows it.
    newton : NewtonStep, optional
        The way from the inner solution to the parameters.
    metric : Tensor, optional
        What entries of the inner variables are multiplied by before a length is taken of them,
        ``(*tasks, n)``; None: one.
    further : callable, optional
        ``v -> A^-1 v`` for further right-hand sides.
    probe : Probe, optional
        What a product with a vector in general position has shown.
    inverse : Tensor, optional
        About how long ``A^-1 r`` is for a residual of length one, for each task.

    Examples
    --------
    >>> import torch
    >>> from hypergrad.solvers import Solution
    >>> Solution(torch.tensor([1.0, 2.0])).success
    tensor(True)
    """

    x: Tensor
    status: Tensor = _UNSAID
    success: Tensor = _UNSAID
    iterations: Tensor = _UNSAID
    matvecs: Any = 0
    residual_norm: Tensor = _UNSAID
    negative_curvature: Tensor = _UNSAID
    method: str = ""
    spectrum: Callable[[], Tensor] | None = None
    condition_number: Callable[[], Tensor] | None = None
    residual: Tensor | None = None
    null: Tensor | None = None
    linear_error: Tensor | None = None
    newton: NewtonStep | None = None
    metric: Tensor | None = None
    further: Callable[[Tensor], Tensor] | None = None
    probe: Probe | None = None
    inverse: Tensor | None = None

    #: The figures that were left out.
    unsaid: frozenset[str] = dataclasses.field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Give a value to each figure that was left out."""
        if not isinstance(self.x, Tensor):
            raise TypeError(f"A Solution holds a tensor x; got {type(self.x).__name__}.")
        figures = ("status", "success", "residual_norm", "iterations", "negative_curvature")
        for name in figures:  # one number stands for all tasks
            if not isinstance(value := getattr(self, name), Tensor):
                setattr(self, name, torch.full(self.x.shape[:-1], value, device=self.x.device))
        self.unsaid = frozenset(name for name in figures if getattr(self, name) is _UNSAID)
        if self.residual_norm is _UNSAID:
            self.residual_norm = self.x.new_full(self.x.shape[:-1], math.nan)
        if self.status is _UNSAID:
            sound = torch.isfinite(norm(self.x))
            self.status = graded({Status.CONVERGED: sound}, Status.NOT_FINITE)
        if self.success is _UNSAID:
            self.success = self.status == Status.CONVERGED
        if self.iterations is _UNSAID:
            self.iterations = torch.zeros_like(self.status)
        if self.negative_curvature is _UNSAID:
            self.negative_curvature = torch.zeros_like(self.success)

    @functools.cached_property
    def eigenvalues(self) -> Tensor:
        """The lowest and the highest Ritz value, ``(*tasks, 2)``; NaN: not known."""
        if self.spectrum is None:
            return self.x.new_full((*self.residual_norm.shape, 2), math.nan)
        return self.spectrum()


def graded(ends: Mapping[Status, Tensor], otherwise: Tensor | Status = Status.CONVERGED) -> Tensor:
    """Say how the run of each task ended: where several ends hold, the last one counts.

    Parameters
    ----------
    ends : mapping of Status to Tensor
        bool, for each task: whether it ended so.
    otherwise : Tensor or Status
        How it ended where none of them holds.

    Returns
    -------
    status : Tensor
        int64, a `Status` for each task.
    """
    status: Tensor | int = otherwise if isinstance(otherwise, Tensor) else int(otherwise)
    for end, holds in ends.items():
        status = torch.where(holds, int(end), status)
    assert isinstance(status, Tensor)
    return status


class Units:
    """The units of a solve, in which the right-hand side of each task has norm one.

    So neither a tiny nor a huge one loses accuracy. A task whose right-hand side is zero or not
    finite is set aside, and gets its solution at the end.

    Parameters
    ----------
    b : Tensor
        The right-hand side, in the caller's units.

    Attributes
    ----------
    scale : Tensor
        Its norm, for each task.
    present : Tensor
        bool, for each task: there is something to solve.
    unit : Tensor
        ``(*tasks, 1)``: the norm, and one for a task that is set aside.
    b : Tensor
        The right-hand side in these units.
    """

    def __init__(self, b: Tensor) -> None:
        self.scale = norm(b)
        self.present = (self.scale > 0) & torch.isfinite(self.scale)
        self.unit = torch.where(self.present, self.scale, torch.ones_like(self.scale))[..., None]
        self.b = b / self.unit

    def tolerance(
        self, rtol: float | None, atol: float, precision: torch.dtype, noise: Tensor | float = 0.0
    ) -> Tensor:
        """Say at which residual norm, in these units, each task is solved."""
        tol = (atol / self.unit[..., 0]).clamp(min=tolerance(rtol, precision))
        if rtol is None and isinstance(noise, Tensor):
            tol = torch.maximum(tol, noise.to(tol).clamp(max=MOST_NOISE))
        return tol

    def start(self, x0: Tensor) -> Tensor:
        """Take where an iteration starts into these units; a task set aside starts at zero."""
        return torch.where(self.present[..., None], x0.to(self.b.dtype) / self.unit, 0.0)

    def settled(self, x: Tensor, status: Tensor, size: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Give the tasks set aside their solution, zero or NaN, and NaN to what is not finite.

        Parameters
        ----------
        x, status, size : Tensor
            The solution in the caller's units, its status, and the relative norm of its residual.

        Returns
        -------
        x, status, size : Tensor
            The same.
        """
        zero, lost = self.scale == 0, ~torch.isfinite(self.scale)
        status = graded({Status.NOT_FINITE: lost, Status.CONVERGED: zero}, status)
        lost = status == Status.NOT_FINITE
        x = torch.where(zero[..., None], 0.0, torch.where(lost[..., None], math.nan, x))
        return x, status, torch.where(zero, 0.0, torch.where(lost, math.nan, size))
