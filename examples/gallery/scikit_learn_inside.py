"""
Learn with scikit-learn inside
==============================

The inner solver need not be PyTorch. *Inner*, scikit-learn fits a logistic regression on twenty
features; *outer*, the features themselves, waves whose directions and phases are tensors, are
moved so that what scikit-learn fits does well on a validation set.
:func:`~hypergrad.custom_argmin` needs to know the objective that scikit-learn minimises, and how
it does so plays no part.
"""

import math

import matplotlib.pyplot as plt
import torch
from sklearn.linear_model import LogisticRegression
from torch.nn.functional import softplus

import hypergrad

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
# Two spirals, with some noise.


def spirals(n):
    label = torch.randint(2, (n,)) * 2 - 1
    angle = 1 + 8 * torch.rand(n)
    points = angle[:, None] * torch.stack([angle.cos(), angle.sin()], dim=1) * label[:, None] / 9
    return points + 0.03 * torch.randn(n, 2), label


x, y = spirals(200)
x_val, y_val = spirals(200)
x_test, y_test = spirals(1000)


def waves(x, hparams):
    return torch.cos(x @ hparams["directions"] + hparams["phases"])


# %%
# The objective as scikit-learn's documentation states it, and the fit. It is called with plain
# tensors, outside autograd, and may go where it likes.

C = 10.0


def objective(w, z, y):
    return (w**2).sum() / 2 + C * softplus(-y * (z @ w)).sum()


@hypergrad.custom_argmin(objective)
def fit(init, z, y):
    model = LogisticRegression(C=C, fit_intercept=False, solver="newton-cholesky", tol=1e-8)
    return torch.tensor(model.fit(z.numpy(), y.numpy()).coef_[0])


# %%
# Training: `fit` is a function like any other.

start = {"directions": 3 * torch.randn(2, 20), "phases": 2 * math.pi * torch.rand(20)}
hparams = {name: tensor.clone().requires_grad_() for name, tensor in start.items()}
optimizer = torch.optim.Adam(hparams.values(), lr=0.1)
losses = []
for _ in range(60):
    optimizer.zero_grad()
    w = fit(torch.zeros(20), waves(x, hparams), y)
    loss = softplus(-y_val * (waves(x_val, hparams) @ w)).mean()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())

# %%
# The baseline is the same number of waves in random directions, at the best of several scales.


@torch.no_grad()
def fitted(hparams):
    w = fit(torch.zeros(20), waves(x, hparams), y)
    right = (waves(x_test, hparams) @ w * y_test > 0).double().mean().item()
    return right, lambda points: waves(points, hparams) @ w


scales = {s: {**start, "directions": start["directions"] * s} for s in (0.5, 1, 2, 4)}
best = max(fitted(random)[0] for random in scales.values())
print(f"test accuracy: random waves {fitted(start)[0]:.3f}, at their best scale {best:.3f}")
print(f"               learnt waves {fitted(hparams)[0]:.3f}")

# %%
# What scikit-learn makes of the features before and after.

figure, axes = plt.subplots(1, 3, figsize=(9, 3), layout="constrained")
grid = torch.linspace(-1.1, 1.1, 100)
points = torch.cartesian_prod(grid, grid)
for axis, waves_used, title in zip(
    axes, (start, hparams), ("random waves", "learnt waves"), strict=False
):
    scores = fitted(waves_used)[1](points).detach().reshape(100, 100).T.sigmoid()
    axis.contourf(grid, grid, scores.numpy(), levels=20, cmap="RdBu")
    axis.scatter(*x.T, c=y, cmap="RdBu", edgecolors="w", linewidths=0.5, s=20)
    axis.set(title=title, xticks=[], yticks=[], aspect="equal")
axes[2].semilogy(losses)
axes[2].set(title="Validation loss", xlabel="step")
plt.show()
