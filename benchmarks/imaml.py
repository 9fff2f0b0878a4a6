"""A meta-step of implicit MAML: the published recipe on two networks, and its exact answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, mse_loss

from benchmarks.by_hand import conjugate_gradients
from reproduction.method.episodes import Episodes, Params
from reproduction.method.models import OmniglotConvNet, SinusoidMLP
from reproduction.method.sinusoid_tasks import SinusoidTasks
from reproduction.omniglot.data import draw_characters, sample_tasks

CG_STEPS = 5
# So strong that the Hessian is positive definite at the start, where nothing is learnt yet, and
# an error means something; how long a step takes does not depend on it.
SINUSOID_LAM, OMNIGLOT_LAM, OMNIGLOT_LR = 20.0, 50.0, 0.01


@dataclasses.dataclass(frozen=True)
class MetaStep:
    """A batch of tasks, and how one is adapted to.

    The inner objective is ``loss(network(params, x), y) + lam / 2 ||params - meta||^2``; it is
    gone down by `steps` gradient steps of size `lr` that start at the meta-parameters. The
    meta-gradient takes `CG_STEPS` steps of conjugate gradients with its Hessian.
    """

    network: nn.Module
    loss: Callable[[Tensor, Tensor], Tensor]
    meta: Params
    tasks: Episodes
    steps: int
    lr: float
    lam: float

    @classmethod
    def sinusoid(cls, tasks: int, steps: int) -> MetaStep:
        """Ten points to adapt to and twenty to judge by; the network 1-40-40-1."""
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        drawn = SinusoidTasks(10, 20).sample(tasks, generator)
        return cls.of(SinusoidMLP(), mse_loss, drawn, steps, 0.01, SINUSOID_LAM)

    @classmethod
    def omniglot(cls, tasks: int, steps: int) -> MetaStep:
        """5-way 1-shot with five queries a class; random strokes in place of the pictures."""
        generator = torch.Generator().manual_seed(0)
        torch.manual_seed(0)
        drawn = sample_tasks(
            draw_characters(40), tasks=tasks, ways=5, shots=1, queries=5, generator=generator
        )
        return cls.of(OmniglotConvNet(5), cross_entropy, drawn, steps, OMNIGLOT_LR, OMNIGLOT_LAM)

    @classmethod
    def of(
        cls,
        network: nn.Module,
        loss: Callable,
        tasks: Episodes,
        steps: int,
        lr: float,
        lam: float,
    ) -> MetaStep:
        meta = {name: leaf.detach() for name, leaf in network.named_parameters()}
        return cls(network, loss, meta, tasks, steps, lr, lam)

    def first(self, count: int) -> MetaStep:
        """The same for the first tasks alone."""
        return dataclasses.replace(self, tasks=Episodes(*(part[:count] for part in self.tasks)))

    def in_float64(self) -> MetaStep:
        meta = {name: leaf.double() for name, leaf in self.meta.items()}
        tasks = (part.double() if part.is_floating_point() else part for part in self.tasks)
        return dataclasses.replace(self, meta=meta, tasks=Episodes(*tasks))

    def task(self, index: int) -> Episodes:
        return Episodes(*(part[index] for part in self.tasks))

    def __len__(self) -> int:
        return len(self.tasks.support_x)

    def model(self, params: Params, x: Tensor) -> Tensor:
        return functional_call(self.network, params, (x,))

    def training_loss(self, params: Params, x: Tensor, y: Tensor) -> Tensor:
        """One task's loss at its support set: its gradient is the unit."""
        return self.loss(self.model(params, x), y)

    def inner(self, params: Params, meta: Params, x: Tensor, y: Tensor) -> Tensor:
        """The inner objective of one task."""
        squares = [(params[name] - meta[name]).square().sum() for name in params]
        return self.training_loss(params, x, y) + self.lam / 2 * torch.stack(squares).sum()

    def outer(self, params: Params, task: Episodes) -> Tensor:
        """The loss at a task's queries."""
        return self.loss(self.model(params, task.query_x), task.query_y)

    def adapted(self, task: Episodes) -> Params:
        """One task's parameters after the inner steps, which require grad."""
        params = {name: leaf.detach().requires_grad_() for name, leaf in self.meta.items()}
        for _ in range(self.steps):
            value = self.training_loss(params, task.support_x, task.support_y)
            slopes = torch.autograd.grad(value, list(params.values()))
            params = self.stepped(params, slopes)
        return params

    def adapted_together(self) -> Params:
        """All tasks' parameters after the inner steps: the gradient of the sum of their losses."""
        count, tasks, mapped = len(self), self.tasks, torch.func.vmap(self.training_loss)
        params = {
            name: leaf.expand(count, *leaf.shape).detach().requires_grad_()
            for name, leaf in self.meta.items()
        }
        for _ in range(self.steps):
            value = mapped(params, tasks.support_x, tasks.support_y).sum()
            params = self.stepped(params, torch.autograd.grad(value, list(params.values())))
        return params

    def stepped(self, params: Params, slopes: tuple[Tensor, ...]) -> Params:
        """One inner step; the gradient of the proximal term is written out."""
        shrunk = [leaf.detach() * (1 - self.lr * self.lam) for leaf in params.values()]
        torch._foreach_add_(shrunk, list(self.meta.values()), alpha=self.lr * self.lam)
        torch._foreach_add_(shrunk, slopes, alpha=-self.lr)
        return {name: leaf.requires_grad_() for name, leaf in zip(params, shrunk, strict=True)}

    def system(self, task: Episodes) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """Products with the Hessian at the adapted parameters, and the gradient at the queries.

        The meta-gradient is ``lam u`` where ``A u = b``: the cross derivative is ``-lam I``.
        """
        params = self.adapted(task)
        leaves = list(params.values())
        b = _flat(torch.autograd.grad(self.outer(params, task), leaves))
        value = self.training_loss(params, task.support_x, task.support_y)
        slope = _flat(torch.autograd.grad(value, leaves, create_graph=True))

        def product(v: Tensor) -> Tensor:
            return _flat(torch.autograd.grad(slope, leaves, v, retain_graph=True)) + self.lam * v

        return product, b

    def by_hand(self) -> Tensor:
        """The average meta-gradient by a loop over the tasks."""
        found = []
        for index in range(len(self)):
            product, b = self.system(self.task(index))
            found.append(self.lam * conjugate_gradients(product, b, CG_STEPS))
        return torch.stack(found).mean(0)

    def exact(self) -> Tensor:
        """The same with every system solved: dense where that is small; in float64."""
        step, found = self.in_float64(), []
        for index in range(len(self)):
            product, b = step.system(step.task(index))
            if len(b) < 3000:
                matrix = torch.func.vmap(product)(torch.eye(len(b), dtype=b.dtype))
                found.append(self.lam * torch.linalg.solve(matrix, b))
                continue
            u, steps = conjugate_gradients(product, b, CG_STEPS), CG_STEPS
            while (residual := b - product(u)).norm() > 1e-9 * b.norm():
                if steps > 3000:
                    raise RuntimeError("The exact meta-gradient was not reached.")
                u, steps = u + conjugate_gradients(product, residual, 60), steps + 60
            found.append(self.lam * u)
        return torch.stack(found).mean(0)


def flat_gradient(gradient: Params) -> Tensor:
    return _flat(list(gradient.values()))


def _flat(parts: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts])
