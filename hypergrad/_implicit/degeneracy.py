"""How far the two sides of a kink are apart in the answer."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..solvers._factorisation import signs
from ..solvers._vectors import norm

if TYPE_CHECKING:
    from .linearisation import Linearisation


#: The relative jump above which an answer counts as one of several.
DEGENERATE = 1e-2


def degeneracy(lin: Linearisation, u: Tensor, b: Tensor, *, transpose: bool) -> Tensor | None:
    """Measure how far apart the sides of a kink are, in the linear system; None: not known.

    With D the derivative that the condition has taken of its map, D' that on another side and u
    the solution of the system, it is ``||(D' - D)^T u||`` divided by the smaller of ``||b||`` and
    ``||u||``. A solution of the system with A itself is zero just where the map holds its entries
    fixed, and so shows nothing of the other side: there a vector in general position takes u's
    place. It is infinite where the gradients of the active constraints are linearly dependent.

    Parameters
    ----------
    lin : Linearisation
        The condition at the solution.
    u, b : Tensor
        The solution and the right-hand side of the system, flat.
    transpose : bool
        Whether the system's matrix is the transpose of A.

    Returns
    -------
    jump : Tensor or None
        One figure a task.
    """
    sides, dependent = lin.record.sides, lin.record.dependent
    if not sides and dependent is None:
        return None
    jump, size = torch.zeros_like(u[..., 0]), torch.minimum(norm(b), norm(u))
    if not transpose:
        u = signs(u).expand_as(u)
        size = norm(u)
    for side in sides:
        jump = torch.maximum(jump, norm(lin.replayed(side, u)))
    jump = torch.where(jump > 0, jump / size, torch.zeros_like(jump))
    if dependent is not None:
        jump = torch.where(dependent(), torch.full_like(jump, math.inf), jump)
    return jump
