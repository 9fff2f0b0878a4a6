"""
Use several processes
=====================

Each process has a share of the data. Write the loss of the share:
:func:`~hypergrad.all_reduced` makes the whole of it, and all else stays as it was. Run
this page by ``torchrun --nproc-per-node=2 several_processes.py``.
"""

import matplotlib.pyplot as plt
import torch
from torch import distributed

import hypergrad

alone = {"store": distributed.HashStore(), "rank": 0, "world_size": 1}
by_torchrun = distributed.is_torchelastic_launched()
distributed.init_process_group("gloo", **({} if by_torchrun else alone))
rank, world = distributed.get_rank(), distributed.get_world_size()

# %%
# The same seed everywhere, and of the data every ``world``-th row. Ten of the thirty
# features count.
torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
x, x_val = torch.randn(2, 60, 30)
truth = (torch.arange(30) < 10).double()
y, y_val = x @ truth + torch.randn(60), x_val @ truth + torch.randn(60)
x, y, x_val, y_val = (a[rank::world] for a in (x, y, x_val, y_val))

# %%
# Shares are added up. What belongs to no example, the penalty, is divided by ``world``.


@hypergrad.all_reduced
def inner(w, log_penalty):
    penalty = (log_penalty.exp() * w.square()).sum()
    return (x @ w - y).square().sum() / 60 + penalty / world


@hypergrad.all_reduced
def outer(w, log_penalty):
    return (x_val @ w - y_val).square().sum() / 60


# %%
# Solve in your own way: here each process adds its share of the normal equations. The
# hypergradient is the same everywhere, and so is every step.


def whole(share):
    distributed.all_reduce(share)
    return share / 60


gram, product = whole(x.T @ x), whole(x.T @ y)
log_penalty = torch.full((30,), -2.0, requires_grad=True)
adam, values = torch.optim.Adam([log_penalty], lr=0.3), []
for _ in range(30):
    w = torch.linalg.solve(gram + log_penalty.detach().exp().diag(), product)
    adam.zero_grad()
    loss = hypergrad.implicit_backward(outer, inner, w, log_penalty)
    values.append(loss.item())
    adam.step()
if rank == 0:
    print(f"validation error at the start {values[0]:.2f}, at the end {values[-1]:.5f}")
    plt.figure(figsize=(6, 3.4), layout="constrained")
    penalties = log_penalty.detach().exp().tolist()
    plt.semilogy(range(10), penalties[:10], "o", label="counts")
    plt.semilogy(range(10, 30), penalties[10:], "o", label="does not count")
    plt.gca().set(xlabel="feature", ylabel="penalty")
    plt.legend()
    plt.show()
distributed.destroy_process_group()
