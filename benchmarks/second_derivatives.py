"""PyTorch's second derivatives against differences, operation by operation, in float64 on the CPU.

``python -m benchmarks.second_derivatives`` compares, for every operation of PyTorch's own list of
samples (`torch.testing`) and for the calls of `benchmarks.second_derivatives_calls`, the product of
the Hessian with a random vector, by double backward and jointly in all differentiable arguments,
with central differences of the gradient, at two points; and that product, mapped over rows, with
itself. It prints what is wrong, refused or undecided, writes
``results/second_derivatives/torch-VERSION.json``, and makes the library's list of tested nodes anew
from all files there: the autograd nodes that were right in every version, and those whose products
were wrong when mapped in any. ``--only NAME ...`` runs some operations and writes nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import io
import json
import sys
import types
import unittest
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.second_derivatives_calls import calls
from hypergrad._autograd.second_derivative import nodes_of

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "results" / "second_derivatives"
LIST = ROOT / "hypergrad" / "_autograd" / "tested_nodes.py"
SAMPLES = 12  # of each operation in PyTorch's list, spread over it
STEPS = (2e-4, 1e-4)  # in units of each argument's size
SHIFTS = (0.01, 0.03)  # of the two points from the sample, which breaks its ties
RIGHT, WRONG = 1e-5, 1e-4
# Wrong for a reason that lies in the samples.
NOT_A_FAULT = {
    "corrcoef": "its diagonal is clamped at 1, and is 1 up to rounding",
    "native_layer_norm": "differentiated through its statistics, which layer_norm does not return",
}


@dataclasses.dataclass
class Case:
    """A call of one operation: a function of the tensors to differentiate by."""

    function: Callable[..., Any]
    tensors: list[Tensor]


@dataclasses.dataclass
class Outcome:
    """What came out of one operation, over all of its cases and points."""

    right: int = 0
    wrong: float = 0.0
    refused: str = ""
    undecided: str = ""
    mapped: float = 0.0
    nodes: set[str] = dataclasses.field(default_factory=set)
    suspects: set[str] = dataclasses.field(default_factory=set)
    wrong_when_mapped: set[str] = dataclasses.field(default_factory=set)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="+", help="names of operations; nothing is written")
    only = parser.parse_args().only
    outcomes = compared(only)
    show(outcomes)
    if only is None:
        FIGURES.mkdir(exist_ok=True)
        version = torch.__version__.partition("+")[0]
        figures = json.dumps(summary(outcomes), indent=1, sort_keys=True)
        (FIGURES / f"torch-{version}.json").write_text(figures + "\n")
        LIST.write_text(source())


def compared(only: Sequence[str] | None = None) -> dict[str, Outcome]:
    """The outcome of each operation; of some alone, where they are named."""
    outcomes = {}
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for name, cases in chain(own_operations(), listed_operations()):
            if only is None or name in only:
                outcomes[name] = outcome(cases)
            if only is not None and len(outcomes) == len(only):
                break  # before PyTorch's list is imported, where it can be
    return outcomes


def outcome(cases: Callable[[], Iterator[Case]]) -> Outcome:
    """Compare all cases of an operation."""
    result = Outcome()
    try:
        for number, case in enumerate(cases()):
            for shift in SHIFTS:
                compare(case, shift, number, result)
    except Exception as error:
        result.undecided = words(error)
    return result


def compare(case: Case, shift: float, seed: int, result: Outcome) -> None:
    """Compare one case at one point, and add what came out."""
    generator = torch.Generator().manual_seed(seed)

    def noise(x: Tensor) -> Tensor:
        drawn = torch.randn(x.shape, generator=generator, dtype=torch.float64)
        return drawn + 1j * torch.randn(x.shape, generator=generator) if x.is_complex() else drawn

    point = [x.detach() * (1 + shift * noise(x)) for x in case.tensors]
    scales = [x.abs().square().mean().sqrt().clamp(min=1e-2) for x in point]
    direction = [s * noise(x) for s, x in zip(scales, point, strict=True)]
    weights: dict[int, Tensor] = {}

    def graph(at: Sequence[Tensor], create_graph: bool) -> tuple[list[Tensor], list[Tensor]]:
        leaves = [x.detach().clone().requires_grad_() for x in at]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            outputs = floating(case.function(*leaves))
        loss = torch.zeros((), dtype=torch.float64)
        for i, y in enumerate(outputs):
            if y.dtype not in {torch.float64, torch.complex128}:
                raise TypeError(f"differences do not resolve what is rounded to {y.dtype}")
            y = torch.view_as_real(y.resolve_conj()) if y.is_complex() else y
            if i not in weights:
                weights[i] = 1 + noise(y.detach())
            # A loss that is quadratic in the output also asks for the derivative by the cotangent.
            loss = loss + (weights[i] * (y + 0.5 * y * y)).sum()
        if not loss.requires_grad:
            return leaves, []
        grads = torch.autograd.grad(loss, leaves, create_graph=create_graph, allow_unused=True)
        return leaves, [
            torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True)
        ]

    try:
        leaves, grads = graph(point, True)
        nodes = nodes_of(grads)
        with_graph = [g for g in grads if g.requires_grad]
        if not with_graph:
            return
        # The product with the transpose; for a real loss the Hessian is symmetric.
        along = [d for g, d in zip(grads, direction, strict=True) if g.requires_grad]
        product = torch.autograd.grad(
            with_graph, leaves, along, allow_unused=True, retain_graph=True
        )
    except (RuntimeError, NotImplementedError) as error:
        result.refused = words(error)
        return
    off = mapped_off(with_graph, leaves, along, product)
    if off > RIGHT:
        result.mapped = max(result.mapped, off)
        result.wrong_when_mapped |= nodes
    product = [
        torch.zeros_like(x) if p is None else p for x, p in zip(leaves, product, strict=True)
    ]
    rows = []
    for step in STEPS:
        up, down = (
            graph([x + s * d for x, d in zip(point, direction, strict=True)], False)[1]
            for s in (step, -step)
        )
        rows.append([(a - b) / (2 * step) for a, b in zip(up, down, strict=True)])
    largest = max(float(g.detach().abs().max()) for g in grads if g.numel())
    whole = max(float(p.norm()) for p in product)
    verdict, figure = "right", 0.0
    for p, coarse, fine in zip(product, *rows, strict=True):
        # Each argument is judged in its own units.
        found = (4 * fine - coarse) / 3
        own = float((fine - coarse).norm()) + 1e-13 * largest / STEPS[1] * p.numel() ** 0.5
        scale = max(float(p.norm()), float(found.norm()))
        error = float((p - found).norm())
        if not error < float("inf"):
            verdict = "undecided"
        elif error <= RIGHT * scale + min(own, WRONG * max(scale, 1e-3 * whole)):
            continue
        elif error > 10 * own + WRONG * scale:
            verdict, figure = "wrong", max(figure, error / scale)
        elif verdict == "right":
            verdict = "undecided"
    if verdict == "right":
        result.right += 1
        result.nodes |= nodes
    elif verdict == "wrong":
        result.wrong = max(result.wrong, figure)
        result.suspects |= nodes
    else:
        result.undecided = "the differences do not resolve it"


def mapped_off(
    outputs: list[Tensor], leaves: list[Tensor], along: list[Tensor], single: Sequence[Any]
) -> float:
    """How far a product is off where it is mapped over two rows; 0 where it cannot be mapped."""

    def product(*row: Tensor) -> list[Tensor]:
        found = torch.autograd.grad(outputs, leaves, row, allow_unused=True, retain_graph=True)
        return [p for p in found if p is not None]

    try:
        mapped = torch.func.vmap(product)(*(torch.stack([v, -v]) for v in along))
    except Exception:  # the library goes row by row there
        return 0.0
    present = [p for p in single if p is not None]
    least = 1e-6 * max((float(p.norm()) for p in present), default=0.0)  # below it: rounding
    return max(
        (
            float((m - torch.stack([p, -p])).norm()) / (float(p.norm()) + least)
            for m, p in zip(mapped, present, strict=True)
            if least
        ),
        default=0.0,
    )


def floating(outputs: Any) -> list[Tensor]:
    """The floating-point tensors of what an operation returns."""
    if isinstance(outputs, Tensor):
        outputs = outputs.to_dense() if outputs.layout is not torch.strided else outputs
        return [outputs] if outputs.is_floating_point() or outputs.is_complex() else []
    if isinstance(outputs, dict):
        outputs = outputs.values()
    if isinstance(outputs, (tuple, list)) or hasattr(outputs, "__iter__"):
        return [y for part in outputs for y in floating(part)]
    return []


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error) else ''}"[
        :200
    ]


def own_operations() -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
    """The calls of networks."""
    for name, function, tensors in calls():
        yield name, lambda function=function, tensors=tensors: iter([Case(function, tensors)])


def listed_operations() -> Iterator[tuple[str, Callable[[], Iterator[Case]]]]:
    """PyTorch's own list, with its samples."""
    if "expecttest" not in sys.modules:
        # The list is part of the wheel, this package of its authors' tests is not.
        stand_in = types.ModuleType("expecttest")
        stand_in.TestCase = unittest.TestCase
        sys.modules["expecttest"] = stand_in
    from torch.testing._internal.common_methods_invocations import op_db

    for op in op_db:
        if op.supports_autograd and torch.float64 in op.dtypes:
            yield op.full_name, lambda op=op: samples(op)


def samples(op: Any) -> Iterator[Case]:
    """Cases from the samples of an operation, spread over them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = list(op.sample_inputs("cpu", torch.float64, requires_grad=True))
    spread = max(1, len(drawn) // SAMPLES)
    for sample in drawn[::spread]:
        whole = [sample.input, list(sample.args), dict(sample.kwargs)]
        leaves: list[Tensor] = []
        flat, spec = torch.utils._pytree.tree_flatten(whole)
        places = [i for i, x in enumerate(flat) if isinstance(x, Tensor) and x.requires_grad]
        leaves = [flat[i] for i in places]
        if not leaves or not all(x.layout is torch.strided and x.numel() for x in leaves):
            continue

        def function(*tensors: Tensor, flat=flat, spec=spec, places=places, sample=sample) -> Any:
            given = list(flat)
            for i, x in zip(places, tensors, strict=True):
                given[i] = x
            first, args, kwargs = torch.utils._pytree.tree_unflatten(given, spec)
            out = op.gradcheck_wrapper(op.get_op(), first, *args, **kwargs)
            return sample.output_process_fn_grad(out)

        yield Case(function, leaves)


def tested(outcomes: dict[str, Outcome]) -> set[str]:
    """The nodes that were right wherever they occurred.

    A wrong operation's graph also has nodes that are right in others, such as that of a product:
    the fault is that of the nodes that are right nowhere else, or, where there is none, of those
    that occur in the fewest operations.
    """
    right = set().union(*(o.nodes for o in outcomes.values()))
    spread = Counter(name for o in outcomes.values() for name in o.nodes | o.suspects)
    faulty: set[str] = set()
    for name, o in outcomes.items():
        if o.wrong and name not in NOT_A_FAULT:
            fewest = min(spread[node] for node in o.suspects)
            faulty |= o.suspects - right or {n for n in o.suspects if spread[n] == fewest}
    return right - faulty


def wrong_when_mapped(outcomes: dict[str, Outcome]) -> set[str]:
    """The nodes of operations whose products were wrong when mapped, that are in no others."""
    others: set[str] = set()
    others.update(*(o.nodes for o in outcomes.values() if not o.mapped))
    return set().union(*(o.wrong_when_mapped for o in outcomes.values())) - others


def summary(outcomes: dict[str, Outcome]) -> dict[str, Any]:
    """The outcomes, as they are written."""
    return {
        "torch": torch.__version__.partition("+")[0],
        "operations": len(outcomes),
        "right": sorted(n for n, o in outcomes.items() if o.right and not o.wrong),
        "wrong": {n: f"{o.wrong:.2g}" for n, o in outcomes.items() if o.wrong},
        "refused": {n: o.refused for n, o in outcomes.items() if o.refused},
        "undecided": {n: o.undecided for n, o in outcomes.items() if o.undecided and not o.wrong},
        "nodes": sorted(tested(outcomes)),
        "wrong when mapped": {n: f"{o.mapped:.2g}" for n, o in outcomes.items() if o.mapped},
        "nodes, wrong when mapped": sorted(wrong_when_mapped(outcomes)),
    }


def source() -> str:
    """The text of the list, from the figures of all versions."""
    figures = [json.loads(f.read_text()) for f in sorted(FIGURES.glob("torch-*.json"))]
    mapped = sorted(set().union(*(f["nodes, wrong when mapped"] for f in figures)))
    nodes = sorted(set.intersection(*(set(f["nodes"]) for f in figures)))
    versions = ", ".join(f["torch"] for f in figures)
    lines = [
        '"""Nodes of autograd whose second derivatives agree with differences of the first.',
        "",
        "Made by ``python -m benchmarks.second_derivatives`` on the CPU in float64: right with",
        f"torch {versions}.",
        "",
        "A node is named as by ``grad_fn.name()``, with its digit: this tells the overloads of an",
        "operation apart, and an operation from a custom Function of its name.",
        '"""',
        "",
        "TESTED_NODES: frozenset[str] = frozenset({",
        *(f'    "{name}",' for name in nodes),
        "})  # fmt: skip",
        "",
        "# A product through these is right for one vector, and wrong mapped by `torch.func.vmap`.",
        f"WRONG_WHEN_MAPPED: frozenset[str] = frozenset({{{quoted(mapped)}}})",
    ]
    return "\n".join(lines) + "\n"


def quoted(names: Sequence[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def show(outcomes: dict[str, Outcome]) -> None:
    nodes = tested(outcomes)
    count = sum(bool(o.right) and not o.wrong for o in outcomes.values())
    print(f"torch {torch.__version__}: {len(outcomes)} operations, {count} right, "
          f"{len(nodes)} nodes")  # fmt: skip
    for title in ("wrong", "mapped", "refused", "undecided"):
        print(f"\n{title}:")
        for name, o in outcomes.items():
            if getattr(o, title):
                text = getattr(o, title)
                print(f"  {name}: {text if isinstance(text, str) else f'{text:.2g}'}")
                if title == "wrong":
                    print("    ", NOT_A_FAULT.get(name) or sorted(o.suspects - nodes))


if __name__ == "__main__":
    main()
