"""
A deep equilibrium layer
========================

A layer that is applied until nothing changes any more: its output is the fixed point ``z = tanh(z
W + x U + b)``. *Inner*, Anderson's method finds that point; *outer*, the network around it is
trained as usual. :func:`~hypergrad.custom_fixed_point` makes the solver a function that autograd
differentiates, with the memory of one application, however many the solver took.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from torch.nn.functional import cross_entropy

import hypergrad

torch.manual_seed(0)

# %%
# The layer, and its fixed point as a function of everything that it depends on. `V` is scaled so
# that the layer contracts, whatever is learnt: then there is one fixed point.


def layer(z, x, V, U, b):
    W = 0.9 * V / torch.linalg.matrix_norm(V, 2)
    return torch.tanh(z @ W + x @ U + b)


@hypergrad.custom_fixed_point(layer)
def equilibrium(z, *args):
    return hypergrad.inner_solvers.Anderson()(layer, z, *args)[0]


def once(z, *args):  # the baseline: an ordinary layer
    return layer(z, *args)


# %%
# Digits, and a network of that layer and a linear one.

digits = load_digits()
x, y = torch.tensor(digits.data).float() / 16, torch.tensor(digits.target)
train, test = torch.randperm(1797).split([1200, 597])


def train_network(hidden):
    torch.manual_seed(1)
    weights = [torch.randn(40, 40), torch.randn(64, 40) / 8, torch.zeros(40), torch.zeros(40, 10)]
    weights = [weight.requires_grad_() for weight in weights]
    optimizer = torch.optim.Adam(weights, lr=0.01)
    losses = []
    for _ in range(8):
        for batch in train[torch.randperm(1200)].split(200):
            *inside, readout = weights
            z = hidden(torch.zeros(len(batch), 40), x[batch], *inside)
            loss = cross_entropy(z @ readout, y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return [weight.detach() for weight in weights], losses


deep, deep_losses = train_network(equilibrium)
shallow, shallow_losses = train_network(once)

# %%
# Is the gradient right? Beside it, that of the layer applied a hundred times, which has to keep
# every one of the hundred results.


def gradient(hidden):
    V, U, b, readout = deep
    V = V.clone().requires_grad_()
    z = hidden(torch.zeros(597, 40), x[test], V, U, b)
    return torch.autograd.grad(cross_entropy(z @ readout, y[test]), V)[0]


def applied(z, *args, times=100):
    for _ in range(times):
        z = layer(z, *args)
    return z


difference = (gradient(equilibrium) - gradient(applied)).norm() / gradient(applied).norm()
print(f"implicit gradient against 100 applications: {difference:.0e} apart")

# %%
# What the two networks do on the test set when their layer is applied another number of times than
# they were trained with. Both are equally accurate here, at what they were trained with; from five
# applications on the equilibrium does not care how many there are.


def test_loss(weights, times):
    *inside, readout = weights
    scores = applied(torch.zeros(597, 40), x[test], *inside, times=times) @ readout
    accuracy = scores.argmax(1).eq(y[test]).float().mean().item()
    return cross_entropy(scores, y[test]).item(), accuracy


print(f"equilibrium: test accuracy {test_loss(deep, 100)[1]:.3f}")
print(f"one application: {test_loss(shallow, 1)[1]:.3f}")
print(f"  the same, applied 100 times: {test_loss(shallow, 100)[1]:.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.semilogy(deep_losses, label="equilibrium")
left.semilogy(shallow_losses, label="one application")
left.set(xlabel="step", ylabel="training loss", title="Training")
left.legend()
times = range(1, 31)
right.plot(times, [test_loss(deep, k)[0] for k in times], label="trained at equilibrium")
right.plot(times, [test_loss(shallow, k)[0] for k in times], label="trained with one application")
right.set(xlabel="applications of the layer", ylabel="test loss", title="Applied more often")
right.legend()
plt.show()
