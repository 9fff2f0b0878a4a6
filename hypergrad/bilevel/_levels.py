"""The two levels of a problem: their variables, their derivatives and their moves."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.captured import refuse_one_level_reduced
from .._errors import NotConnected, NotFinite, UnsupportedOperation
from .._implicit.task_norms import finite
from .._mistakes import refuse_signatures, takes
from .._warnings import OnFailure
from ..conditions._base import Condition, as_condition
from ..conditions._gauss_newton import GaussNewton
from ..conditions._inner_problem import Problem
from ..conditions._minimum import Minimum
from ..solvers._fields import at_least
from ..solvers._recycle import Memory
from ..solvers._vectors import norm
from ._batches import Batch, Batches, Source
from ._derivatives import At, Derivatives, Leaves, Products
from ._method import State
from ._optimisers import Optimiser, move, take
from ._step_info import StepInfo

_TASKS = re.compile(r"^(\d+|more than 3) of \d+ tasks: ")


class Levels:
    """The two levels of a problem as a `Method` sees them; `Bilevel` makes it.

    In formulas F is the inner condition, for an objective its gradient by the parameters, and A is
    the derivative of F by the parameters. A vector shaped like the parameters is flat, ``(n,)``.
    One shaped like the hyperparameters is a list of tensors, one for each. Everything that is
    returned is detached.

    Attributes
    ----------
    state : dict
        What the method remembers, for `Method.step` to read and to write.
    steps : int
        How many outer steps have been made.
    params, hparams : object
        The two levels; ``params.variables`` and ``hparams.variables`` are the tensors that move.
    inner_optimizer, outer_optimizer : torch.optim.Optimizer
        What moves them.
    derivatives : object
        What evaluates and differentiates the losses.
    condition : condition
        The inner problem; ``condition.symmetric`` says whether A is known to be symmetric.
    passed : tuple
        The batches that `Bilevel.step` was called with, inner and outer; None where there is none.
    on_failure : {"warn", "raise", "ignore"}
        What to do where a hypergradient may be wrong.

    Notes
    -----
    Batches
        `inner_batch` and `outer_batch` draw one, or hand on the one that the step was called with.
        A batch is nothing to look into: it is passed to a derivative. `inner_on` and `outer_on`
        are the two functions on a batch, with the arguments ``(params, hparams)``, and `now` the
        variables to call them with.
    Derivatives, at the variables as they are or at tensors that are passed in their places
        `outer_slopes`, `product`, `cross`, and `products`, which gives F and both products from
        one evaluation; `inner_gradient` and `inner_slopes` of first order. `derivatives` forms
        them all.
    Moves
        `inner_step`, `inner_steps`, `move_inner`, `move_outer`, and `outer_step`, which looks,
        moves and records.
    Shapes
        `zeros` is flat; `size` is the norm of F; `shaped` makes a pytree like the hyperparameters.
    Records
        `record`, and `require_finite`, which raises before anything is moved.

    Examples
    --------
    >>> import dataclasses, torch, hypergrad
    >>> from hypergrad.bilevel import Levels, Method
    >>> @dataclasses.dataclass(frozen=True)
    ... class Look(Method):
    ...     def step(self, levels: Levels):
    ...         value, by_params, direct = levels.outer_slopes(levels.outer_batch())
    ...         print(levels.steps, by_params, levels.product(levels.inner_batch(), by_params))
    ...         return levels.record(direct, value, levels.zeros())
    >>> loop = hypergrad.Bilevel(
    ...     lambda w, t: (w * t).sum(), lambda w, t: (w**2).sum(),
    ...     torch.zeros(2), torch.ones(2),
    ...     inner_optimizer=lambda v: torch.optim.SGD(v, lr=0.1),
    ...     outer_optimizer=lambda v: torch.optim.SGD(v, lr=0.1),
    ...     method=Look(),
    ... )
    >>> loop.step().step
    0 tensor([1., 1.]) tensor([2., 2.])
    1
    """

    def __init__(
        self,
        outer: Callable[..., Any],
        inner: Any,
        params: Any,
        hparams: Any,
        optimizers: tuple[Optimiser, Optimiser],
        batches: tuple[Source, Source],
        on_failure: OnFailure,
        generator: torch.Generator,
        hparams_projection: Callable[[Any], Any] | None = None,
    ) -> None:
        self.outer, self.condition = outer, as_condition(inner, Minimum)
        if getattr(self.condition, "batches", None) is not None:
            raise UnsupportedOperation(
                "Bilevel draws batches itself: pass inner_batches=..., and the condition without "
                "batches.",
                argument="inner",
            )
        refuse_one_level_reduced(self.condition.functions(), outer)
        names = self.condition.of_objective
        self.params, self.inner_optimizer = take("params", params, optimizers[0], True, names)
        self.hparams, self.outer_optimizer = take("hparams", hparams, optimizers[1], False, True)
        _refuse_shared(self)
        problem = Problem.of(self.condition, self.params, [self.hparams])
        self.derivatives = Derivatives(problem, outer)
        self.layout = self.derivatives.layout
        self.inner_batches = Batches("inner_batches", batches[0])
        self.outer_batches = Batches("outer_batches", batches[1])
        self.on_failure, self.generator = on_failure, generator
        self.hparams_projection = hparams_projection
        self.steps = 0
        self.state: State = {}
        self.memory = Memory()  # of the linear system
        self.passed: tuple[Batch | None, Batch | None] = (None, None)
        self.warned: dict[str, int] = {}
        self._heard: set[str] = set()  # in this step

    def _hear(self, text: str) -> bool:
        """Count a warning, and say whether it is the first of its kind in this run."""
        kind = re.split(r"[:.(]", _TASKS.sub("", text))[0].strip()
        if kind not in self._heard:
            self._heard.add(kind)
            self.warned[kind] = self.warned.get(kind, 0) + 1
            return self.warned[kind] == 1
        return False

    # --- batches -------------------------------------------------------------------------

    def inner_batch(self) -> Batch:
        """Draw the next batch of the inner problem."""
        return self.passed[0] or self.inner_batches.draw(self.generator)

    def outer_batch(self) -> Batch:
        """Draw the next batch of the outer problem."""
        return self.passed[1] or self.outer_batches.draw(self.generator)

    def refuse_passed(self, who: str) -> None:
        """Raise where the step was called with a batch, for a method that draws them itself.

        Parameters
        ----------
        who : str
            The method.

        Raises
        ------
        UnsupportedOperation
            If it was.
        """
        if any(self.passed):
            raise UnsupportedOperation(
                f"{who} comes back to its batches, and so draws them itself. Pass inner_batches "
                "and outer_batches to Bilevel, as sequences, and call step()."
            )

    def inner_on(self, batch: Batch) -> Condition:
        """Pose the inner problem on one batch, as a function of params and hparams."""
        return self.derivatives.inner_on(batch)

    def outer_on(self, batch: Batch) -> Callable[..., Any]:
        """Bind the outer loss to one batch, as a function of params and hparams."""
        return self.derivatives.outer_on(batch)

    def _refuse_signatures(self, error: TypeError) -> None:
        """Raise where a loss cannot be called with its arguments."""
        plain = ("params", "hparams")
        levels = (
            ("outer", self.outer, self.passed[1] is not None or self.outer_batches.there),
            ("inner", self.condition, self.passed[0] is not None or self.inner_batches.there),
        )
        missing = [
            f"{name}_batches=..."
            for name, value, there in levels
            if not there and not takes(name, value, plain) and takes(name, value, (*plain, "batch"))
        ]
        batches = (
            f"Where its last argument is a batch, pass {' and '.join(missing)} to Bilevel: a list "
            "of batches, or a DataLoader."
        )
        for name, value, there in levels:
            cure = batches if f"{name}_batches=..." in missing else None
            refuse_signatures(name, value, (*plain, "batch") if there else plain, error, cure)

    # --- derivatives ---------------------------------------------------------------------

    def inner_gradient(self, batch: Batch) -> tuple[Tensor, Leaves]:
        """Evaluate the inner condition, and a value for optimisers that ask for one.

        Parameters
        ----------
        batch : Batch
            On which.

        Returns
        -------
        value : Tensor
            The inner loss; half the squared norm where the condition is no minimum.
        gradient : list of Tensor
            The condition, which for a minimum is the gradient.
        """
        if not isinstance(self.condition, Minimum | GaussNewton):
            residual = self.derivatives.linearised(batch).residual
            return residual.square().sum() / 2, self.layout.split(residual)
        return self.derivatives.inner(batch, by_hparams=False)

    def size(self, condition: Tensor | Leaves) -> Tensor:
        """Measure the norm of the inner condition, flat or as it is returned by `inner_step`."""
        flat = condition if isinstance(condition, Tensor) else self.layout.flatten(condition)
        return norm(flat)

    def inner_slopes(self, batch: Batch, params: Sequence[Tensor] | None = None) -> Leaves:
        """Form the derivatives of the inner loss, by the inner and then the outer variables."""
        return self.derivatives.inner(batch, At(params), by_hparams=True)[1]

    def products(
        self,
        batch: Batch,
        u: Tensor,
        params: Sequence[Tensor] | None = None,
        hparams: Sequence[Tensor] | None = None,
    ) -> Products:
        """Form F, ``A^T u`` and ``(dF/dhparams)^T u`` on one batch, from one evaluation."""
        return self.derivatives.products(batch, u, At(params, hparams))

    def product(self, batch: Batch, u: Tensor) -> Tensor:
        """Form ``A^T u`` on one batch."""
        return self.derivatives.products(batch, u, cross=False).product

    def cross(
        self,
        batch: Batch,
        u: Tensor,
        params: Sequence[Tensor] | None = None,
        hparams: Sequence[Tensor] | None = None,
    ) -> Leaves:
        """Form ``(dF/dhparams)^T u`` on one batch."""
        return self.derivatives.products(batch, u, At(params, hparams), product=False).cross

    def outer_slopes(
        self,
        batch: Batch,
        params: Sequence[Tensor] | None = None,
        hparams: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, Tensor, Leaves]:
        """Evaluate the outer loss on one batch, with its gradients by params (flat) and hparams."""
        return self.derivatives.outer(batch, At(params, hparams))

    # --- moves ---------------------------------------------------------------------------

    def inner_step(
        self, batch: Batch, factor: float = 1.0, *, above: float | None = None
    ) -> tuple[Leaves, bool]:
        """Make one step of the inner optimiser, unless the condition's norm is below a bound.

        Parameters
        ----------
        batch : Batch
            Whose gradient is followed.
        factor : float
            What the learning rate is multiplied by.
        above : float, optional
            Make the step only if the norm is above this.

        Returns
        -------
        condition : list of Tensor
            Its value before the step.
        made : bool
            Whether the step was made.
        """
        value, condition = self.inner_gradient(batch)
        if above is not None and float(self.size(condition)) <= above:
            return condition, False
        known = [value]

        def closure() -> Tensor:
            if known:
                return known.pop()
            value, condition = self.inner_gradient(batch)
            for variable, leaf in zip(self.params.variables, condition, strict=True):
                variable.grad = leaf
            return value

        move(self.inner_optimizer, self.params.variables, condition, factor, closure)
        return condition, True

    def inner_steps(self, count: int, factor: float = 1.0) -> Leaves:
        """Make steps of the inner optimiser, each on a batch of its own.

        Parameters
        ----------
        count : int
            How many, at least one.
        factor : float
            What the learning rate is multiplied by.

        Returns
        -------
        condition : list of Tensor
            Its value before the last of them.
        """
        at_least("count", count, 1)
        for _ in range(count):
            condition, _ = self.inner_step(self.inner_batch(), factor)
        return condition

    def move_inner(self, direction: Tensor, factor: float = 1.0) -> None:
        """Make one step of the inner optimiser along a flat direction."""
        leaves = self.layout.split(direction)
        move(self.inner_optimizer, self.params.variables, leaves, factor)

    def move_outer(self, direction: Sequence[Tensor], factor: float = 1.0) -> None:
        """Make one step of the outer optimiser, and go back to where hyperparameters may be."""
        move(self.outer_optimizer, self.hparams.variables, direction, factor)
        if self.hparams_projection is not None:
            self._project(self.hparams_projection)

    @torch.no_grad()
    def _project(self, project: Callable[[Any], Any]) -> None:
        moved = [v.detach().clone() for v in self.hparams.variables]
        projected = self.hparams.match(
            "hparams_projection(hparams)", project(self.hparams.rebuild(moved))
        )
        if self.on_failure != "ignore" and not bool(finite((), *projected)):
            raise NotFinite(
                f"hparams_projection returned NaN or infinity at outer step {self.steps + 1}: what "
                "it projects onto is empty, or the outer step was too long. The hyperparameters "
                "are where the outer optimiser has moved them.",
                argument="hparams_projection",
            )
        for variable, value in zip(self.hparams.variables, projected, strict=True):
            variable.copy_(value)

    def outer_step(
        self,
        grads: Sequence[Tensor],
        value: Tensor,
        condition: Tensor | Leaves,
        inner_steps: int = 1,
        *,
        factor: float = 1.0,
        finite: Mapping[str, Tensor | Sequence[Tensor]] | None = None,
        **known: Any,
    ) -> StepInfo:
        """Move the hyperparameters along a hypergradient, if it is finite, and record the step.

        Parameters
        ----------
        grads : list of Tensor
            The hypergradient, a tensor for each hyperparameter.
        value : Tensor
            The outer loss, where the gradient was taken.
        condition : Tensor or list of Tensor
            The inner condition where it was last evaluated, flat or not.
        inner_steps : int
            How many steps the inner optimiser made.
        factor : float
            What the learning rate is multiplied by.
        finite : dict of str, optional
            Tensors, or lists of them, that must be finite too, by what they are called.
        **known
            The further fields of a `StepInfo`: `info` and `tolerance`.

        Returns
        -------
        info : StepInfo
            For `step` to return.

        Raises
        ------
        TypeError
            If `grads` is no list of a tensor for each hyperparameter.
        """
        count = len(self.hparams.variables)
        if isinstance(grads, Tensor) or len(grads) != count:
            raise TypeError(f"grads must be a list of {count} tensors, one for each of hparams.")
        self.require_finite({**(finite or {}), "the hypergradient": grads})
        self.move_outer(grads, factor)
        return self.record(grads, value, condition, inner_steps, **known)

    def record(
        self,
        grads: Sequence[Tensor],
        value: Tensor,
        condition: Tensor | Leaves,
        inner_steps: int = 1,
        **known: Any,
    ) -> StepInfo:
        """Write the record of a step whose moves are made.

        Parameters
        ----------
        grads : list of Tensor
            What the outer optimiser was given.
        value : Tensor
            The outer loss, where the gradient was taken.
        condition : Tensor or list of Tensor
            The inner condition where it was last evaluated, flat or not.
        inner_steps : int
            How many steps the inner optimiser made.
        **known
            The further fields of a `StepInfo`: `info` and `tolerance`.

        Returns
        -------
        info : StepInfo
            For `step` to return.
        """
        size = self.size(condition)
        return StepInfo(self.steps + 1, value, self.shaped(grads), size, inner_steps, **known)

    def require_finite(self, named: Mapping[str, Tensor | Sequence[Tensor]]) -> None:
        """Raise if a number is not finite, unless that is to be ignored.

        Parameters
        ----------
        named : dict of str
            Tensors, or lists of them, by what they are called. All are looked at together.

        Raises
        ------
        NotFinite
            Naming the first of them that is not.
        """
        if self.on_failure == "ignore":
            return
        tensors: list[tuple[str, Tensor]] = []
        for name, value in named.items():
            tensors += [(name, t) for t in ((value,) if isinstance(value, Tensor) else value)]
        if self.layout.device.type == "cpu":  # a finite sum has finite terms
            known = all(math.isfinite(t.sum().item()) for _, t in tensors)
        else:
            known = bool(finite((), *[t for _, t in tensors]))
        if known:
            return
        for name, tensor in tensors:
            if not bool(torch.isfinite(tensor).all()):
                raise NotFinite(
                    f"{name} holds NaN or infinity at outer step {self.steps + 1}. A learning rate "
                    "is too large for its problem (the inner one and that of the linear system "
                    "must lie below 2 divided by the largest eigenvalue of the inner Hessian), the "
                    "data are not finite, or a batch is empty (a mean over nothing is NaN). "
                    "The hyperparameters were not moved; on_failure='ignore' leaves NaN as NaN."
                )

    def now(self, name: str) -> Any:
        """Build a level's variables as a pytree of aliases, cut off from the caller's graph."""
        tree = self.params if name == "params" else self.hparams
        aliases = [v.detach() for v in tree.variables]
        if len(aliases) < sum(isinstance(t, Tensor) and t.is_floating_point() for t in tree.leaves):
            # By this are known those that are not frozen, and one that has several names.
            aliases = [alias.requires_grad_() for alias in aliases]
        return tree.rebuild(aliases)

    def _begin(self) -> None:
        """Begin a step: warnings heard, and curvature taken, belong to the last one."""
        self._heard.clear()
        if isinstance(self.inner_optimizer, torch.optim.LBFGS):
            self.inner_optimizer.state.clear()

    def shaped(self, leaves: Sequence[Tensor]) -> Any:
        """Turn tensors shaped like the hyperparameters into a pytree."""
        return leaves[0] if self.derivatives.bare[1] else self.hparams.fill(leaves)

    def zeros(self) -> Tensor:
        """Make a flat vector of zeros, shaped like the inner variables."""
        return torch.zeros(self.layout.n, dtype=self.layout.dtype, device=self.layout.device)


def minus(a: Sequence[Tensor], b: Sequence[Tensor]) -> Leaves:
    """Form the difference of two lists of tensors."""
    return [x - y for x, y in zip(a, b, strict=True)]


def _refuse_shared(levels: Levels) -> None:
    for i, variable in enumerate(levels.params.variables):
        for j, other in enumerate(levels.hparams.variables):
            if variable is other:
                raise NotConnected(
                    f"{levels.params.variable_path(i)} and {levels.hparams.variable_path(j)} are "
                    "one tensor, which both levels would move. Pass a copy to one of them.",
                    leaf=levels.params.variable_path(i),
                )
