"""
Tune scikit-learn's LogisticRegression and SVC by gradients
===========================================================

Let scikit-learn fit, and move ``C`` and ``gamma`` by the gradient of a validation loss.
State what scikit-learn minimises; its documentation has the formulae.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from sklearn.linear_model import LogisticRegression
from sklearn.svm import SVC
from torch.nn.functional import softplus

import hypergrad

torch.set_default_dtype(torch.float64)
x, y = (torch.tensor(array) for array in make_moons(600, noise=0.35, random_state=0))
y = 2.0 * y - 1
(x, x_val), (y, y_val) = (a.split([80, 520]) for a in (x, y))


def loss(scores):
    return softplus(-y_val * scores).mean()


# %%
# ``LogisticRegression``: a function of ``init`` and of what you differentiate by.


def logistic(w, C):
    return w.square().sum() / 2 + C * softplus(-y * (x @ w)).sum()


@hypergrad.custom_argmin(logistic)
def fit(init, C):
    model = LogisticRegression(C=C.item(), fit_intercept=False, tol=1e-8)
    return torch.tensor(model.fit(x.numpy(), y.numpy()).coef_[0])


# %%
# ``SVC``: the dual program, its equality and its bounds as a :class:`~hypergrad.KKT`.
# The multipliers come from ``multipliers``; that of the equality is the intercept.


def kernel(a, b, h):
    return (-h["log_gamma"].exp() * (a[:, None] - b).square().sum(-1)).exp()


def dual(alpha, h):
    return (alpha * y) @ kernel(x, x, h) @ (alpha * y) / 2 - alpha.sum()


def balance(alpha, h):
    return alpha @ y


def bounds(alpha, h):
    return torch.cat([-alpha, alpha - h["log_C"].exp()])


def outer(params, h):
    return loss(kernel(x_val, x, h) @ (params[0] * y) + params[1])


program = hypergrad.KKT(dual, equalities=balance, inequalities=bounds)


def svc(h):
    C, gamma = h["log_C"].exp().item(), h["log_gamma"].exp().item()
    model = SVC(C=C, gamma=gamma, tol=1e-10).fit(x.numpy(), y.numpy())
    alpha = torch.zeros(80)
    alpha[model.support_] = torch.tensor(model.dual_coef_[0]).abs()
    return alpha, *program.multipliers(alpha, h)


# %%
# Train both. A gradient of all hyperparameters costs one linear solve.
log_c = torch.tensor(-3.0, requires_grad=True)
h = {name: torch.tensor(1.0, requires_grad=True) for name in ("log_C", "log_gamma")}
adam, curves = torch.optim.Adam([log_c, *h.values()], lr=0.2), []
for _ in range(40):
    adam.zero_grad()
    of_logistic = loss(x_val @ fit(torch.zeros(2), log_c.exp()))
    of_logistic.backward()
    of_svc = hypergrad.implicit_backward(outer, program, svc(h), h)
    adam.step()
    curves.append((of_logistic.item(), of_svc.item()))
print("validation loss at the start: logistic {:.3f}, SVC {:.3f}".format(*curves[0]))
print("validation loss at the end: logistic {:.3f}, SVC {:.3f}".format(*curves[-1]))
plt.figure(figsize=(6, 3.4), layout="constrained")
plt.plot(curves, label=["LogisticRegression: C", "SVC: C and gamma"])
plt.gca().set(xlabel="step", ylabel="validation loss")
plt.legend()
plt.show()
