"""Least squares on pytrees of any shapes, drawn by Hypothesis, with the dense hypergradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from hypothesis import Phase, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

import hypergrad
from tests.problems import F64, data

few = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],  # shrinking would outlast the limit for a test
)
fewer = settings(few, max_examples=6)
SHAPES = st.sampled_from([(), (1,), (3,), (2, 2), (1, 2, 1)])


class InnerProblem:
    """A strongly convex inner problem on a pytree, with hyperparameters that enter nonlinearly.

    ``inner = w.H(theta).w / 2 - c(theta).w + softplus terms``, with eigenvalues between 1 and
    about 6, so that gradient descent at 0.2 converges.
    """

    STEP = 0.2

    def __init__(self, seed: int, shapes: list[tuple[int, ...]], kind: str) -> None:
        self.seed, self.kind = seed, kind
        self.sizes = [torch.Size(shape).numel() for shape in shapes]
        self.shapes = shapes
        self.n = n = sum(self.sizes)
        Q = torch.linalg.qr(data(seed, n, n, dtype=F64)).Q
        self.H = Q * torch.linspace(0.5, 2.0, n, dtype=F64) @ Q.T
        self.c, self.slope = data(seed + 1, n, dtype=F64), data(seed + 2, n, 2, dtype=F64)
        self.target = data(seed + 3, n, dtype=F64)
        self.mix = data(seed + 4, 3, n, dtype=F64) / n
        self.hparams = {"shift": data(seed + 5, 2, dtype=F64), "log": torch.tensor(0.3, dtype=F64)}
        self.init = self.build(data(seed + 6, n, dtype=F64))

    def build(self, vector: Tensor) -> Any:
        """The vector as a pytree of this problem's kind."""
        parts = torch.split(vector, self.sizes)
        leaves = [part.reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        if self.kind == "dict":
            return {f"leaf{i}": leaf for i, leaf in enumerate(leaves)}
        if self.kind == "nested":
            return [leaves[0], {"rest": tuple(leaves[1:])}]
        return tuple(leaves)

    def vector(self, params: Any) -> Tensor:
        return torch.cat([leaf.reshape(-1) for leaf in pytree.tree_leaves(params)])

    def inner(self, params: Any, hparams: dict[str, Tensor]) -> Tensor:
        w = self.vector(params)
        quadratic = w @ self.H @ w / 2 + hparams["log"].exp() * w @ w / 4
        linear = (self.c + self.slope @ torch.tanh(hparams["shift"])) @ w
        return quadratic - linear + torch.nn.functional.softplus(self.mix @ w).sum()

    def outer(self, params: Any, hparams: dict[str, Tensor]) -> Tensor:
        direct = 0.1 * hparams["shift"].square().sum()
        return (self.vector(params) - self.target).square().mean() + direct

    def gradient_step(self, params: Any, hparams: dict[str, Tensor]) -> Any:
        gradient = torch.func.grad(self.inner)(params, hparams)
        return pytree.tree_map(lambda w, g: w - self.STEP * g, params, gradient)

    def autograd_step(self, params: Any, hparams: dict[str, Tensor]) -> Any:
        """The same step with the gradient by plain autograd."""
        leaves, spec = pytree.tree_flatten(params)
        gradient = torch.autograd.grad(self.inner(params, hparams), leaves, create_graph=True)
        moved = [w - self.STEP * g for w, g in zip(leaves, gradient, strict=True)]
        return pytree.tree_unflatten(moved, spec)

    def step_by_hand(self, params: Any, hparams: dict[str, Tensor]) -> Any:
        """The same step with the gradient written out."""
        w = self.vector(params)
        quadratic = self.H @ w + hparams["log"].exp() * w / 2
        linear = self.c + self.slope @ torch.tanh(hparams["shift"])
        gradient = quadratic - linear + self.mix.T @ torch.sigmoid(self.mix @ w)
        return self.build(w - self.STEP * gradient)

    def solve(self, hparams: dict[str, Tensor]) -> Any:
        """Newton's method, to rounding."""
        w = torch.zeros(self.n, dtype=F64)

        def value(w: Tensor) -> Tensor:
            return self.inner(self.build(w), hparams)

        for _ in range(8):
            H = torch.autograd.functional.hessian(value, w)
            w = w - torch.linalg.solve(H, torch.autograd.functional.jacobian(value, w))
        return self.build(w)

    def implicit(self, **options: Any) -> Any:
        params = self.solve(self.hparams)
        return hypergrad.implicit_grad(self.outer, self.inner, params, self.hparams, **options)


@st.composite
def inner_problems(draw: Callable[..., Any]) -> InnerProblem:
    shapes = draw(st.lists(SHAPES, min_size=1, max_size=4))
    kind = draw(st.sampled_from(["dict", "nested", "tuple"]))
    return InnerProblem(draw(st.integers(0, 10_000)), shapes, kind)
