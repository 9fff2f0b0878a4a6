"""Random strongly convex quadratics whose meta-gradient is a closed form, and a count of calls.

The inner objective is phi.H.phi / 2 - b.phi + lam / 2 |phi - theta|^2, the outer loss
|phi - c|^2 / 2. With A = H + lam I the inner solution is phi* = A^-1 (b + lam theta), and the
meta-gradient lam A^-1 (phi* - c). In the eigenbasis of A all of this is elementwise, and so are
gradient descent and its derivative: the closed forms share no code with what they judge.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

LAM = 0.5  # half the smallest eigenvalue of A: no direction is left to the proximal term alone


@dataclass
class Calls:
    """How often the inner objective was differentiated once, and twice."""

    backward_passes: int = 0
    products: int = 0

    @property
    def gradients(self) -> int:
        """Inner gradients; a product passes backward through the objective as well."""
        return self.backward_passes - self.products

    @property
    def total(self) -> int:
        """Gradients and Hessian-vector products."""
        return self.backward_passes


class _Tap(torch.autograd.Function):
    """The identity, which counts the backward passes through it."""

    @staticmethod
    def forward(ctx: Any, phi: Tensor, calls: Calls) -> Tensor:
        ctx.calls = calls
        return phi.view_as(phi)

    @staticmethod
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        ctx.calls.backward_passes += 1
        return _TapOfGradient.apply(slope, ctx.calls), None


class _TapOfGradient(torch.autograd.Function):
    """The identity on a gradient, which counts how often that is differentiated again."""

    @staticmethod
    def forward(ctx: Any, slope: Tensor, calls: Calls) -> Tensor:
        ctx.calls = calls
        return slope.view_as(slope)

    @staticmethod
    def backward(ctx: Any, cotangent: Tensor) -> tuple[Tensor, None]:
        ctx.calls.products += 1
        return cotangent, None


@dataclass(frozen=True)
class Quadratic:
    """One problem, in float64.

    Parameters
    ----------
    eigenvalues
        Of A, from 1 to the condition number, (n,).
    basis
        Its eigenvectors as columns, (n, n).
    b, c, theta
        See above, (n,).
    """

    eigenvalues: Tensor
    basis: Tensor
    b: Tensor
    c: Tensor
    theta: Tensor
    hessian: Tensor = field(init=False)

    def __post_init__(self) -> None:
        """Form the Hessian of the task's own loss."""
        hessian = (self.basis * (self.eigenvalues - LAM)) @ self.basis.T
        object.__setattr__(self, "hessian", hessian)

    @classmethod
    def draw(cls, kappa: float, n: int, seed: int) -> "Quadratic":
        """Draw a problem: eigenvalues log-uniform in [1, kappa], both ends among them.

        Parameters
        ----------
        kappa
            The condition number of A.
        n
            Number of unknowns.
        seed
            The same seed draws the same problem at every condition number, its spectrum
            stretched.

        Returns
        -------
        Quadratic
            The problem.
        """
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        places = torch.rand(n, generator=generator, dtype=torch.float64)
        places[:2] = torch.tensor([0.0, 1.0])
        return cls(kappa**places, torch.linalg.qr(normal(n, n)).Q, normal(n), normal(n), normal(n))

    @property
    def kappa(self) -> float:
        """The condition number of A, which is also its largest eigenvalue."""
        return self.eigenvalues.max().item()

    def inner(self, calls: Calls) -> "CountedObjective":
        """Return the inner objective; what is asked of it goes into `calls`."""
        return CountedObjective(self, calls)

    def outer(self, phi: Tensor, theta: Tensor) -> Tensor:
        """Evaluate the outer loss."""
        return (phi - self.c).square().sum() / 2

    def meta_gradient(self) -> Tensor:
        """Return the exact meta-gradient, by closed form."""
        return self.meta_gradient_at(self._coordinates(self.b + LAM * self.theta), solved=True)

    def meta_gradient_at(self, phi: Tensor, *, solved: bool = False) -> Tensor:
        """Return the implicit meta-gradient at `phi`, its linear system solved by closed form.

        Parameters
        ----------
        phi
            Inner parameters, (n,).
        solved
            Whether `phi` is rather A phi, in the eigenbasis.

        Returns
        -------
        Tensor
            lam A^-1 (phi - c).
        """
        inner = phi / self.eigenvalues if solved else self._coordinates(phi)
        return self.basis @ (LAM / self.eigenvalues * (inner - self._coordinates(self.c)))

    def error(self, meta_gradient: Tensor, exact: Tensor | None = None) -> float:
        """Return the relative error; None: against the exact meta-gradient."""
        exact = self.meta_gradient() if exact is None else exact
        return ((meta_gradient - exact).norm() / exact.norm()).item()

    def momentum_path(self, step_size: float, momentum: float) -> Iterator[tuple[Tensor, Tensor]]:
        """Follow Nesterov's method from theta by closed form; without momentum, gradient descent.

        Parameters
        ----------
        step_size, momentum
            phi <- y - step_size dG(y) at y = phi + momentum (phi - previous phi).

        Yields
        ------
        gradient : Tensor
            The derivative of the outer loss after so many steps: 0, 1, 2 and so on.
        phi : Tensor
            Where these end.
        """
        a, theta = self.eigenvalues, self._coordinates(self.theta)
        right, c = self._coordinates(self.b) + LAM * theta, self._coordinates(self.c)
        phi, slope = theta, torch.ones_like(a)  # of phi by theta, one entry an eigenvector
        before = (phi, slope)
        while True:
            yield self.basis @ (slope * (phi - c)), self.basis @ phi
            y, dy = (x + momentum * (x - p) for x, p in zip((phi, slope), before, strict=True))
            before = (phi, slope)
            phi, slope = y - step_size * (a * y - right), dy - step_size * (a * dy - LAM)

    def truncated(self, phi: Tensor, step_size: float, kept: int) -> Tensor:
        """Return the derivative through the last gradient steps alone, by closed form.

        Parameters
        ----------
        phi
            Where the steps end, (n,).
        step_size
            Their size.
        kept
            How many of them are differentiated.

        Returns
        -------
        Tensor
            lam step_size sum of (I - step_size A)^k over k < kept, times phi - c.
        """
        a = self.eigenvalues
        slope = LAM / a * (1 - (1 - step_size * a) ** kept)
        return self.basis @ (slope * self._coordinates(phi - self.c))

    def _coordinates(self, vector: Tensor) -> Tensor:
        return self.basis.T @ vector


@dataclass(frozen=True)
class CountedObjective:
    """The inner objective of a problem, as plain PyTorch code whose derivatives are counted."""

    problem: Quadratic
    calls: Calls

    def __call__(self, phi: Tensor, theta: Tensor) -> Tensor:
        """Evaluate it."""
        tapped: Tensor = _Tap.apply(phi, self.calls)
        loss = tapped @ (self.problem.hessian @ tapped) / 2 - self.problem.b @ tapped
        return loss + LAM / 2 * (phi - theta).square().sum()

    def gradient(self, phi: Tensor, theta: Tensor) -> Tensor:
        """Return the gradient at `phi`, differentiable where `phi` belongs to a graph."""
        recorded = phi.requires_grad
        with torch.enable_grad():
            point = phi if recorded else phi.detach().requires_grad_()
            (slope,) = torch.autograd.grad(self(point, theta), point, create_graph=recorded)
        return slope
