"""
Find the training examples that harm
====================================

Which training examples raise your validation loss? Ask :func:`~hypergrad.influence`: it
leaves out each example, to first order, and trains nothing again.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hypergrad

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
train, valid = torch.randperm(1797)[:400].split([200, 200])
labels = y[train].clone()
labels[:20] = (labels[:20] + 1) % 10  # twenty wrong ones
model = nn.Sequential(nn.Linear(64, 12), nn.Tanh(), nn.Linear(12, 10))

# %%
# Write the loss of each example, and what belongs to none: the weight decay. Train to a
# minimum of their sum, since influence is a derivative of the minimum.


def train_each(params):
    outputs = functional_call(model, params, x[train] / 16)
    return cross_entropy(outputs, labels, reduction="none")


def valid_loss(params):
    return cross_entropy(functional_call(model, params, x[valid] / 16), y[valid])


def decay(params):
    return sum(p.square().sum() for p in params.values())


def objective(params, keep):
    return (keep * train_each(params)).sum() + decay(params)


start = {name: p.detach() for name, p in model.named_parameters()}
solve = hypergrad.inner_solvers.LBFGS(maxiter=1000, tol=1e-5)
params, _ = solve(objective, start, torch.ones(200))

# %%
# Ask. A negative change means that the loss falls without the example.
change = hypergrad.influence(
    lambda params: valid_loss(params)[None], train_each, params, regulariser=decay
)[0]
worst = change.argsort()
print(f"{(worst[:20] < 20).sum()} of the 20 most harmful examples have a wrong label")

# %%
# Compare with training again for four of them. First order has signs and ranks
# right, and is too small where one example weighs much.
some, again = worst[[0, 1, 198, 199]], []
for i in some:
    without, _ = solve(objective, params, (torch.arange(200) != i).double())
    again.append(valid_loss(without) - valid_loss(params))
    print(f"example {i:3}: predicted {change[i]:+.4f}, trained again {again[-1]:+.4f}")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
groups = [change[20:].numpy(), change[:20].numpy()]
left.hist(groups, 30, label=["right label", "wrong label"])
left.set(xlabel="change of the loss", ylabel="examples", yscale="log")
left.legend()
right.plot(change[some], again, "o", label="four examples")
right.axline((0, 0), slope=1, color="gray", linestyle="--", label="equal")
right.set(xlabel="change, predicted", ylabel="change, trained again")
right.legend()
plt.show()
