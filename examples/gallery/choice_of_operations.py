"""
A choice of operations
======================

Architecture search in small: which function should be applied to which input? *Inner*, the
coefficients of a sum of all candidates are fitted, each candidate weighted by a softmax; *outer*,
the softmax is moved by the error on a validation set, as in DARTS (Liu et al., 2019). No second
derivative is taken: :func:`~hypergrad.finite_difference_grad` has a difference of two gradients
in its place, and :class:`~hypergrad.Bilevel` alternates between the levels.
"""

import functools
import itertools

import matplotlib.pyplot as plt
import torch

import hypergrad

torch.manual_seed(0)

# %%
# Four inputs, and to each another operation has been applied. Seven to the fourth power are 2401
# choices.

operations = {
    "zero": lambda x: 0 * x,
    "x": lambda x: x,
    "|x|": torch.abs,
    "x²": torch.square,
    "sin 3x": lambda x: torch.sin(3 * x),
    "cos 3x": lambda x: torch.cos(3 * x),
    "sign": torch.sign,
}
names = list(operations)
truth = ["sin 3x", "|x|", "zero", "sign"]


def data(n):
    x = 3 * torch.rand(n, 4) - 1.5
    y = sum(operations[name](x[:, i]) for i, name in enumerate(truth)) + 0.3 * torch.randn(n)
    columns = torch.stack([operation(x) for operation in operations.values()], dim=2)
    return columns - columns.mean(0), y - y.mean()


(train, y), (val, y_val), (test, y_test) = data(150), data(150), data(2000)

# %%
# The mixture, with coefficients `w` and the numbers `alpha` behind the softmax, both (4 inputs, 7
# operations).


def mixture(columns, w, alpha):
    return (columns * w * alpha.softmax(1)).sum((1, 2))


def inner(w, alpha):
    return ((mixture(train, w, alpha) - y) ** 2).mean() + 1e-2 * (w**2).sum()


def outer(w, alpha):
    return ((mixture(val, w, alpha) - y_val) ** 2).mean()


def darts(outer, inner, w, alpha):
    return hypergrad.finite_difference_grad(outer, inner, w, alpha, lr=0.5)


# %%
# The loop.

loop = hypergrad.Bilevel(
    outer,
    inner,
    torch.ones(4, 7),
    torch.zeros(4, 7),
    inner_optimizer=functools.partial(torch.optim.SGD, lr=0.5),
    outer_optimizer=functools.partial(torch.optim.Adam, lr=0.05),
    method=hypergrad.Alternating(inner_steps=5, estimator=darts),
)
path = []
for _ in range(200):
    loop.step()
    path.append(loop.hparams.softmax(1).clone())

# %%
# For each input the operation of largest weight is kept, and the coefficients are fitted again.
# The baseline is exhaustive search, which is possible here: all 2401 choices by the validation
# error. It may fit noise; so may the search.


def refitted(choice):
    inputs = torch.arange(4)
    fit = torch.linalg.lstsq(train[:, inputs, choice], y, rcond=1e-6, driver="gelsd").solution
    return [
        ((c[:, inputs, choice] @ fit - t) ** 2).mean() for c, t in ((val, y_val), (test, y_test))
    ]


chosen = loop.hparams.argmax(1)
errors = {choice: refitted(choice) for choice in itertools.product(range(7), repeat=4)}
best = min(errors, key=lambda choice: errors[choice][0])
others = torch.stack([test_error for _, test_error in errors.values()])
for name, choice in (("search", chosen.tolist()), ("exhaustive", best)):
    found = ", ".join(names[operation] for operation in choice)
    print(f"{name:>10}: {found}; test error {errors[tuple(choice)][1]:.3f}")
print(f"     truth: {', '.join(truth)}; noise alone 0.090")
print(f"    median of all choices: test error {others.median():.3f}")

# %%
# The weights of the operations on their way.

figure, axes = plt.subplots(1, 4, figsize=(9, 3), sharey=True, layout="constrained")
for i, axis in enumerate(axes):
    for operation, name in enumerate(names):
        axis.plot([weights[i, operation] for weights in path], label=name)
    axis.set(title=f"input {i + 1}: {truth[i]}", xlabel="step", ylim=(0, 1))
axes[0].set_ylabel("weight")
handles, _ = axes[0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside right upper")
plt.show()
