"""
Tune the weight decay of a network that Adam trains
===================================================

Train the weight decay of each layer by the validation loss, in the run of the weights.
"""

import copy

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import hypergrad

torch.manual_seed(0)
x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
parts = torch.randperm(1797).split([150, 300, 1347])
train, valid, test = (TensorDataset(x[i].float() / 16, y[i]) for i in parts)
train_loader, valid_loader = DataLoader(train, 50, shuffle=True), DataLoader(valid, 150)
model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
plain = copy.deepcopy(model)

# %%
# Name the parameters that have a decay: here the two matrices. ``exp(log_decay)`` is
# what Adam calls ``weight_decay``. Ten steps of Adam go between two of the decay, and
# ``inner_tol=None`` says that ten need not solve the inner problem.
problem = hypergrad.supervised(model, cross_entropy, penalty="log_decay")
start = {name: torch.tensor(-7.0) for name, p in problem.params.items() if p.ndim == 2}
loop = hypergrad.Bilevel(
    problem.outer,
    problem.inner,
    problem.params,
    {"log_decay": start},
    inner_optimizer=torch.optim.Adam(model.parameters(), lr=0.01),
    outer_optimizer=lambda variables: torch.optim.Adam(variables, lr=0.1),
    inner_batches=train_loader,
    outer_batches=valid_loader,
    method=hypergrad.Alternating(inner_tol=None),
)
rates, losses, (x, y) = [], [], test.tensors
for _ in loop.run(100):
    rates.append([rate.exp().item() for rate in loop.hparams["log_decay"].values()])
    losses.append(cross_entropy(model(x), y).item())

# %%
# Train the copy for as many steps, without decay. A sweep of fixed rates would do
# as well as the learnt ones; the loop spares you the sweep.
adam = torch.optim.Adam(plain.parameters(), lr=0.01)
for inputs, labels in (batch for _ in range(334) for batch in train_loader):
    adam.zero_grad()
    cross_entropy(plain(inputs), labels).backward()
    adam.step()
without = cross_entropy(plain(x), y).item()
print("decay of the first layer {:.4f}, of the second {:.4f}".format(*rates[-1]))
print(f"test loss with it {losses[-1]:.3f}, without decay {without:.3f}")
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(rates, label=["first layer", "second layer"])
left.set(xlabel="outer step", ylabel="weight decay", title="The decay of each layer")
left.legend()
right.plot(losses, label="learnt decay")
right.axhline(without, color="gray", linestyle="--", label="no decay, at the end")
right.set(xlabel="outer step", ylabel="test loss", ylim=(0.2, 0.5))
right.legend()
plt.show()
