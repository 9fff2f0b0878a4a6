"""The inverse as the directions of an iteration show it, beside the answer itself."""

from __future__ import annotations

import math

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
    long : bool
        Whether its vectors are changed in place.
    """

    def __init__(self, condition: Tensor, residual: Tensor, *, long: bool = False) -> None:
        self.left = condition.expand_as(residual)
        self.left = self.left.clone() if long else self.left
        self.step = torch.zeros_like(residual)
        self._long = long
        #: The ways since the two steps that were kept, where they are measured in numbers.
        self._ways: tuple[_Way, _Way] | None = None
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

    def along_by(self, direction: Tensor, image: Tensor, inverse: Tensor) -> None:
        """Do so by ``1 / p.Ap``, of conjugate gradients; zero where a task stands still."""
        part = (dot(direction, self.left) * inverse)[..., None]
        self.step = torch.addcmul(self.step, part, direction)
        self.left = torch.addcmul(self.left, part, image, value=-1)

    def along_alone(
        self, direction: Tensor, image: Tensor, length: float, *, alpha: float, pp: float
    ) -> None:
        """Do so for one system by conjugate gradients, in numbers in place of tensors.

        Parameters
        ----------
        direction, image : Tensor
            ``p`` and ``A p``.
        length : float
            ``p . A p``.
        alpha, pp : float
            The step that the answer makes along `direction`, and ``p . p``.
        """
        part = torch.dot(direction, self.left).item() / length
        out = (self.step, self.left) if self._long else (None, None)
        self.step = torch.add(self.step, direction, alpha=part, out=out[0])
        self.left = torch.sub(self.left, image, alpha=part, out=out[1])
        for way in self._ways or ():
            way.go(alpha, pp)

    def measure(self, size: float) -> None:
        """Keep no answers, and measure the way from them in numbers; `size`: of the residual.

        That is for conjugate gradients without a preconditioner.
        """
        start = torch.empty(0)
        self._older = self._newer = start, start
        self._ways = _Way(size), _Way(size)

    def turn(self, beta: float) -> None:
        """Follow the next direction, ``r + beta p``."""
        for way in self._ways or ():
            way.along *= beta

    def is_due(self) -> bool:
        """Count a step, and see whether its number is a power of two, after which to `keep`."""
        self._count += 1
        return not self._count & (self._count - 1)

    def keep(self, x: Tensor, size: Tensor | float, active: Tensor) -> None:
        """Keep the answer and its residual norm after a step."""
        if self._ways is not None:
            self._ways = self._ways[1], _Way(float(size))
            return
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
        if self._ways is not None:
            return x.new_tensor(self._ways[0].inverse())
        older_x, older_size = self._older
        return norm(x - older_x) / older_size

    def newton(self, x: Tensor) -> NewtonStep:
        """Form ``A^-1 F`` as far as it was projected, and what was left over."""
        size = norm(self.left)
        beyond = torch.where(size > 0, self.inverse(x) * size, 0.0)
        return NewtonStep(self.step, self.left, beyond)


class _Way:
    """The way that an answer by conjugate gradients goes, without the answers.

    The residual is orthogonal to the directions before it, so that the inner product of the way
    with the next direction is carried on by numbers alone.

    Parameters
    ----------
    size : float
        The norm of the residual where it begins.

    References
    ----------
    Hestenes and Stiefel, Methods of conjugate gradients for solving linear systems, 1952,
    section 6.
    """

    def __init__(self, size: float) -> None:
        self.size, self.square, self.along = size, 0.0, 0.0

    def go(self, alpha: float, pp: float) -> None:
        """Go on by `alpha` along a direction p; `pp` is p . p."""
        self.square += alpha * (2 * self.along + alpha * pp)
        self.along += alpha * pp

    def inverse(self) -> float:
        """Divide the length of the way by the residual where it began."""
        length = math.sqrt(max(self.square, 0.0)) if math.isfinite(self.square) else math.nan
        return length / self.size if self.size else math.nan
