"""
A solver of your own
====================

Your solver is SciPy, a C library or a binary, and returns numbers without gradients.
State what it minimises, and :func:`~hypergrad.custom_argmin` differentiates its answer.
"""

import matplotlib.pyplot as plt
import torch
from scipy.optimize import minimize

import hypergrad

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x = torch.linspace(0, 5, 40)
y = 2 * torch.exp(-0.7 * x) + 0.1 * torch.randn(40)
y[::8] += 1.5  # outliers


# %%
# The objective is a function of the answer, then of what you differentiate by: here a
# robust fit, and the scale beyond which a residual counts as an outlier.


def objective(w, log_scale):
    residual = w[0] * torch.exp(-w[1] * x) - y
    scale = log_scale.exp()
    return (scale**2 * ((1 + (residual / scale) ** 2).sqrt() - 1)).sum()


# %%
# The solver gets plain tensors, and may leave PyTorch. Return a tensor like ``init``.
# SciPy gets its gradient from PyTorch here; yours may do without.


@hypergrad.custom_argmin(objective)
def fit(init, log_scale):
    def value_and_slope(w):
        slope, value = torch.func.grad_and_value(objective)(torch.tensor(w), log_scale)
        return value.item(), slope.numpy()

    result = minimize(value_and_slope, init.numpy(), jac=True, tol=1e-10)
    return torch.tensor(result.x)


# %%
# Differentiate. Compare with a central difference: two more calls of the solver.
log_scale, init = torch.tensor(-1.0, requires_grad=True), torch.ones(2)
w = fit(init, log_scale)
(slope,) = torch.autograd.grad(w[1], log_scale)
above, below = (fit(init, log_scale.detach() + h)[1] for h in (1e-4, -1e-4))
print(f"fitted rate {w[1]:.4f}, its derivative by the log of the scale {slope:.5f}")
print(f"the central difference: {(above - below) / 2e-4:.5f}")
scales = torch.linspace(-4, 2, 40)
rates = [fit(init, scale)[1] for scale in scales]
plt.figure(figsize=(6, 3.4), layout="constrained")
plt.plot(scales.exp(), rates, label="solutions")
tangent = w[1].detach() + slope * (scales - log_scale.detach())
near = (scales + 1).abs() < 1
plt.plot(scales[near].exp(), tangent[near], "--", label="the derivative at one of them")
plt.gca().set(xlabel="scale", ylabel="fitted rate", xscale="log")
plt.legend()
plt.show()
