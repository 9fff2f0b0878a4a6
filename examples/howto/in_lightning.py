"""
Tune weight decay in PyTorch Lightning
======================================

Optimise by hand: ``training_step`` moves the weights by one optimiser, and the decay by
another, once an epoch. Lightning keeps its loops, logs and checkpoints.
"""

import matplotlib.pyplot as plt
import pytorch_lightning as lightning
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
x_test, y_test = test.tensors
batches = {"train": DataLoader(train, 50, True), "valid": DataLoader(valid, 300)}

# %%
# What trains is a parameter of the module: Lightning moves it to the device, and keeps
# it in its checkpoints. A batch is a dict, because ``fit`` gets a dict of loaders.


class Digits(lightning.LightningModule):
    def __init__(self, log_decay, rate):
        super().__init__()
        self.automatic_optimization = False
        self.rate, self.losses = rate, []
        self.net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
        self.log_decay = nn.Parameter(torch.tensor(log_decay))
        self.problem = hypergrad.supervised(
            self.net, cross_entropy, penalty="log_decay"
        )

    def configure_optimizers(self):
        adam = torch.optim.Adam(self.net.parameters(), lr=0.01)
        return adam, torch.optim.Adam([self.log_decay], lr=self.rate)

    def training_step(self, batch, index):
        adam, outer_adam = self.optimizers()
        at = self.problem.params, {"log_decay": self.log_decay}
        inner = self.problem.inner(batch["train"])
        adam.zero_grad()
        self.manual_backward(inner(*at))
        adam.step()
        if self.rate and self.trainer.is_last_batch:
            outer = self.problem.outer(batch["valid"])
            outer_adam.zero_grad()
            hypergrad.implicit_backward(outer, inner, *at, inner_tol=None)
            outer_adam.step()
            self.log("decay", self.log_decay.exp())

    def on_train_epoch_end(self):
        self.losses.append(cross_entropy(self.net(x_test), y_test).item())


# %%
# Train twice: the decay is learnt, and next to none.
off = ["enable_checkpointing", "enable_model_summary", "enable_progress_bar", "logger"]
quiet = dict.fromkeys(off, False)
learnt, without = Digits(-7.0, rate=0.05), Digits(-30.0, rate=0.0)
for model in (learnt, without):
    lightning.Trainer(max_epochs=300, accelerator="cpu", **quiet).fit(model, batches)
print(f"learnt decay {learnt.log_decay.exp():.4f}, test loss {learnt.losses[-1]:.3f}")
print(f"without decay: test loss {without.losses[-1]:.3f}")
plt.figure(figsize=(6, 3.4), layout="constrained")
plt.plot(learnt.losses, label="learnt decay")
plt.plot(without.losses, "--", label="no decay", color="gray")
plt.gca().set(xlabel="epoch", ylabel="test loss", ylim=(0.2, 0.5))
plt.legend()
plt.show()
