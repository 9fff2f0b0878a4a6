"""
A weight decay for each feature
===============================

One weight decay can be found by trying twenty. A hundred cannot; but they can be learnt. *Inner*,
ridge regression with a penalty for each feature; *outer*, the error on a validation set,
minimised over the logarithms of the penalties. Most of the features know nothing: will they be
switched off?
"""

import matplotlib.pyplot as plt
import torch

import hypergrad

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
# A hundred features, of which ten count, and noise of standard deviation 1.5. 120 examples for
# training, 120 for validation, 2000 for the test.

truth = torch.cat([torch.ones(10), torch.zeros(90)])
x, x_val, x_test = (torch.randn(n, 100) for n in (120, 120, 2000))
y, y_val, y_test = (a @ truth + 1.5 * torch.randn(len(a)) for a in (x, x_val, x_test))

# %%
# The two losses, and the inner solution, which has a closed form here. Any other solver would do.


def inner(w, penalty):
    return ((x @ w - y) ** 2).mean() + (penalty * w**2).sum()


def outer(w, penalty):
    return ((x_val @ w - y_val) ** 2).mean()


def ridge(penalty):
    return torch.linalg.solve(x.T @ x / 120 + penalty.diag(), x.T @ y / 120)


# %%
# The loop. :func:`~hypergrad.implicit_backward` fills ``log_penalty.grad``, through the
# exponential.

log_penalty = torch.full((100,), -2.0, requires_grad=True)
optimizer = torch.optim.Adam([log_penalty], lr=0.05)
history = []
for _ in range(150):
    w = ridge(log_penalty.exp().detach())
    optimizer.zero_grad()
    loss = hypergrad.implicit_backward(outer, inner, w, log_penalty.exp())
    optimizer.step()
    history.append((loss.item(), ((x_test @ w - y_test) ** 2).mean().item()))

# %%
# The baseline is one penalty for all features: the best of thirty, by the same validation set. An
# oracle that knows the ten features and fits no other says what is possible.

fits = [ridge(candidate.expand(100)) for candidate in torch.logspace(-4, 2, 30)]
one = min(fits, key=lambda v: outer(v, None))
oracle = torch.zeros(100)
oracle[:10] = torch.linalg.lstsq(x[:, :10], y).solution
for name, v in (("one penalty", one), ("a hundred", w), ("oracle", oracle)):
    errors = outer(v, None), ((x_test @ v - y_test) ** 2).mean()
    useless = (v[10:].norm() / v.norm()).item()
    print(
        f"{name:>11}: validation error {errors[0]:.2f}, test error {errors[1]:.2f}, "
        f"share of the useless features in the norm {useless:.2f}"
    )

# %%
# The penalties, and how the errors have fallen. The validation error is too good to be true, as a
# hundred numbers were fitted to it; the test error tells what they are worth.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
penalties = log_penalty.detach().exp()
left.semilogy(range(10), penalties[:10].numpy(), "o", label="features that count")
left.semilogy(range(10, 100), penalties[10:].numpy(), "x", label="features that do not")
left.set(xlabel="feature", ylabel="learnt penalty", title="A hundred penalties", ylim=(1e-3, 1e3))
left.legend()
names = ("validation", "test")
for curve, name, color in zip(zip(*history, strict=True), names, ("C0", "C1"), strict=True):
    right.plot(curve, color, label=name)
for value, color in ((outer(one, None), "C0"), (((x_test @ one - y_test) ** 2).mean(), "C1")):
    right.axhline(value.item(), color=color, linestyle=":")
right.set(xlabel="step", ylabel="error", title="Learning them (dotted: one penalty)")
right.legend()
plt.show()
