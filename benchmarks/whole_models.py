"""A whole model: memory and time of one hypergradient against a loop that is written by hand.

A transformer of 25 million parameters with random weights, float32, a batch of 4 x 64 tokens, one
thread; the hyperparameters are the weight decay of each block. Each point has a process of its own.

    python -m benchmarks.whole_models              all points, as a table
    python -m benchmarks.whole_models hand 5       one point: a side of `SIDES`, and the products
    python -m benchmarks.whole_models hand 5 more checkpointed      16 texts in place of 4
    python -m benchmarks.whole_models large 5      the library with 100 million parameters
"""

import json
import math
import resource
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

import hypergrad
from benchmarks.allocator import peak_bytes
from benchmarks.results import OURS, Row, Settings
from benchmarks.timing import Quartiles

PRODUCTS = (5, 10, 20)
BATCH, LENGTH = 4, 64

Params = Mapping[str, Tensor]


@dataclass(frozen=True)
class Size:
    """How large a model is."""

    vocabulary: int
    width: int
    blocks: int
    heads: int = 8


SMALL = Size(vocabulary=12_000, width=512, blocks=6)  # 25.1 million parameters
LARGE = Size(vocabulary=12_000, width=768, blocks=13)  # 101 million
QUICK = Size(vocabulary=500, width=64, blocks=2)


class Block(nn.Module):
    """Attention and two dense layers, each behind a norm and beside its input."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width = size.width
        self.heads = size.heads
        self.before_attention, self.before_dense = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention, self.joined = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.wide, self.narrow = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        queries, keys, values = (
            part.view(batch, length, self.heads, -1).transpose(1, 2)
            for part in self.attention(self.before_attention(x)).split(width, dim=-1)
        )
        scores = queries @ keys.mT / math.sqrt(queries.shape[-1])
        later = torch.ones(length, length, dtype=torch.bool).triu(1)
        weights = scores.masked_fill(later, -math.inf).softmax(dim=-1)
        attended = (weights @ values).transpose(1, 2).reshape(batch, length, width)
        x = x + self.joined(attended)
        dense = functional.gelu(self.wide(self.before_dense(x)), approximate="tanh")
        return x + self.narrow(dense)


class Transformer(nn.Module):
    """A model of GPT-2's form, its output layer tied to the embedding."""

    def __init__(self, size: Size, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.tokens = nn.Embedding(size.vocabulary, size.width)
        self.places = nn.Embedding(LENGTH, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.blocks))
        self.last = nn.LayerNorm(size.width)
        for module in self.modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.tokens(tokens) + self.places.weight[: tokens.shape[1]]
        for block in self.blocks:
            if self.checkpointed:  # which computes the block again, with these parameters
                given = dict(block.named_parameters())
                x = checkpoint(functional_call, block, given, (x,), use_reentrant=False)
            else:
                x = block(x)
        return functional.linear(self.last(x), self.tokens.weight)


@dataclass
class Problem:
    """The weight decay of each block, by the loss on other data."""

    size: Size = SMALL
    checkpointed: bool = False
    log_decay: float = 4.0
    batch: int = BATCH
    model: Transformer = field(init=False)
    params: dict[str, Tensor] = field(init=False)
    hparams: Tensor = field(init=False)

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.model = Transformer(self.size, checkpointed=self.checkpointed)
        self.params = {name: p.detach() for name, p in self.model.named_parameters()}
        self.model.to("meta")
        self.hparams = torch.full((self.size.blocks + 1,), self.log_decay)
        tokens = torch.randint(self.size.vocabulary, (2, self.batch, LENGTH + 1))
        self.seen, self.unseen = tokens

    @property
    def count(self) -> int:
        """How many parameters."""
        return sum(p.numel() for p in self.params.values())

    def loss(self, params: Params, tokens: Tensor) -> Tensor:
        logits = functional_call(self.model, dict(params), (tokens[:, :-1],))
        return functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    def outer(self, params: Params, hparams: Tensor) -> Tensor:
        return self.loss(params, self.unseen)

    def inner(self, params: Params, hparams: Tensor) -> Tensor:
        decay = hparams.exp()
        total = self.loss(params, self.seen)
        for name, p in params.items():
            block = int(name.split(".")[1]) if name.startswith("blocks") else -1
            total = total + 0.5 * decay[block] * p.square().sum()
        return total

    def gradient(self) -> None:
        """The unit of time: the value and the first derivative of the inner loss."""
        leaves = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        torch.autograd.grad(self.inner(leaves, self.hparams), list(leaves.values()))


def by_hand(problem: Problem, products: int) -> Tensor:
    """Conjugate gradients on lists of leaves, in place: a recorded gradient, replayed."""
    names = list(problem.params)
    leaves = [p.detach().requires_grad_() for p in problem.params.values()]
    hparams = problem.hparams.clone().requires_grad_()
    given = dict(zip(names, leaves, strict=True))
    r = list(torch.autograd.grad(problem.outer(given, hparams), leaves))
    gradient = torch.autograd.grad(problem.inner(given, hparams), leaves, create_graph=True)
    with torch.no_grad():
        x = [torch.zeros_like(v) for v in r]
        p = [v.clone() for v in r]
        rr = _dot(r, r)
        for _ in range(products):
            Ap = torch.autograd.grad(gradient, leaves, p, retain_graph=True)
            alpha = rr / _dot(p, Ap)
            torch._foreach_add_(x, p, alpha=alpha)
            torch._foreach_add_(r, Ap, alpha=-alpha)
            del Ap
            rr, before = _dot(r, r), rr
            torch._foreach_mul_(p, rr / before)
            torch._foreach_add_(p, r)
    del r, p
    (cross,) = torch.autograd.grad(gradient, hparams, x)
    return -cross


def _dot(a: list[Tensor], b: list[Tensor]) -> float:
    pairs = zip(a, b, strict=True)
    return sum(torch.dot(v.view(-1), w.reshape(-1)).item() for v, w in pairs)


def _ours(problem: Problem, solver: Any, inner: Any = None, **arguments: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return hypergrad.implicit_grad(
            problem.outer,
            inner or problem.inner,
            problem.params,
            problem.hparams,
            solver=solver,
            **arguments,
        )


def bare(problem: Problem, products: int) -> Tensor:
    """The library without evidence: one product more, for the true residual."""
    return _ours(problem, hypergrad.CG(maxiter=products, rtol=0.0), on_failure="ignore")


def judged(problem: Problem, products: int) -> Tensor:
    """The same with what the defaults judge; no solution of the inner problem is claimed."""
    return _ours(problem, hypergrad.CG(maxiter=products), inner_tol=None)


def claimed(problem: Problem, products: int) -> Tensor:
    """The same with the default claim that params solve the inner problem."""
    return _ours(problem, hypergrad.CG(maxiter=products), inner_tol=1e-3)


def differences(problem: Problem, products: int) -> Tensor:
    """The same with products from first derivatives alone."""
    inner = hypergrad.Minimum(problem.inner, products="difference")
    return _ours(problem, hypergrad.CG(maxiter=products), inner=inner, inner_tol=None)


SIDES: dict[str, Callable[[Problem, int], Tensor]] = {
    "hand": by_hand,
    "bare": bare,
    "judged": judged,
    "claimed": claimed,
    "differences": differences,
}
NAMES = {
    "hand": "by hand",
    "bare": OURS,
    "judged": "hypergrad, judged, inner_tol=None",
    "claimed": "hypergrad, judged, inner_tol=1e-3",
    "differences": "hypergrad, judged, products by differences",
}


def memory(side: str, products: int, problem: Problem) -> dict[str, float]:
    """Peak bytes live in the allocator, in copies of the parameters, which were there before."""
    SIDES[side](Problem(QUICK), 2)  # what is loaded at a first call
    peak = peak_bytes(lambda: SIDES[side](problem, products))
    return {"copies": peak / (4 * problem.count)}


def times(side: str, products: int, problem: Problem, rounds: int) -> dict[str, float]:
    """Processor time in gradients, and in loops by hand with one product more, interleaved."""
    sides: dict[str, Callable[[], object]] = {
        "gradient": problem.gradient,
        "hand": lambda: by_hand(problem, products + 1),
        side: lambda: SIDES[side](problem, products),
    }
    problem.gradient()
    spent: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, call in sides.items():
            start = time.process_time()
            call()
            if name == "gradient":
                call()
            spent[name].append((time.process_time() - start) / (2 if name == "gradient" else 1))
    least = {name: min(values) for name, values in spent.items()}
    return {
        "gradients": least[side] / least["gradient"],
        "against hand": min(a / b for a, b in zip(spent[side], spent["hand"], strict=True)),
    }


def default_solver(log_decay: float, problem: Problem | None = None) -> dict[str, Any]:
    """What `Auto` takes, and what it leaves, beside CG of as many products."""
    problem = problem or Problem(log_decay=log_decay)
    problem.gradient()
    start = time.process_time()
    for _ in range(3):
        problem.gradient()
    gradient = (time.process_time() - start) / 3
    start = time.process_time()
    _, info = _ours(problem, None, return_info=True)
    took = (time.process_time() - start) / gradient
    _, beside = _ours(
        problem,
        hypergrad.CG(maxiter=int(info.iterations), rtol=0.0),
        inner_tol=None,
        on_failure="ignore",
        return_info=True,
    )
    return {
        "gradients": took,
        "products": int(info.matvecs),
        "iterations": int(info.iterations),
        "residual": float(info.residual_norm),
        "residual of CG": float(beside.residual_norm),
        "products of CG": int(beside.matvecs),
        "text": str(info),
        "method": info.method,
    }


def large(products: int, side: str = "judged") -> dict[str, float]:
    """A model of 100 million parameters: seconds, and the most memory of the process."""
    problem = Problem(LARGE)
    start = time.process_time()
    SIDES[side](problem, products)
    gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {"parameters": problem.count, "GiB": gib, "seconds": time.process_time() - start}


def point(arguments: list[str]) -> dict[str, Any]:
    """Measure what a command line asks for."""
    torch.set_num_threads(1)
    side, amount, *options = arguments
    size = QUICK if "quick" in options else SMALL
    batch = 4 * BATCH if "more" in options else BATCH
    problem = Problem(size, checkpointed="checkpointed" in options, batch=batch)
    if side == "auto":
        return default_solver(float(amount), Problem(size, log_decay=float(amount)))
    if side == "large":
        return large(int(amount), *options)
    if "time" in options:
        return times(side, int(amount), problem, rounds=3)
    return memory(side, int(amount), problem)


def alone(*arguments: str) -> dict[str, Any]:
    """Measure a point in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.whole_models", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return figures


def benchmarks() -> dict[str, Callable[[Settings], list[Row]]]:
    return {
        "whole-model-memory": measure_memory,
        "whole-model-time": measure_time,
        "whole-model-default": measure_default,
    }


def _row(benchmark: str, side: str, unit: str, figure: float, note: str) -> Row:
    return Row(benchmark, side, unit, Quartiles(figure, figure, figure), 1, note=note)


def measure_memory(settings: Settings) -> list[Row]:
    """Peak memory, in copies of the parameters."""
    rows = []
    quick = ("quick",) if settings.quick else ()
    more, cut = (*quick, "more"), (*quick, "more", "checkpointed")
    batches = {"": quick, ", 16 texts": more, ", 16 texts, checkpointed": cut}
    for name, options in batches.items():
        for side in SIDES:
            for products in PRODUCTS[:1] if settings.quick or name else PRODUCTS:
                figure = alone(side, str(products), *options)["copies"]
                note = f"{products} products{name}"
                rows.append(_row("whole-model-memory", NAMES[side], "copies", figure, note))
    return rows


def measure_time(settings: Settings) -> list[Row]:
    """Time, in gradients."""
    rows = []
    quick = ("quick",) if settings.quick else ()
    for side in SIDES:
        for products in PRODUCTS[:1] if settings.quick else PRODUCTS:
            figures = alone(side, str(products), "time", *quick)
            note = f"{products} products; {figures['against hand']:.3f} of by hand with one more"
            rows.append(
                _row("whole-model-time", NAMES[side], "gradients", figures["gradients"], note)
            )
    return rows


def measure_default(settings: Settings) -> list[Row]:
    """The default solver, where the Hessian is positive and where it is not."""
    rows = []
    quick = ("quick",) if settings.quick else ()
    for log_decay, side in ((DEFINITE, "definite"), (INDEFINITE, "indefinite")):
        found = alone("auto", str(log_decay), *quick)
        note = f"residual {found['residual']:.1e}, CG's {found['residual of CG']:.1e}"
        note += f"; {found['text']}"
        rows.append(
            _row("whole-model-default", f"Auto, {side}", "gradients", found["gradients"], note)
        )
    return rows


#: Log weight decays at which the Hessian is positive, and is not.
DEFINITE, INDEFINITE = 4.0, -20.0

if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(point(sys.argv[1:])))
    else:
        for measure in benchmarks().values():
            for row in measure(Settings(1, 1, quick=False)):
                print(
                    row.side, "|", f"{row.figure.median:.2f}", row.unit, "|", row.note, flush=True
                )
