"""
Mixing sources of text
======================

A language model is to read English and Python. There are six sources to train it on, of which
four are of no use. *Inner*, a small transformer is trained on a mixture of the six; *outer*, the
shares in the mixture are moved by its loss on held-out text. A large model has no memory for second
derivatives, least of all for those of attention: :func:`~hypergrad.penalty_grad` needs first
derivatives alone, of two copies of the model.
"""

import inspect
import random
import textwrap

import matplotlib.pyplot as plt
import torch
from sklearn import datasets
from torch import nn
from torch.func import functional_call
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import hypergrad

torch.manual_seed(0)

# %%
# English are the descriptions of scikit-learn's datasets, Python the source of two modules. The
# other four are English with the alphabet shifted by some places. Of the first two a part is held
# out.

english = "".join(load().DESCR for load in (datasets.load_wine, datasets.load_breast_cancer))
english += "".join(load().DESCR for load in (datasets.load_iris, datasets.load_diabetes))
python = inspect.getsource(textwrap) + inspect.getsource(random)[:20000]
letters = "abcdefghijklmnopqrstuvwxyz"
shifted = [str.maketrans(letters, letters[k:] + letters[:k]) for k in (3, 8, 13, 18)]
alphabet = sorted(set(english + python))


def coded(text):
    return torch.tensor([alphabet.index(character) for character in text])


sources = [coded(english[3000:]), coded(python[5000:])]
sources += [coded(english.translate(table)) for table in shifted]
held_out = [coded(english[:3000]), coded(python[:5000])]


def batch(texts, size=4, length=32):
    starts = [torch.randint(len(text) - length, (size, 1)) for text in texts]
    rows = zip(texts, starts, strict=True)
    return torch.stack([text[start + torch.arange(length + 1)] for text, start in rows])


# %%
# The transformer, of one block, and its loss on each text of a batch.


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


model = Transformer()


def losses(params, rows):
    logits = functional_call(model, params, (rows[:, :, :-1].flatten(0, 1),))
    each = cross_entropy(logits.flatten(0, 1), rows[:, :, 1:].flatten(), reduction="none")
    return each.unflatten(0, (len(rows), -1)).mean(1)


# %%
# Both copies are trained by Adam in the same loop: `y` on the mixture, `z` on the mixture and a
# tenth of the outer loss. Their difference is what the shares learn from, on the same batch.

penalty = 10.0
y, z = copies = [
    {name: p.detach().clone() for name, p in model.named_parameters()} for _ in range(2)
]
shares, path = torch.zeros(6), []
inner_optimizers = [torch.optim.Adam(copy.values(), lr=0.01) for copy in copies]
outer_optimizer = torch.optim.Adam([shares], lr=0.03)
for _ in range(200):
    rows, held = batch(sources), batch(held_out, size=8)

    def inner(params, shares, rows=rows):
        return shares.softmax(0) @ losses(params, rows)

    def outer(params, shares, held=held):
        return losses(params, held).mean()

    def penalised(params, shares):
        return inner(params, shares) + outer(params, shares) / penalty

    for copy, optimizer, loss in zip(copies, inner_optimizers, (inner, penalised), strict=True):
        gradients = torch.func.grad(loss)(copy, shares)
        for name, p in copy.items():
            p.grad = gradients[name]
        optimizer.step()
    shares.grad = hypergrad.penalty_grad(
        outer, inner, y, shares, penalty=penalty, penalised=z, rtol=None, inner_tol=None
    )
    outer_optimizer.step()
    path.append(shares.softmax(0).clone())

# %%
# What the shares are worth: training anew with fixed ones, for as many steps, from three seeds.
# The shares swing, as one acts on the model with a delay; the mean of the second half is taken.


def held_out_loss(weights, seed):
    torch.manual_seed(seed)
    params = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    optimizer = torch.optim.Adam(params.values(), lr=0.01)
    for _ in range(200):
        optimizer.zero_grad()
        (torch.tensor(weights) @ losses(params, batch(sources))).backward()
        optimizer.step()
    with torch.no_grad():
        return losses(params, batch(held_out, size=200)).mean().item()


learnt = torch.stack(path[100:]).mean(0).tolist()
mixtures = {"equal": [1 / 6] * 6, "English": [1.0] + [0.0] * 5, "learnt": learnt}
results = {n: sum(held_out_loss(w, s) for s in (1, 2, 3)) / 3 for n, w in mixtures.items()}
print("shares: " + ", ".join(f"{share:.2f}" for share in learnt))
print("held-out loss: " + ", ".join(f"{name} {loss:.3f}" for name, loss in results.items()))

figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
left.plot(torch.stack(path), label=["English", "Python", *4 * ["shifted"]])
left.set(xlabel="step", ylabel="share", title="The mixture, as it is learnt", ylim=(0, 1))
left.legend()
right.bar(list(results), list(results.values()), color=["C7", "C0", "C1"])
right.set(title="Held-out loss, trained anew", ylim=(min(results.values()) - 0.2, None))
plt.show()
