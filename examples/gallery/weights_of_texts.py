"""
Which texts a language model should read
========================================

A small GPT-2 is trained on lines of English, of which a third have had their letters shuffled.
Nobody says which. Two questions are asked of the trained model, and both have the same linear
system behind them. :func:`~hypergrad.influence` says what each line did to the loss on clean text.
:func:`~hypergrad.implicit_grad` goes further: it moves a weight for each line, while the model
trains on.

With the package `transformers` the model is its `GPT2LMHeadModel`, with random weights; without it
a transformer of one block takes its place.
"""

import matplotlib.pyplot as plt
import torch
from sklearn import datasets
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import hypergrad

try:
    from transformers import GPT2Config, GPT2LMHeadModel
except ImportError:
    GPT2LMHeadModel = None

torch.manual_seed(0)

# %%
# The text is the descriptions of scikit-learn's datasets, cut into lines of 33 letters: 150 to
# train on, 80 for the outer loss, the rest for the test. The first 50 are shuffled.

load = (datasets.load_wine, datasets.load_breast_cancer, datasets.load_iris, datasets.load_diabetes)
text = " ".join(" ".join(one().DESCR for one in load).lower().split())
alphabet = sorted(set(text))
codes = torch.tensor([alphabet.index(letter) for letter in text])
lines = codes[: len(codes) // 33 * 33].reshape(-1, 33)
lines = lines[torch.randperm(len(lines))]
train, valid, test = lines[:150].clone(), lines[150:230], lines[230:]
shuffled = torch.arange(150) < 50
for line in train[:50]:
    line.copy_(line[torch.randperm(33)])

# %%
# The model, and its loss on each of some lines.


class Transformer(nn.Module):
    def __init__(self, width=32, length=32):
        super().__init__()
        self.embed, self.place = nn.Embedding(len(alphabet), width), nn.Embedding(length, width)
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 64), nn.GELU(), nn.Linear(64, width))
        self.readout = nn.Linear(width, len(alphabet))

    def forward(self, tokens):
        h = self.embed(tokens) + self.place.weight
        q, k, v = self.qkv(self.norms[0](h)).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
        attended = scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(attended.transpose(1, 2).flatten(2))
        return self.readout(self.norms[2](h + self.mlp(self.norms[1](h))))


def new_model():
    if GPT2LMHeadModel is None:
        return Transformer()
    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_inner": 64}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    tokens = {"vocab_size": len(alphabet), "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**tokens, **sizes, **dropout))


def new_params():
    return {name: p.detach().clone().requires_grad_() for name, p in new_model().named_parameters()}


model = new_model()


def logits(params, lines):
    outputs = functional_call(model, params, (lines[:, :-1],))
    return outputs if GPT2LMHeadModel is None else outputs.logits


def losses(logits, lines):
    each = cross_entropy(logits.flatten(0, 1), lines[:, 1:].flatten(), reduction="none")
    return each.unflatten(0, (len(lines), -1)).mean(1)


# %%
# The inner problem is a mean with weights, and weight decay. Its curvature is taken from the
# Gauss-Newton matrix, which has no negative directions; attention needs no help.

inner = hypergrad.GaussNewton(
    outputs=lambda params, weights: logits(params, train),
    loss=lambda outputs, weights: (weights.sigmoid() * losses(outputs, train)).mean(),
    regulariser=lambda params, weights: 3e-3 * sum(p.square().sum() for p in params.values()),
)


def objective(params, weights):
    fit = inner.loss(inner.outputs(params, weights), weights)
    return fit + inner.regulariser(params, weights)


def outer(params, weights):
    return losses(logits(params, valid), valid).mean()


def train_on(params, weights, steps, rate):
    optimizer = torch.optim.Adam(params.values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        objective(params, weights).backward()
        optimizer.step()


weights = torch.full((150,), 2.0)
params = new_params()
train_on(params, weights, 180, 0.01)
train_on(params, weights, 60, 0.003)

# %%
# The influence of a line is the change of the outer loss when its weight goes to zero, to first
# order. The model is no minimum to the last digit: a damping takes care of the directions in which
# it still moves, and `inner_tol=None` says that this is known.

influence = hypergrad.influence(
    lambda params: losses(logits(params, valid), valid).mean()[None],
    lambda params: losses(logits(params, train), train),
    params,
    weights=weights.sigmoid() / len(train),
    regulariser=lambda params: inner.regulariser(params, weights),
    solver=hypergrad.CG(maxiter=30, damping=0.1),
    inner_tol=None,
)[0]
worst = influence.argsort()[:50]
print(f"of the 50 most harmful lines {shuffled[worst].sum()} are shuffled")

# %%
# The weights are learnt while the model trains on: ten steps of Adam for each hypergradient, which
# costs ten products.

optimizer = torch.optim.Adam([weights], lr=0.15)
learnt = {name: p.detach().clone().requires_grad_() for name, p in params.items()}
path = [weights.sigmoid()]
for _ in range(20):
    train_on(learnt, weights, 10, 0.003)
    weights.grad = hypergrad.implicit_grad(
        outer, inner, learnt, weights, solver=hypergrad.CG(maxiter=10), inner_tol=None
    )
    optimizer.step()
    path.append(weights.sigmoid())

# %%
# What the weights are worth: training anew with fixed ones, from two seeds, to compare on lines
# that were in neither loss.


def test_loss(weights, seed):
    torch.manual_seed(seed)
    params = new_params()
    train_on(params, weights, 120, 0.01)
    train_on(params, weights, 40, 0.003)
    with torch.no_grad():
        return losses(logits(params, test), test).mean().item()


equal = torch.full((150,), 2.0)
settings = {"equal": equal, "learnt": weights, "only clean": equal.where(~shuffled, -20.0)}
results = {name: sum(test_loss(w, seed) for seed in (1, 2)) / 2 for name, w in settings.items()}
print("test loss: " + ", ".join(f"{name} {loss:.3f}" for name, loss in results.items()))

figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
kinds = {"shuffled": shuffled, "clean": ~shuffled}
for color, (name, kind) in zip(("C3", "C0"), kinds.items(), strict=True):
    left.hist(1e3 * influence[kind], bins=20, alpha=0.7, color=color, label=name)
    middle.plot(torch.stack(path)[:, kind].mean(1), color=color, label=name)
left.set(xlabel="influence on the outer loss, 1e-3", ylabel="lines", title="What each line did")
middle.set(xlabel="outer step", ylabel="mean weight", title="The weights", ylim=(0, 1))
right.bar(list(results), list(results.values()), color=["C7", "C1", "C0"])
least, most = min(results.values()), max(results.values())
right.set(ylabel="nats a letter", title="Test loss, trained anew", ylim=(least - 0.05, most + 0.02))
left.legend()
middle.legend()
plt.show()
