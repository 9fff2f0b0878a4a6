"""
Ten pictures that teach digits
==============================

How few examples does a classifier need, if one may invent them? *Inner*, a classifier is fitted
to ten pictures, one for each digit; *outer*, the pixels of the ten pictures are moved until that
classifier does well on twelve hundred real ones. The hyperparameters are the training set.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import hypergrad

torch.manual_seed(0)

# %%
# The real digits, and what the ten pictures start from: the mean of each class, which is the
# baseline too.

digits = load_digits()
x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train, test = torch.randperm(1797).split([1200, 597])
names = torch.arange(10)
means = torch.stack([x[train][y[train] == digit].mean(0) for digit in names])

# %%
# The two losses: one training set has ten examples, the other twelve hundred.


def inner(w, pictures):
    return cross_entropy(pictures @ w, names) + 1e-3 * (w**2).sum()


def outer(w, pictures):
    return cross_entropy(x[train] @ w, y[train])


# %%
# Learning the pictures. :func:`~hypergrad.implicit_grad` asks for no more than the inner solution.

solve = hypergrad.inner_solvers.LBFGS()
pictures = means.clone()
optimizer = torch.optim.Adam([pictures], lr=0.03)
w, losses = torch.zeros(64, 10), []
for _ in range(60):
    w, _ = solve(inner, w, pictures)
    pictures.grad, info = hypergrad.implicit_grad(outer, inner, w, pictures, return_info=True)
    optimizer.step()
    losses.append(info.outer_value.item())
w, _ = solve(inner, w, pictures)

# %%
# Test accuracy, beside that of other training sets for the same classifier, with the same decay.


def accuracy(w):
    return (x[test] @ w).argmax(1).eq(y[test]).float().mean().item()


def taught_by(examples, labels):
    def loss(w, decay):
        return cross_entropy(examples @ w, labels) + decay * (w**2).sum()

    return accuracy(solve(loss, torch.zeros(64, 10), torch.tensor(1e-3))[0])


chosen = [
    taught_by(x[train][some], names)
    for some in (
        torch.stack([(y[train] == digit).nonzero()[torch.randint(100, ())][0] for digit in names])
        for _ in range(10)
    )
]
print(f"ten real pictures, mean of ten choices  {sum(chosen) / 10:.3f}")
print(f"ten mean pictures                       {taught_by(means, names):.3f}")
print(f"ten learnt pictures                     {accuracy(w):.3f}")
print(f"all 1200 real pictures                  {taught_by(x[train], y[train]):.3f}")

# %%
# The learnt pictures look much alike. What sets each apart is in the last row, and is no digit to
# our eyes: red where it has more ink than the others, blue where it has less.

figure, axes = plt.subplots(3, 10, figsize=(9, 3), layout="constrained")
apart = pictures - pictures.mean(0)
reach = apart.abs().max().item()
drawn = (
    ("means", means, "gray_r", {}),
    ("learnt", pictures, "gray_r", {}),
    ("apart", apart, "RdBu_r", {"vmin": -reach, "vmax": reach}),
)
for row, (name, rows, colors, limits) in enumerate(drawn):
    for digit in names:
        axes[row, digit].imshow(rows[digit].reshape(8, 8).numpy(), cmap=colors, **limits)
        axes[row, digit].set(xticks=[], yticks=[])
    axes[row, 0].set_ylabel(name)
plt.show()
