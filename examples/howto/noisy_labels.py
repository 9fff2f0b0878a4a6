"""
Learn from noisy labels in a DataLoader
=======================================

Some labels of your training set are wrong, and you have checked a few. Give each
example a weight. Train the weights by the loss on the checked ones, in the same run.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hypergrad

torch.manual_seed(0)
x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
x, (train, check, test) = x.float() / 16, torch.randperm(1797).split([1000, 60, 737])
wrong = torch.rand(1000) < 0.4
labels = torch.where(wrong, (y[train] + 1) % 10, y[train])
noisy = TensorDataset(x[train], labels, torch.arange(1000))
checked = TensorDataset(x[check], y[check])


def network():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def decay(params, hparams):
    return 1e-3 * sum(p.square().sum() for p in params.values())


# %%
# Make the index of each example the third entry of a batch. It finds the weight of the
# example, the sigmoid of ``hparams["logit"][index]``.
model, trusting, small = network(), network(), network()
problem = hypergrad.supervised(
    model, cross_entropy, penalty=decay, example_weights="logit"
)
loop = hypergrad.Bilevel(
    problem.outer,
    problem.inner,
    problem.params,
    {"logit": torch.zeros(1000)},
    inner_optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
    outer_optimizer=lambda variables: torch.optim.Adam(variables, lr=0.3),
    inner_batches=DataLoader(noisy, 250, shuffle=True),
    outer_batches=DataLoader(checked, 60),
    method=hypergrad.Alternating(inner_tol=None),
)
list(loop.run(80))

# %%
# Train two others as usual: one trusts all labels, one sees the checked ones alone.
# With 200 checked examples the last one would win.
for other, data in ((trusting, noisy), (small, checked)):
    adam = torch.optim.Adam(other.parameters(), lr=0.01, weight_decay=2e-3)
    for inputs, targets, *_ in list(DataLoader(data, 250, shuffle=True)) * 60:
        adam.zero_grad()
        cross_entropy(other(inputs), targets).backward()
        adam.step()
right = [each(x[test]).argmax(1) == y[test] for each in (trusting, small, model)]
scores = [each.float().mean() for each in right]
print("all labels {:.3f}, checked {:.3f}, learnt weights {:.3f}".format(*scores))
weights = loop.hparams["logit"].sigmoid()
plt.figure(figsize=(6, 3.4), layout="constrained")
groups = {"right label": weights[~wrong], "wrong label": weights[wrong]}
plt.hist([*groups.values()], bins=20, label=list(groups))
plt.gca().set(xlabel="learnt weight", ylabel="examples", title="1000 learnt weights")
plt.legend()
plt.show()
