"""The uses of a solution of a linear system: the tensors computed from it, and their changes."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .._autograd.products import Parts
from ..solvers._factorisation import signs
from ..solvers._system import NewtonStep, Solution
from ..solvers._vectors import norm
from .causes import Place, data, inner_places, solve
from .linearisation import Linearisation
from .second_look import SecondLook
from .task_norms import size_for_each


class Use:
    """The use of a solution of the linear system: here, for nothing but itself.

    A hypergradient takes it further, to the cross derivative and the outer loss.

    Parameters
    ----------
    lin : Linearisation
        Where the system comes from.
    """

    def __init__(self, lin: Linearisation) -> None:
        self.lin = lin

    def leaves(self, u: Tensor) -> list[Tensor]:
        """List the tensors that are computed from `u`."""
        return []

    def places(self, b: Tensor, u: Tensor) -> Iterator[Place]:
        """Everything that went into the solution `u`, by name, in the order of its making."""
        problem = self.lin.problem
        yield Place("the right-hand side (the incoming derivative)", b, data)
        for place in problem.inner:
            yield Place("the inner solution", self.lin.tensors[place], data, problem.path(place))
        yield from inner_places(self.lin)
        yield Place("the solution of the linear system", u, solve)

    def values(self) -> list[Tensor]:
        """List what must be finite beside them, for each task."""
        return []

    def share(self) -> Tensor | float:
        """Measure the part of `leaves` that depends on `u`, relative to the whole."""
        return 1.0

    def effect(self, missing: Tensor, lost: Tensor) -> Tensor:
        """Measure the relative change that a part missing in `u` makes, which is `lost` of it."""
        return lost

    def crossed_again(self, crossed: Parts) -> Tensor | float:
        """Measure the relative change where the cross derivative was formed once more."""
        return 0.0

    def second_look(
        self, newton: NewtonStep, solution: Solution, planned: Tensor
    ) -> SecondLook | None:
        """Form the same a Newton step further on; None: there is no more to it."""
        return None

    def falls_by(self, step: Tensor) -> Tensor | None:
        """Measure the outer loss's fall on the way to ``params - step``; None: there is no loss."""
        return None

    def mere_rounding(self) -> Tensor | None:
        """Say whether the right-hand side is left over from cancelling terms; None: not known."""
        return None

    def negligible(self, params: Tensor) -> Tensor:
        """Say whether params are nothing at the length on which the outer loss bends."""
        return torch.zeros_like(params[..., 0], dtype=torch.bool)

    def moves_off(self, null: Tensor) -> Tensor:
        """Say whether the condition has no solution a little further on, by a null vector of A^T.

        So it is where the cross derivative does not vanish along it: then the hyperparameters move
        the condition in a direction that the inner variables cannot follow.

        Parameters
        ----------
        null : Tensor
            ``(*tasks, n)``.

        Returns
        -------
        moves : Tensor
            bool, for each task.
        """
        lead = self.lin.lead
        # Against a vector in general position that is as large.
        other = signs(null) * norm(null)[..., None] / null.shape[-1] ** 0.5
        none = torch.zeros_like(null[..., 0])
        size, scale = (
            sum((size_for_each(part, lead) for part in self.lin.cross(v) if part is not None), none)
            for v in (null, other)
        )
        return size > torch.finfo(self.lin.layout.precision).eps ** 0.5 * scale
