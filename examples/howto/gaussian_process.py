"""
Choose the kernel of a Gaussian process or of kernel ridge
==========================================================

Differentiate the marginal likelihood of a Gaussian process by autograd.
Use an implicit derivative where other data make the choice: here a validation error of
kernel ridge regression, which predicts what the process predicts.
"""

import matplotlib.pyplot as plt
import torch

import hypergrad

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = 4 * torch.rand(120, 3)
y = torch.sin(3 * x[:, 0]) + 0.5 * x[:, 1] + 0.2 * torch.randn(120)  # x[:, 2] is no use
x, x_val, y, y_val = x[:60], x[60:], y[:60], y[60:]


# %%
# A length for each feature, and the noise; all are the exponentials of ``h``.


def kernel(a, b, h):
    apart = (a[:, None] - b) / h["log_length"].exp()
    return (-apart.square().sum(-1) / 2).exp()


def matrix(h):
    return kernel(x, x, h) + h["log_noise"].exp() * torch.eye(60)


# %%
# The weights of the prediction solve a linear system. Its matrix is symmetric and
# positive definite, so state it as the objective that the weights minimise: you are
# warned if the matrix is not definite, and as a :class:`~hypergrad.Root` you are not.


def inner(weights, h):
    return weights @ matrix(h) @ weights / 2 - y @ weights


def outer(weights, h):
    return (kernel(x_val, x, h) @ weights - y_val).square().mean()


# %%
# Solve as you like: by a Cholesky factor, or iteratively where the matrix is large.
h = {"log_length": torch.zeros(3), "log_noise": torch.tensor(-1.0)}
h = {name: value.requires_grad_() for name, value in h.items()}
adam, errors, lengths = torch.optim.Adam(h.values(), lr=0.1), [], []
for _ in range(60):
    adam.zero_grad()
    weights = torch.linalg.solve(matrix(h), y).detach()
    errors.append(hypergrad.implicit_backward(outer, inner, weights, h).item())
    lengths.append(h["log_length"].exp().tolist())
    adam.step()
print(f"validation error at the start {errors[0]:.3f}, at the end {errors[-1]:.3f}")
print("lengths: {:.1f}, {:.1f}, {:.1f}".format(*lengths[-1]))
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
left.plot(errors)
left.set(xlabel="step", ylabel="mean squared error", title="Validation error")
right.semilogy(lengths, label=["wave", "slope", "no use"])
right.set(xlabel="step", ylabel="length", title="A length for each feature")
right.legend()
plt.show()
