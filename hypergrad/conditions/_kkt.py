"""Constrained inner problems by their Karush-Kuhn-Tucker conditions."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .._autograd.products import Parts, Replay, filled
from .._autograd.rows import by_rows
from .._autograd.torch_pytrees import pytree
from .._errors import StructureMismatch
from .._pytrees import Layout, Tree
from ._base import Condition, Point, Product, Record
from ._inner_problem import Problem, scalar
from ._kinks import largest, linearly_dependent, reach
from ._multipliers import fitted

_CHECKED = 200  # most constraints whose gradients are checked for linear dependence


@dataclasses.dataclass(frozen=True)
class KKT(Condition):
    """The inner solution minimises ``f(x, *args)`` subject to h = 0 and g <= 0.

    ``params`` is ``(x, nu, lam)``: the variables, the multipliers of the equalities h and those of
    the inequalities g, shaped like what `equalities` and `inequalities` return; None where there
    are none. With the Lagrangian L = f + nu.h + lam.g the condition is
    ``grad_x L = 0``, ``h = 0`` and ``lam - max(lam + g, 0) = 0``.

    The last line says g <= 0, lam >= 0 and lam g = 0 at once, so that a violated constraint and a
    multiplier of the wrong sign count in ``info.inner_residual`` too, as they would not in lam g.

    With equalities alone the condition is the gradient of L in ``(x, nu)`` and A its Hessian:
    symmetric, and indefinite, so `MINRES` suits it and `CG` does not. With inequalities the row of
    one that is not active is that of lam = 0, while its column holds its gradient: A is not
    symmetric.

    Where g and lam are both zero (strict complementarity fails) the solution has a kink: the
    answer is that of the side on which the constraint is not active. Where the gradients of the
    active constraints are linearly dependent (LICQ fails), the multipliers are not determined,
    nor is the solution where the constraints move apart. Both are in ``info.degeneracy`` and
    warned of; the second is checked up to 200 constraints.

    Parameters
    ----------
    f : callable
        ``f(x, hparams)``, a scalar tensor. In the decorators ``f(x, *args)``.
    equalities, inequalities : callable, optional
        ``h(x, hparams)`` and ``g(x, hparams)``, pytrees of tensors; in the decorators
        ``(x, *args)``.

    References
    ----------
    Amos and Kolter, OptNet: differentiable optimization as a layer in neural networks, 2017,
    section 3; Nocedal and Wright, Numerical optimization, 2006, chapter 12.

    Examples
    --------
    >>> import torch, hypergrad
    >>> qp = hypergrad.KKT(  # the point of the line x.sum() = t that is closest to c
    ...     lambda x, t: ((x - torch.tensor([1.0, 0.0])) ** 2).sum() / 2,
    ...     equalities=lambda x, t: x.sum() - t,
    ... )
    >>> t = torch.tensor(2.0)
    >>> params = torch.tensor([1.5, 0.5]), torch.tensor(-0.5), None
    >>> hypergrad.implicit_grad(lambda p, t: p[0][0], qp, params, t)  # half of it is x[0]'s
    tensor(0.5000)
    """

    f: Callable[..., Any]
    equalities: Callable[..., Any] | None = None
    inequalities: Callable[..., Any] | None = None
    kink: ClassVar[str] = "an inequality has g = 0 and lam = 0: strict complementarity fails"

    @property
    def symmetric(self) -> bool:
        """Whether there are equalities alone."""
        return self.inequalities is None

    def lagrangian(self, params: Any, *args: Any) -> Tensor:
        """Evaluate ``f + nu.h + lam.g``."""
        x, nu, lam = _three(params)
        value = scalar("f", self.f(x, *args))
        value = value + _priced("nu", nu, "equalities", self.equalities, x, args)
        return value + _priced("lam", lam, "inequalities", self.inequalities, x, args)

    def multipliers(self, x: Any, *args: Any) -> tuple[Any, Any]:
        """Find the multipliers of a solution that came without them, by least squares.

        They minimise ``||grad_x L||^2 + ||lam g||^2``, and what is below zero in lam counts as
        zero. At a solution at which the gradients of the active constraints are independent (LICQ)
        these are its multipliers. Elsewhere they are not, and every entrance says so, since
        ``(x, nu, lam)`` does not satisfy the condition. The Jacobian of all constraints is formed.

        Parameters
        ----------
        x : pytree of Tensor
            The variables.
        *args
            What the functions take after them: ``hparams``.

        Returns
        -------
        nu, lam : pytree of Tensor or None
            Detached, shaped like what `equalities` and `inequalities` return; None where there
            are none. The `params` are ``(x, nu, lam)``.

        Examples
        --------
        >>> import torch, hypergrad
        >>> t = torch.tensor(1.0)
        >>> ball = hypergrad.KKT(lambda x, t: -x.sum(), inequalities=lambda x, t: x @ x - t)
        >>> x = torch.full((2,), 0.5).sqrt()
        >>> ball.multipliers(x, t)  # -1 + lam * 2 x = 0
        (None, tensor(0.7071))
        """
        return fitted(self.f, self.equalities, self.inequalities, x, args)

    def probe(self, problem: Problem, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Evaluate the Lagrangian."""
        return [problem.objective("the Lagrangian", self.lagrangian, tensors)]

    def record(self, point: Point) -> Record:
        """Record the conditions; every function is evaluated once."""
        problem, params = point.problem, point.params
        (value,) = self.probe(problem, point.tensors)
        # The derivatives by the multipliers are the constraints themselves.
        rows = [part for part in point.gradient(value) if part is not None]
        of_x, of_nu, of_lam = _places(problem.params)
        lead = len(problem.own_axes)
        residual: list[Tensor] = list(rows)
        for i in of_lam:
            residual[i] = params[i] - torch.relu(params[i] + rows[i])
        outputs: list[Tensor | None] = list(residual)
        transposed = Replay(residual, params)
        product: Product | None = transposed if self.symmetric else point.product(outputs)
        record = Record([value], outputs, transposed, product)
        layout = problem.layout()
        shifted = {i: (params[i] + rows[i]).detach() for i in of_lam}
        if any(part.numel() for part in shifted.values()):
            scale = largest([*params, *(rows[i] for i in of_lam)], lead).to(layout.dtype)
            missed = layout.flatten([part.detach() for part in residual], scale.shape)
            record.sides = _sides(shifted, reach(scale, missed, layout.precision), len(params))
        constraints = [i for i in [*of_nu, *of_lam] if params[i].numel()]
        count = sum(params[i].shape[lead:].numel() for i in constraints)
        if 0 < count <= _CHECKED:
            record.dependent = _Dependence(
                Replay([rows[i] for i in constraints], [params[i] for i in of_x]),
                [rows[i].detach() for i in constraints],
                [shifted[i] > 0 if i in shifted else None for i in constraints],
                [params[i].detach() for i in of_x],
                layout,
                lead,
            )
        return record


def _three(params: Any) -> Any:
    if isinstance(params, tuple | list) and len(params) == 3:
        return params
    raise StructureMismatch(
        "params of KKT must be (x, nu, lam): the variables, the multipliers of the equalities and "
        "those of the inequalities, None where there are none; got "
        f"{type(params).__name__}"
        + (f" of length {len(params)}." if isinstance(params, tuple | list) else "."),
        argument="params",
    )


def _priced(
    name: str,
    multipliers: Any,
    what: str,
    constraint: Callable[..., Any] | None,
    x: Any,
    args: Sequence[Any],
) -> Tensor | float:
    """Sum multipliers times constraints."""
    price, spec = pytree.tree_flatten(multipliers)
    if constraint is None:
        if all(not (isinstance(leaf, Tensor) and leaf.numel()) for leaf in price):
            # An empty tensor stays connected, so that it needs no special case.
            return sum((leaf.sum() for leaf in price if isinstance(leaf, Tensor)), 0.0)
        raise StructureMismatch(
            f"There are no {what}, so {name} in params=(x, nu, lam) is None.", argument="params"
        )
    values, given = pytree.tree_flatten(constraint(x, *args))
    if spec != given:
        raise StructureMismatch(
            f"{name} must have the structure of what {what} returns: expected {given}, got {spec}.",
            argument="params",
        )
    total: Tensor | float = 0.0
    for one, value in zip(price, values, strict=True):
        if not isinstance(one, Tensor) or not isinstance(value, Tensor):
            raise StructureMismatch(
                f"{name} and what {what} returns must be tensors.", argument="params"
            )
        if one.shape != value.shape:
            raise StructureMismatch(
                f"{name} has the shape {tuple(one.shape)}, but {what} returns one of shape "
                f"{tuple(value.shape)}; there must be one multiplier for each constraint.",
                argument="params",
            )
        total = total + (one * value).sum()
    return total


def _places(params: Tree) -> tuple[list[int], list[int], list[int]]:
    """Find the positions, among the variables, of x, nu and lam."""
    places: tuple[list[int], list[int], list[int]] = ([], [], [])
    sizes = [len(pytree.tree_leaves(part)) for part in _three(params.rebuild(params.variables))]
    for position, leaf in enumerate(params.where):
        part = 0 if leaf < sizes[0] else 1 if leaf < sizes[0] + sizes[1] else 2
        places[part].append(position)
    return places


def _sides(shifted: dict[int, Tensor], distance: Tensor, count: int) -> list[Product]:
    """Form the changes of the derivative of max(lam + g, 0) a little to either side."""
    changes = []
    for sign in (1, -1):
        change = {}
        for i, v in shifted.items():
            away = distance.reshape(distance.shape + (1,) * (v.ndim - distance.ndim))
            change[i] = (v + sign * away > 0).to(v.dtype) - (v > 0).to(v.dtype)
        changes.append(change)

    def side(change: dict[int, Tensor]) -> Product:
        def product(u: Parts, create_graph: bool = False) -> list[Tensor | None]:
            scaled: list[Tensor | None] = [None] * count
            for i, c in change.items():
                part = u[i]
                scaled[i] = None if part is None else c * part
            return scaled

        return product

    return [side(change) for change in changes]


@dataclasses.dataclass(frozen=True)
class _Dependence:
    """The test of whether the active constraints' gradients are dependent (LICQ fails)."""

    pullback: Replay  # of the constraints, to x
    constraints: list[Tensor]
    active: list[Tensor | None]  # None: equalities, always active
    x: list[Tensor]
    layout: Layout
    lead: int

    def __call__(self) -> Tensor:
        """Form their Jacobian, row by row, and look at its Gram matrix."""
        sizes = [c.shape[self.lead :].numel() for c in self.constraints]
        tasks = self.constraints[0].shape[: self.lead]
        dtype, device = self.layout.dtype, self.layout.device
        eye = torch.eye(sum(sizes), dtype=dtype, device=device)

        def row(weights: Tensor) -> Tensor:
            given = [
                part.to(c.dtype).expand(*tasks, size).reshape(c.shape)
                for part, size, c in zip(weights.split(sizes), sizes, self.constraints, strict=True)
            ]
            parts = filled(self.pullback(given), self.x)
            return torch.cat([part.reshape(*tasks, -1).to(dtype) for part in parts], dim=-1)

        with torch.no_grad():
            rows = by_rows(row, eye).movedim(0, -2)
        active = [
            torch.ones(*tasks, size, dtype=torch.bool, device=device)
            if flag is None
            else flag.reshape(*tasks, size)
            for flag, size in zip(self.active, sizes, strict=True)
        ]
        return linearly_dependent(rows, torch.cat(active, dim=-1))
