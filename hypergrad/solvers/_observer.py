"""The inverse as the directions of an iteration show it, beside the answer itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ._system import NewtonStep
from ._vectors import dot, norm


class Observer:
    """Follows an iteration for ``A x = b`` and learns two things at no further product.

    One is the Newton step ``A^-1 F`` of the inner problem, as far as the search directions reach:
    each direction comes with its image, so that F can be projected on it as b is. The other is
    how long ``A^-1 r`` is for the residuals that such an iteration leaves: the way that the
    answer still went after an earlier step, over the residual at that step.

    Parameters
    ----------
    condition : Tensor
        F, ``(*tasks, n)``.
    residual : Tensor
        The right-hand sides of the iteration, ``(*tasks, n)``, which starts at zero.
    """

    def __init__(self, condition: Tensor, residual: Tensor) -> None:
        self.left = condition.expand_as(residual)
        self.step = torch.zeros_like(residual)
        self._count = 0
        start = torch.zeros_like(residual), norm(residual)
        self._older, self._newer = start, start

    def along(self, direction: Tensor, image: Tensor, weight: Tensor, length: Tensor) -> None:
        """Project F on a direction whose image under A is known.

        Parameters
        ----------
        direction, image : Tensor
            ``p`` and ``A p``.
        weight : Tensor
            What the images of the other directions are orthogonal to: ``p`` in conjugate
            gradients, ``A p`` in a method of minimal residuals.
        length : Tensor
            ``weight . A p`` for each task; zero where a task stands still.
        """
        moving = length > 0
        part = dot(weight, self.left) / torch.where(moving, length, 1.0)
        part = torch.where(moving, part, 0.0)[..., None]
        self.step = torch.addcmul(self.step, part, direction)
        self.left = torch.addcmul(self.left, part, image, value=-1)

    def along_alone(self, direction: Tensor, image: Tensor, length: float) -> None:
        """Do so for one system by conjugate gradients, in numbers in place of tensors."""
        part = torch.dot(direction, self.left).item() / length
        self.step = torch.add(self.step, direction, alpha=part)
        self.left = torch.sub(self.left, image, alpha=part)

    def is_due(self) -> bool:
        """Count a step, and see whether its number is a power of two, after which to `keep`."""
        self._count += 1
        return not self._count & (self._count - 1)

    def keep(self, x: Tensor, size: Tensor | float, active: Tensor) -> None:
        """Keep the answer and its residual norm after a step."""
        size = torch.as_tensor(size, dtype=x.dtype, device=x.device)
        (older_x, older_size), (newer_x, newer_size) = self._older, self._newer
        going = active[..., None]
        self._older = (
            torch.where(going, newer_x, older_x),
            torch.where(active, newer_size, older_size),
        )
        self._newer = torch.where(going, x, newer_x), torch.where(active, size, newer_size)

    def inverse(self, x: Tensor) -> Tensor:
        """Estimate ``||A^-1 r|| / ||r||`` from the later half of an iteration that ended at `x`."""
        older_x, older_size = self._older
        return norm(x - older_x) / older_size

    def newton(self, x: Tensor) -> NewtonStep:
        """Form ``A^-1 F`` as far as it was projected, and what was left over."""
        size = norm(self.left)
        beyond = torch.where(size > 0, self.inverse(x) * size, 0.0)
        return NewtonStep(self.step, self.left, beyond)
