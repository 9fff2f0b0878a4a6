"""
Which texts a language model should read
========================================

A small GPT-2 is trained on lines of English, of which a third have had their letters shuffled.
Nobody says which. :func:`~hypergrad.influence` says what each line did to the loss on clean text,
and :func:`~hypergrad.implicit_grad` learns a weight for each line. The model is that of the package
`transformers`, with random weights; without the package one block takes its place.
"""

from importlib.util import find_spec

import matplotlib.pyplot as plt
import torch
from sklearn import datasets
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy

import hypergrad

torch.manual_seed(0)

# %%
# The text is the descriptions of scikit-learn's datasets, cut into lines of 33 letters.

load = (datasets.load_wine, datasets.load_breast_cancer, datasets.load_iris, datasets.load_diabetes)
text = " ".join(" ".join(one().DESCR for one in load).lower().split())
alphabet = sorted(set(text))
codes = [alphabet.index(letter) for letter in text]
lines = torch.tensor(codes[: len(codes) // 33 * 33]).reshape(-1, 33)
lines = lines[torch.randperm(len(lines))]
train, valid, test = lines[:150].clone(), lines[150:230], lines[230:]
shuffled = torch.arange(150) < 50
for line in train[:50]:
    line.copy_(line[torch.randperm(33)])

# %%
# The model, and its loss on each of some lines.


class Transformer(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed, self.place = nn.Embedding(len(alphabet), width), nn.Embedding(32, width)
        self.block = nn.TransformerEncoderLayer(width, 2, 64, 0.0, "gelu", batch_first=True)
        self.readout = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(alphabet)))

    def forward(self, tokens):
        h, mask = self.embed(tokens) + self.place.weight, torch.ones(32, 32).triu(1).bool()
        return self.readout(self.block(h, src_mask=mask, is_causal=True))


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_positions": 32, "n_embd": 32, "n_layer": 1, "n_head": 2, "n_inner": 64}
    tokens = {"vocab_size": len(alphabet), "bos_token_id": None, "eos_token_id": None}
    return GPT2LMHeadModel(GPT2Config(**sizes, **tokens)).eval()


new_model = gpt2 if find_spec("transformers") else Transformer
model = new_model()


def logits(params, lines):
    outputs = functional_call(model, params, (lines[:, :-1],))
    return getattr(outputs, "logits", outputs)


def losses(logits, lines):
    each = cross_entropy(logits.flatten(0, 1), lines[:, 1:].flatten(), reduction="none")
    return each.unflatten(0, (len(lines), -1)).mean(1)


# %%
# The inner problem is a mean with weights, and weight decay, with the Gauss-Newton curvature.


def outer(params, weights):
    return losses(logits(params, valid), valid).mean()


inner = hypergrad.GaussNewton(
    outputs=lambda params, weights: logits(params, train),
    loss=lambda outputs, weights: (weights.sigmoid() * losses(outputs, train)).mean(),
    regulariser=lambda params, weights: 3e-3 * sum(p.square().sum() for p in params.values()),
)


def train_on(params, weights, steps, rate):
    optimizer = torch.optim.Adam(params.values(), lr=rate)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = inner.loss(inner.outputs(params, weights), weights)
        (loss + inner.regulariser(params, weights)).backward()
        optimizer.step()


def trained(weights, seed):
    torch.manual_seed(seed)
    params = dict(new_model().named_parameters())
    for steps, rate in ((160, 0.01), (40, 0.003)):
        train_on(params, weights, steps, rate)
    return params


# %%
# The influence of a line is the change of the outer loss when its weight goes to zero, to first
# order. The model still moves: damping sees to that, and `inner_tol=None` says that it is known.

weights = torch.full((150,), 2.0)
params = trained(weights, seed=0)
influence = hypergrad.influence(
    lambda params: outer(params, None)[None],
    lambda params: losses(logits(params, train), train),
    params,
    weights=weights.sigmoid() / len(train),
    regulariser=lambda params: inner.regulariser(params, weights),
    solver=hypergrad.CG(maxiter=30, damping=1.0),
    inner_tol=None,
)[0]
print(f"of the 50 most harmful lines {shuffled[influence.argsort()[:50]].sum()} are shuffled")

# %%
# The weights are learnt while the model trains on. What they are worth shows on lines that were in
# neither loss, when the model is trained anew with fixed weights, from two seeds.

optimizer, path = torch.optim.Adam([weights], lr=0.15), []
for _ in range(20):
    path.append(weights.sigmoid())
    train_on(params, weights, 10, 0.003)
    weights.grad = hypergrad.implicit_grad(
        outer, inner, params, weights, solver=hypergrad.CG(maxiter=10), inner_tol=None
    )
    optimizer.step()

equal, clean = torch.full((150,), 2.0), torch.where(shuffled, -20.0, 2.0)
for name, fixed in {"equal": equal, "learnt": weights, "only clean": clean}.items():
    ends = [logits(trained(fixed, seed), test) for seed in (1, 2)]
    print(f"test loss, {name}: {sum(losses(end, test).mean().item() for end in ends) / 2:.3f}")

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
for color, name, kind in (("C3", "shuffled", shuffled), ("C0", "clean", ~shuffled)):
    left.hist(1e3 * influence[kind], bins=20, alpha=0.7, color=color, label=name)
    right.plot(torch.stack(path)[:, kind].mean(1), color=color, label=name)
    right.legend()
left.set(xlabel="influence on the outer loss, 1e-3", ylabel="lines", title="What each line did")
right.set(xlabel="outer step", ylabel="mean weight", title="The weights", ylim=(0, 1))
plt.show()
