"""
Few-shot learning with your own model
=====================================

Train a start from which ten points are enough: implicit MAML with your ``nn.Module``.
You choose the inner rate, and the strength that holds each task near the start.
"""

import matplotlib.pyplot as plt
import torch
from torch import nn
from torch.nn.functional import mse_loss

import hypergrad

torch.manual_seed(0)


def sinusoid():
    size, shift = 1 + 2 * torch.rand(()), 3 * torch.rand(())
    x = 6 * torch.rand(20, 1) - 3
    y = size * (x + shift).sin()
    return (x[:10], y[:10]), (x[10:], y[10:])


def problem_of(strength):
    def near(params, start):
        return strength * sum((p - start[k]).square().sum() for k, p in params.items())

    model = nn.Sequential(nn.Linear(1, 20), nn.Tanh(), nn.Linear(20, 1))
    return hypergrad.supervised(model, mse_loss, penalty=near, curvature="hessian")


# %%
# The rate: solve one task, and look at ``info``. Too small a rate leaves a residual,
# too large a one runs away. Take the largest with ``success``, or make more steps.
how = {"return_info": True, "on_failure": "ignore"}
problem, (train, test) = problem_of(1.0), sinusoid()
inner, outer = problem.inner(train), problem.outer(test)
for rate in (0.003, 0.01, 0.03, 0.1, 0.3):
    params = {k: p.detach().clone() for k, p in problem.params.items()}
    for _ in range(100):
        grads = torch.func.grad(inner)(params, problem.params)
        params = {k: p - rate * grads[k].detach() for k, p in params.items()}
    _, info = hypergrad.implicit_grad(outer, inner, params, problem.params, **how)
    print(f"rate {rate}: residual {info.inner_residual:.0e}, success {info.success}")

# %%
# The strength: train with each. L-BFGS searches along its steps, so that no task runs
# away. A weak hold adapts best and is hard to solve: what it learns comes from
# hypergradients without ``success``. Take the weakest that has it nearly always.
adapt = hypergrad.inner_solvers.LBFGS(maxiter=25)
strengths, shares = (0.03, 0.1, 0.5, 3.0), []
unseen, losses = [sinusoid() for _ in range(10)], []
for strength in strengths:
    problem, successes, loss = problem_of(strength), 0, 0
    adam = torch.optim.Adam(problem.params.values(), lr=0.02)
    for train, test in (sinusoid() for _ in range(20)):
        start, inner = problem.params, problem.inner(train)
        params, _ = adapt(inner, start, start)
        adam.zero_grad()
        outer = problem.outer(test)
        _, info = hypergrad.implicit_backward(outer, inner, params, start, **how)
        adam.step()
        successes += info.success.item()
    for train, test in unseen:
        params, _ = adapt(problem.inner(train), problem.params, problem.params)
        loss += problem.outer(test)(params, problem.params).item() / 10
    losses.append(loss)
    shares.append(successes / 20)
    print(f"strength {strength}: success {shares[-1]:.0%}, unseen loss {loss:.3f}")
plt.figure(figsize=(6, 3.4), layout="constrained")
bars = plt.bar([str(strength) for strength in strengths], losses)
plt.bar_label(bars, [f"{share:.0%} success" for share in shares])
plt.gca().set(xlabel="strength", ylabel="loss on unseen tasks", ylim=(0, 0.4))
plt.show()
