"""
Tune weight decay in skorch
===========================

Write a callback: after each epoch it moves the decay by the gradient of the validation
loss, and hands it to the optimiser. Your net, its history and its grid search stay.
"""

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits
from skorch import NeuralNetClassifier
from skorch.callbacks import Callback
from skorch.helper import predefined_split
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import TensorDataset

import hypergrad

torch.manual_seed(0)
x, y = (torch.tensor(array) for array in load_digits(return_X_y=True))
parts = torch.randperm(1797).split([150, 300, 1347])
train, valid, test = (TensorDataset(x[i].float() / 16, y[i]) for i in parts)

# %%
# ``penalty="log_decay"`` is what ``weight_decay`` of Adam and SGD adds to the loss, so
# the callback and the optimiser minimise the same.


class TuneDecay(Callback):
    def on_train_begin(self, net, **kwargs):
        model, penalty = net.module_, "log_decay"
        self.problem = hypergrad.supervised(model, cross_entropy, penalty=penalty)
        self.hparams = {"log_decay": torch.tensor(-7.0, requires_grad=True)}
        self.adam = torch.optim.Adam(self.hparams.values(), lr=0.1)

    def on_epoch_end(self, net, **kwargs):
        outer = self.problem.outer(valid.tensors)
        inner = self.problem.inner(train.tensors)
        at = self.problem.params, self.hparams
        self.adam.zero_grad()
        hypergrad.implicit_backward(outer, inner, *at, inner_tol=None)
        self.adam.step()
        decay = self.hparams["log_decay"].exp().item()
        net.optimizer_.param_groups[0]["weight_decay"] = decay
        net.history.record("decay", decay)


# %%
# Fit with it, and without decay.
def fitted(callbacks):
    net = NeuralNetClassifier(
        nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)),
        criterion=nn.CrossEntropyLoss,
        optimizer=torch.optim.Adam,
        lr=0.01,
        batch_size=50,
        max_epochs=300,
        train_split=predefined_split(valid),
        callbacks=callbacks,
        verbose=0,
    )
    return net.fit(train, None)


tuned, fixed = fitted([TuneDecay()]), fitted([])
for name, net in (("learnt", tuned), ("none", fixed)):
    x, y = test.tensors
    loss = cross_entropy(net.forward(x), y).item()
    print(f"decay {name}: test loss {loss:.3f}, accuracy {net.score(x, y):.3f}")
plt.figure(figsize=(6, 3.4), layout="constrained")
plt.plot(tuned.history[:, "valid_loss"], label="learnt decay")
plt.plot(fixed.history[:, "valid_loss"], "--", label="no decay", color="gray")
plt.gca().set(xlabel="epoch", ylabel="validation loss", ylim=(0.2, 0.8))
plt.legend()
plt.show()
