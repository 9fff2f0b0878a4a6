"""
A learnt loss
=============

Squares suit normal noise, and are misled by outliers; which loss suits the noise at hand?
*Inner*, a curve is fitted by a loss with a scale and a shape that leads from squares over
absolute values to losses that ignore outliers (Barron, A general and adaptive robust loss
function, 2019); *outer*, scale and shape are moved by the error on a few measurements that are
known to be good.
"""

import matplotlib.pyplot as plt
import torch

import hypergrad

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
# A curve measured at 200 points, a third of which are off, and always to the same side. Twenty
# points have been measured again, with care.


def basis(x):
    return torch.cos(torch.pi * x[:, None] * torch.arange(8))


def curve(x):
    return torch.sin(5 * x) + x


x, x_good, x_test = torch.rand(200), torch.rand(20), torch.linspace(0, 1, 500)
outliers = torch.rand(200) < 1 / 3
y = curve(x) + 0.1 * torch.randn(200) + torch.where(outliers, 3 * torch.rand(200), 0)
y_good = curve(x_good) + 0.1 * torch.randn(20)

# %%
# The loss: a shape of 2 means squares, of 1 absolute values that are smooth at zero, below 0 the
# influence of an outlier vanishes. (At 0 and 2 the formula is a limit; the small number keeps off
# them.)


def robust(residual, hparams):
    shape, scale = hparams["shape"] + 1e-6, hparams["log_scale"].exp()
    size = (shape - 2).abs()
    return size / shape * (((residual / scale) ** 2 / size + 1) ** (shape / 2) - 1)


def inner(w, hparams):
    return robust(basis(x) @ w - y, hparams).mean() + 1e-4 * (w**2).sum()


def outer(w, hparams):
    return ((basis(x_good) @ w - y_good) ** 2).mean()


# %%
# Learning it, from nearly squares on. Hyperparameters may be a dict; so are the gradients of
# :func:`~hypergrad.implicit_grad` then.

solve = hypergrad.inner_solvers.LBFGS()
hparams = {"shape": torch.tensor(1.8), "log_scale": torch.tensor(0.0)}
optimizer = torch.optim.Adam(hparams.values(), lr=0.1)
w, path = torch.zeros(8), []
for _ in range(60):
    w, _ = solve(inner, w, hparams)
    path.append((
        hparams["shape"].item(),
        hparams["log_scale"].exp().item(),
        outer(w, hparams).item(),
    ))
    gradients = hypergrad.implicit_grad(outer, inner, w, hparams)
    for name, tensor in hparams.items():
        tensor.grad = gradients[name]
    optimizer.step()
w, _ = solve(inner, w, hparams)

# %%
# The error against the true curve, beside that of other losses and of the good points alone.


def good_alone(w, decay):
    return ((basis(x_good) @ w - y_good) ** 2).mean() + decay * (w**2).sum()


def squares(w, decay):
    return ((basis(x) @ w - y) ** 2).mean() + decay * (w**2).sum()


def absolute(w, decay):
    return ((basis(x) @ w - y) ** 2 + 1e-4).sqrt().mean() + decay * (w**2).sum()


fits = {"learnt loss": w}
for name, loss in (
    ("squares", squares),
    ("absolute values", absolute),
    ("good points alone", good_alone),
):
    fits[name], _ = solve(loss, torch.zeros(8), torch.tensor(1e-4))
for name, fit in fits.items():
    error = (basis(x_test) @ fit - curve(x_test)).square().mean().sqrt()
    print(f"{name:>17}: error {error:.3f}")
print(f"shape {hparams['shape']:.2f}, scale {hparams['log_scale'].exp():.2f}")

# %%
# The curves, and the losses themselves.

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
left.plot(x, y, "k.", alpha=0.3)
left.plot(x_good, y_good, "k+", markersize=10)
left.plot(x_test, curve(x_test), "k:", label="truth")
for (name, fit), color in zip(fits.items(), ("C1", "C0", "C2", "C7"), strict=True):
    left.plot(x_test, basis(x_test) @ fit, color, label=name)
left.legend(fontsize="small")
residual = torch.linspace(-3, 3, 300)
for step in (0, 10, 20, 59):
    shape, scale, _ = path[step]
    at = {"shape": torch.tensor(shape), "log_scale": torch.tensor(scale).log()}
    right.plot(residual, robust(residual, at), label=f"step {step}: shape {shape:.1f}")
right.set(xlabel="residual", title="The loss, as it is learnt", ylim=(0, 9))
right.legend()
plt.show()
