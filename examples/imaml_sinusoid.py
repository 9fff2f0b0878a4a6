"""Implicit MAML on sinusoids, from top to bottom: ``python -m examples.imaml_sinusoid``.

A task is a sine of unknown amplitude and phase, of which ten points are known. A network adapts to
them from shared parameters theta. We want a theta from which this works for sines never seen:

    inner   phi*(theta) = argmin over phi of  error(phi, ten points) + lam/2 ||phi - theta||^2
    outer   minimise over theta               error(phi*(theta), twenty further points)

Unrolled MAML differentiates through the steps that lead to phi*. Implicit MAML (Rajeswaran et al.
2019) needs phi* alone: since the inner gradient is zero there, d phi*/d theta follows from one
linear system, which `hypergrad.implicit_grad` solves. It does not matter how you find phi*. We take
Gauss-Newton steps, which solve the inner problem well and would be expensive to unroll.

The tasks are those of Finn et al. 2017, section 5.1. About a minute of one core.
"""

import argparse
import math
import time

import torch
from matplotlib.figure import Figure
from torch import Tensor
from torch.func import jacrev, vmap

import hypergrad

SHOTS, QUERIES, TASKS, LAM = 10, 20, 25, 0.1
SHAPES = ((40, 1), (40,), (40, 40), (40,), (1, 40), (1,))  # of a network 1-40-40-1
SIZES = [math.prod(shape) for shape in SHAPES]
BOUNDS = [1.0, 1.0, *[1 / 40**0.5] * 4]  # at the start, uniform within them


def network(params: Tensor, x: Tensor) -> Tensor:
    """Evaluate the network; its parameters are one vector, which keeps the algebra short."""
    W1, b1, W2, b2, W3, b3 = (p.view(s) for p, s in zip(params.split(SIZES), SHAPES, strict=True))
    return torch.relu(torch.relu(x @ W1.T + b1) @ W2.T + b2) @ W3.T + b3


def draw_tasks(count: int, queries: int = QUERIES) -> tuple[Tensor, ...]:
    """Draw sines: x and y of the points to adapt to, then x and y of those that judge."""
    amplitude = 0.1 + 4.9 * torch.rand(count, 1, 1)
    phase = math.pi * torch.rand(count, 1, 1)
    x = 10 * torch.rand(count, SHOTS + queries, 1) - 5
    y = amplitude * torch.sin(x - phase)
    return x[:, :SHOTS], y[:, :SHOTS], x[:, SHOTS:], y[:, SHOTS:]


def error(outputs: Tensor, y: Tensor) -> Tensor:
    """Return the mean squared error."""
    return (outputs - y).square().mean()


def penalty(phi: Tensor, theta: Tensor) -> Tensor:
    """Return the proximal term, which ties a task's parameters to the shared ones."""
    return LAM / 2 * (phi - theta).square().sum()


def adapt(theta: Tensor, x: Tensor, y: Tensor, steps: int = 3) -> Tensor:
    """Solve the inner problem of one task by Gauss-Newton steps with a line search."""
    # With the network linearised at phi, f + J (new - phi), the minimiser is theta + J' a for one
    # number a per point: a system of 10 unknowns in place of 1,761.
    phi, scale = theta, 2 / len(y)
    sizes = torch.tensor([1.0, 0.5, 0.25, 0.1, 0.03, 0.0])
    for _ in range(steps):
        J = jacrev(lambda p: network(p, x))(phi).reshape(len(y), -1)
        miss = (network(phi, x) - y).reshape(-1)
        system = LAM * torch.eye(len(y)) + scale * J @ J.T
        a = torch.linalg.solve(system, scale * (J @ (phi - theta) - miss))
        step = theta + J.T @ a - phi

        def objective(size: Tensor, phi: Tensor = phi, step: Tensor = step) -> Tensor:
            new = phi + size * step
            return error(network(new, x), y) + penalty(new, theta)

        best = vmap(objective)(sizes).argmin(0, keepdim=True)
        phi = phi + sizes.index_select(0, best) * step
    return phi


def meta_gradient(
    theta: Tensor, x: Tensor, y: Tensor, query_x: Tensor, query_y: Tensor
) -> tuple[Tensor, hypergrad.SolveInfo]:
    """Return d error(phi*(theta), queries) / d theta of one task, and how its solve went."""
    # What holds at phi*: the inner objective, in the form whose curvature is never negative.
    inner = hypergrad.GaussNewton(
        lambda phi, theta: network(phi, x), lambda outputs, theta: error(outputs, y), penalty
    )

    def outer(phi: Tensor, theta: Tensor) -> Tensor:
        return error(network(phi, query_x), query_y)

    gradient, info = hypergrad.implicit_grad(
        outer, inner, adapt(theta, x, y), theta,
        solver=hypergrad.CG(maxiter=20),  # a budget; a residual below 0.01 is enough to learn
        inner_tol=None, on_failure="ignore", return_info=True,
    )  # fmt: skip
    return gradient, info


def main() -> None:
    """Meta-learn theta, test it on unseen sines, and draw three of them."""
    parser = argparse.ArgumentParser(description="Implicit MAML on sinusoids.")
    parser.add_argument("--meta-steps", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--picture", default="imaml_sinusoid.png")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(1)  # the matrices are small
    began = time.process_time()
    theta = torch.cat([b * (2 * torch.rand(n) - 1) for n, b in zip(SIZES, BOUNDS, strict=True)])
    optimiser = torch.optim.Adam([theta], lr=0.02)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, arguments.meta_steps)
    for step in range(arguments.meta_steps):
        # Written for one task; vmap makes a batch of it, whose linear systems are solved as one.
        gradients, info = vmap(meta_gradient, in_dims=(None, *[0] * 4))(theta, *draw_tasks(TASKS))
        theta.grad = gradients.mean(0)
        optimiser.step()
        schedule.step()
        if (step + 1) % 100 == 0 or step + 1 == arguments.meta_steps:
            print(f"{step + 1:4} meta-steps: error {info.outer_value.mean():.3f}; solves: {info}")
    x, y, query_x, query_y = draw_tasks(600, queries=100)
    adapted = vmap(adapt, in_dims=(None, 0, 0))(theta, x, y)
    before, after = network(theta, query_x), vmap(network)(adapted, query_x)
    errors = [vmap(error)(outputs, query_y) for outputs in (before, after)]
    low, high = (f"{e.mean():.3f} ± {1.96 * e.std() / len(e) ** 0.5:.3f}" for e in errors)
    budget = f"{arguments.meta_steps} meta-steps of {TASKS} tasks, seed {arguments.seed}"
    print(
        f"Mean squared error on 600 unseen sines: {low} before, {high} after adaptation to {SHOTS} "
        f"points ({budget}, {time.process_time() - began:.0f} s)"
    )
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for k, axes in enumerate(panels):
        order = query_x[k, :, 0].argsort()
        lines = ((query_y[k], "unseen sine", "0.6"), (before[k], "before", "tab:orange"),
                 (after[k], "after adaptation", "tab:blue"))  # fmt: skip
        for values, label, colour in lines:
            axes.plot(query_x[k, order, 0], values[order, 0], color=colour, label=label)
        axes.plot(x[k], y[k], "^", color="tab:red", label=f"{SHOTS} points")
        axes.set(xlabel="x", title=f"error {errors[0][k]:.2f} before, {errors[1][k]:.3f} after")
    panels[0].set_ylabel("y")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle(f"Implicit MAML on sines it never saw: {budget}")
    figure.savefig(arguments.picture, dpi=120)
    print(f"Picture: {arguments.picture}")


if __name__ == "__main__":
    main()
