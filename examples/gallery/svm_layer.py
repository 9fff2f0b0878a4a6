"""
A support vector machine as a layer
===================================

The kernel of a support vector machine has a width for each feature, and a bound ``C`` on the
multipliers. *Inner*, the dual quadratic program is solved, with its multipliers between 0 and
``C``; *outer*, widths and ``C`` are moved by the loss on a validation set. The solution sits on
its bounds at about half of the examples, and the derivative knows: the condition,
:class:`~hypergrad.ProjectedGradient`, is the fixed point of a projected gradient step.
"""

import matplotlib.pyplot as plt
import torch
from torch.nn.functional import softplus

import hypergrad
from hypergrad import projections

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
# Stripes: the class depends on the first feature alone, and ten labels in a hundred are wrong.


def stripes(n):
    x = 4 * torch.rand(n, 2) - 2
    return x, torch.sin(4 * x[:, 0]).sign() * torch.where(torch.rand(n) < 0.1, -1.0, 1.0)


x, y = stripes(150)
x_val, y_val = stripes(150)
x_test, y_test = stripes(2000)


# %%
# The dual program for a matrix of kernels and a bound, the projection onto what it allows, and the
# layer: the multipliers as a function of both. A tenth on the diagonal keeps it strictly convex.


def dual(alpha, K, C):
    signed = alpha * y
    return (signed @ (K @ signed) + 0.1 * signed @ signed) / 2 - alpha.sum()


def project(v, K, C):
    return projections.box(v, 0.0, C)


@hypergrad.custom_argmin(hypergrad.ProjectedGradient(dual, project, step_size=0.02))
def multipliers(init, K, C):
    fista = hypergrad.inner_solvers.FISTA(lambda v, step_size, K, C: project(v, K, C), tol=1e-6)
    return fista(dual, init, K, C)[0]


# %%
# The classifier around it.


def kernel(a, b, widths):
    return torch.exp(-((a[:, None] - b) / widths).square().sum(-1) / 2)


def classifier(widths, C, init):
    alpha = multipliers(init, kernel(x, x, widths), C)
    return alpha, lambda points: kernel(points, x, widths) @ (alpha * y)


def loss(score):
    return softplus(-y_val * score(x_val)).mean()


# %%
# Training the widths and ``C``, which start at one.

log_widths, log_bound = torch.zeros(2, requires_grad=True), torch.zeros((), requires_grad=True)
optimizer = torch.optim.Adam([log_widths, log_bound], lr=0.2)
alpha = torch.zeros(150)
for _ in range(25):
    optimizer.zero_grad()
    alpha, score = classifier(log_widths.exp(), log_bound.exp(), alpha.detach())
    loss(score).backward()
    optimizer.step()

# %%
# The baseline is one width for both features: the best of a grid of widths and ``C``, by the same
# loss.

torch.set_grad_enabled(False)
widths, C = log_widths.exp(), log_bound.exp()
learnt = classifier(widths, C, alpha)
grid = [
    classifier(torch.tensor([width, width]), torch.tensor(bound), torch.zeros(150))
    for width in (0.15, 0.3, 0.6)
    for bound in (0.3, 1.0, 3.0)
]
best = min(grid, key=lambda candidate: loss(candidate[1]))

print(f"widths {widths[0]:.2f} and {widths[1]:.2f}, C {C:.2f}")
for name, (alpha, score) in (("best of the grid", best), ("learnt", learnt)):
    accuracy = (score(x_test) * y_test > 0).double().mean()
    print(f"{name:>16}: {int((alpha > 0).sum())} support vectors, test accuracy {accuracy:.3f}")
print("labels that are right, and so the best there is: 0.900")

# %%
# The decision functions; support vectors have a black edge.

figure, axes = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
ticks = torch.linspace(-2, 2, 60)
points = torch.cartesian_prod(ticks, ticks)
titles = ("one width, best of the grid", "learnt widths and C")
for axis, (alpha, score), title in zip(axes, (best, learnt), titles, strict=True):
    values = score(points).reshape(60, 60).T.tanh()
    axis.contourf(ticks, ticks, values.numpy(), levels=20, cmap="RdBu")
    edges = ["black" if multiplier > 0 else "white" for multiplier in alpha]
    axis.scatter(*x.T, c=y, cmap="RdBu", edgecolors=edges, s=24)
    axis.scatter([], [], c="w", edgecolors="black", s=24, label="support vector")
    axis.set(title=title, xlabel="first input", ylabel="second input", aspect="equal")
figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", facecolor="0.8")
plt.show()
