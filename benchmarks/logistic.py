"""Logistic regression whose every feature has a penalty of its own: the hyperparameters."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as cross_entropy


@dataclass(frozen=True)
class LogisticRegression:
    """Training and validation data, the penalties, and the solution.

    Parameters
    ----------
    x, y, x_val, y_val
        Data: (n, d), (n), (m, d), (m).
    log_penalty, w
        The hyperparameters and the inner solution, (d).
    """

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    log_penalty: Tensor
    w: Tensor

    @classmethod
    def draw(cls, rows: int, features: int) -> LogisticRegression:
        """Draw data whose features differ in scale by a factor of ten, and solve in float64."""
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, dtype=torch.float64, generator=generator)

        scale = torch.logspace(0, -1, features, dtype=torch.float64)
        x, x_val = normal(rows, features) * scale, normal(rows // 4, features) * scale
        truth = 3 * normal(features) / scale.norm()
        y, y_val = (
            torch.bernoulli((part @ truth).sigmoid(), generator=generator) for part in (x, x_val)
        )
        penalty = torch.linspace(-7, -5, features, dtype=torch.float64)
        problem = cls(x, y, x_val, y_val, penalty, torch.zeros_like(truth))
        for _ in range(30):  # Newton's method
            probability = (x @ problem.w).sigmoid()
            gradient = x.T @ (probability - y) / rows + penalty.exp() * problem.w
            if gradient.norm() < 1e-13:
                break
            problem.w.sub_(problem.solve(gradient))
        return problem

    def to(self, dtype: torch.dtype) -> LogisticRegression:
        """The same in another precision."""
        return LogisticRegression(**{name: part.to(dtype) for name, part in vars(self).items()})

    def inner(self, w: Tensor, log_penalty: Tensor) -> Tensor:
        """The training loss."""
        return cross_entropy(self.x @ w, self.y) + (log_penalty.exp() * w * w).sum() / 2

    def outer(self, w: Tensor, log_penalty: Tensor) -> Tensor:
        """The validation loss."""
        return cross_entropy(self.x_val @ w, self.y_val)

    def weights(self) -> Tensor:
        """D in the Hessian X^T D X + diag(penalty)."""
        probability = (self.x @ self.w).sigmoid()
        return probability * (1 - probability) / len(self.y)

    def solve(self, b: Tensor) -> Tensor:
        """Solve with the Hessian: a dense factorisation in the smaller of the two spaces."""
        penalty, weights = self.log_penalty.exp(), self.weights()
        if len(b) <= len(self.y):
            return torch.linalg.solve(self.x.T @ (weights[:, None] * self.x) + penalty.diag(), b)
        scaled = self.x / penalty  # the identity of Woodbury
        small = (1 / weights).diag() + scaled @ self.x.T
        return b / penalty - scaled.T @ torch.linalg.solve(small, scaled @ b)

    def exact(self) -> Tensor:
        """The hypergradient, without iterations: to be called in float64."""
        probability = (self.x_val @ self.w).sigmoid()
        b = self.x_val.T @ (probability - self.y_val) / len(self.y_val)
        return -self.log_penalty.exp() * self.w * self.solve(b)

    def moved(self, step: Tensor) -> LogisticRegression:
        """Move the logarithms of the penalties, and solve again by Newton's method, in float64."""
        there = replace(self, log_penalty=self.log_penalty + step)
        for _ in range(10):
            probability = (there.x @ there.w).sigmoid()
            gradient = there.x.T @ (probability - there.y) / len(there.y)
            gradient += there.log_penalty.exp() * there.w
            if gradient.norm() < 1e-13:
                break
            there = replace(there, w=there.w - there.solve(gradient))
        return there

    def step_size(self) -> float:
        """One over the largest eigenvalue of the Hessian, by the power method."""
        weights, penalty = self.weights(), self.log_penalty.exp()
        v = torch.ones_like(self.w)
        for _ in range(100):
            v = self.x.T @ (weights * (self.x @ v)) + penalty * v
            size = v.norm()
            v = v / size
        return 1 / size.item()
