"""
Find the wrong labels
=====================

Half of the labels of a training set are wrong, and nobody knows which. One hundred labels have
been checked. Every training example gets a weight: *inner*, a classifier is fitted to the
weighted examples; *outer*, the weights are moved so that this classifier does well on the checked
ones. The hypergradient has an entry for each of the thousand weights, and costs one linear solve.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy, pad

import hypergrad

torch.manual_seed(0)

# %%
# Handwritten digits of 8 x 8 pixels; the column of ones is the bias. Half of the training labels
# are those of the next digit, a mistake that the labels alone cannot give away.

digits = load_digits()
x = torch.cat([torch.tensor(digits.data).float() / 16, torch.ones(1797, 1)], dim=1)
y = torch.tensor(digits.target)
train, val, test = torch.randperm(1797).split([1000, 100, 697])
wrong = torch.rand(1000) < 0.5
labels = torch.where(wrong, (y[train] + 1) % 10, y[train])

# %%
# The two losses. The weights are the sigmoids of free numbers, so that they stay between 0 and 1.


def inner(w, logits):
    each = cross_entropy(x[train] @ w, labels, reduction="none")
    return (logits.sigmoid() * each).mean() + 3e-3 * (w**2).sum()


def outer(w, logits):
    return cross_entropy(x[val] @ w, y[val])


# %%
# The loop: solve the inner problem from where the last solution was, take the hypergradient by
# :func:`~hypergrad.implicit_grad`, let Adam make a step.

solve = hypergrad.inner_solvers.LBFGS()
logits = torch.zeros(1000)
optimizer = torch.optim.Adam([logits], lr=0.3)
w, _ = solve(inner, torch.zeros(65, 10), logits)
uncleaned = w
for _ in range(30):
    logits.grad = hypergrad.implicit_grad(outer, inner, w, logits)
    optimizer.step()
    w, _ = solve(inner, w, logits)

# %%
# An example is called wrong where its weight has fallen below one half, or where the classifier
# that came out disagrees with its label. The baseline is a classifier that has seen the checked
# examples alone.


def report(name, found, w):
    hits = (found & wrong).sum()
    precision, recall = (hits / found.sum()).item(), (hits / wrong.sum()).item()
    accuracy = (x[test] @ w).argmax(1).eq(y[test]).float().mean().item()
    print(f"{name:>28} {precision:9.3f} {recall:9.3f} {accuracy:9.3f}")


def checked_alone(w, decay):
    return cross_entropy(x[val] @ w, y[val]) + decay * (w**2).sum()


def disagrees(w):
    return (x[train] @ w).argmax(1) != labels


small, _ = solve(checked_alone, torch.zeros(65, 10), torch.tensor(3e-3))
print(f"{int(wrong.sum())} of 1000 wrong               precision    recall  test accuracy")
report("all labels trusted", disagrees(uncleaned), uncleaned)
report("checked examples alone", disagrees(small), small)
report("learnt weight below 1/2", logits < 0, w)
report("classifier learnt with them", disagrees(w), w)

# %%
# What the weights have become, and the twelve labels that are trusted least.

figure, (left, right) = plt.subplots(
    1, 2, figsize=(10, 3.2), width_ratios=[1, 1.9], layout="constrained"
)
figure.get_layout_engine().set(wspace=0.06)
weights = logits.sigmoid()
left.hist(
    [weights[~wrong].numpy(), weights[wrong].numpy()], bins=20, label=["right label", "wrong label"]
)
left.set(xlabel="learnt weight", ylabel="examples", title="Weights of 1000 examples")
left.legend()

least = logits.argsort()[:12].reshape(2, 6)
pictures = pad(x[train][least][:, :, :64].reshape(2, 6, 8, 8), (1, 1, 1, 1))
pictures = pictures.permute(0, 2, 1, 3).reshape(20, 60)
right.imshow(pictures.numpy(), cmap="Greys")
for row in range(2):
    for column in range(6):
        label = str(labels[least[row, column]].item())
        right.text(10 * column, 10 * row + 1.5, label, color="C3", weight="bold")
right.set(title="Trusted least, with the labels given (red)", xticks=[], yticks=[])
plt.show()
