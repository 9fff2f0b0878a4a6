"""
Weights for a class imbalance
=============================

Some digits are rare in the training set, but all of them count alike. *Inner*, a classifier is
fitted with a weight for each class; *outer*, the weights are moved by its loss on a small
balanced set. :class:`~hypergrad.Bilevel` is the loop that holds both levels, their optimisers and
the warm starts.
"""

import functools

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import hypergrad

torch.manual_seed(0)

# %%
# Of class 0 there are 100 training examples, and of each next class fewer: of class 9 only 4. The
# balanced set has 10 of each class, the test set the rest.

digits = load_digits()
x = torch.cat([torch.tensor(digits.data).float() / 16, torch.ones(1797, 1)], dim=1)
y = torch.tensor(digits.target)
counts = torch.logspace(2, 0.6, 10).round().int().tolist()
train, val, test = [], [], []
for digit, count in enumerate(counts):
    rows = (y == digit).nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows))]
    val.append(rows[:10])
    train.append(rows[10 : 10 + count])
    test.append(rows[110:])
train, val, test = torch.cat(train), torch.cat(val), torch.cat(test)

# %%
# The two losses, and the loop. The softmax keeps the mean weight of the classes at one. Twenty
# inner steps, from where the last ones ended, do not quite solve the inner problem:
# ``inner_tol=None`` says that this is meant.


def inner(w, logits):
    each = cross_entropy(x[train] @ w, y[train], reduction="none")
    return (10 * logits.softmax(0)[y[train]] * each).mean() + 1e-3 * (w**2).sum()


def outer(w, logits):
    return cross_entropy(x[val] @ w, y[val])


loop = hypergrad.Bilevel(
    outer,
    inner,
    torch.zeros(65, 10),
    torch.zeros(10),
    inner_optimizer=functools.partial(torch.optim.Adam, lr=0.03),
    outer_optimizer=functools.partial(torch.optim.Adam, lr=0.1),
    method=hypergrad.Alternating(inner_steps=20, inner_tol=None),
)
losses = [loop.step().outer_value.item() for _ in range(60)]

# %%
# The baselines: no weights, weights by inverse frequency, and the balanced set added to the
# training set, since one may use it that way too.


def fitted(loss, *args):
    w, _ = hypergrad.inner_solvers.LBFGS()(loss, torch.zeros(65, 10), *args)
    right = (x[test] @ w).argmax(1) == y[test]
    return torch.stack([right[y[test] == digit].float().mean() for digit in range(10)])


def both_sets(w, decay):
    rows = torch.cat([train, val])
    return cross_entropy(x[rows] @ w, y[rows]) + decay * (w**2).sum()


recalls = {
    "no weights": fitted(inner, torch.zeros(10)),
    "inverse frequency": fitted(inner, -torch.tensor(counts).log()),
    "both sets, no weights": fitted(both_sets, torch.tensor(1e-3)),
    "learnt weights": fitted(inner, loop.hparams),
}
for name, recall in recalls.items():
    print(f"{name:>21}: accuracy over classes {recall.mean():.3f}, worst class {recall.min():.3f}")

# %%
# What the weights have become, and which classes gain. Inverse frequency comes close here, and so
# does training on both sets; learnt weights need no rule, and say which classes are short of
# examples.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.semilogy(counts, "C7o-", label="training examples")
left.semilogy((100 * loop.hparams.softmax(0)).numpy(), "C1s-", label="learnt weight, %")
left.set(xlabel="class", ylabel="examples, or weight in %", xticks=range(10))
left.set_title("Rare classes weigh more")
left.legend()
for (name, recall), style in zip(recalls.items(), ("C7o-", "C0x:", "C2^:", "C1s-"), strict=True):
    right.plot(recall.numpy(), style, label=name)
right.set(xlabel="class", ylabel="test accuracy", title="Accuracy of each class", xticks=range(10))
right.legend()
plt.show()
