"""A sharded model: memory a process of one hypergradient, against one process that holds it all.

A transformer in float32 whose blocks and root are wrapped by `fully_shard` (FSDP2) in two
processes of gloo, each with half of the batch; products by differences, five iterations of CG.

    python -m benchmarks.several_processes             all sides, as a table
    python -m benchmarks.several_processes judged      the defaults: both sides, as JSON
    python -m benchmarks.several_processes bare        on_failure="ignore"
"""

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import hypergrad
from benchmarks.allocator import peak_bytes
from benchmarks.results import Row, Settings
from benchmarks.timing import Quartiles
from benchmarks.whole_models import Params, Problem, Size

SIZE = Size(vocabulary=4_000, width=256, blocks=8)  # 7.3 million parameters
QUICK = Size(vocabulary=500, width=64, blocks=2)
PRODUCTS, COUNT = 5, 2
SIDES: dict[str, dict[str, Any]] = {
    "judged": {"inner_tol": None},
    "bare": {"on_failure": "ignore"},
}


def hypergradient(problem: Problem, side: str) -> Tensor:
    """The library in one process: the module's functional form, all of the batch."""
    return _by_differences(problem.outer, problem.inner, problem.params, problem.hparams, side)


def sharded(problem: Problem, rank: int) -> Callable[[str], Tensor]:
    """The same in pieces: a call for this process."""
    from torch.distributed.fsdp import fully_shard

    model = problem.model.to_empty(device="cpu")
    model.load_state_dict(problem.params)
    problem.params = {}
    for module in (*model.blocks, model):
        fully_shard(module)
    rows = slice(rank, None, COUNT)

    def loss(tokens: Tensor) -> Tensor:
        tokens = tokens[rows]
        return functional.cross_entropy(
            model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()
        )

    def outer(params: Params, hparams: Tensor) -> Tensor:
        return loss(problem.unseen)

    def inner(params: Params, hparams: Tensor) -> Tensor:
        decay, total = hparams.exp(), loss(problem.seen)
        for name, p in params.items():
            block = int(name.split(".")[1]) if name.startswith("blocks") else -1
            total = total + 0.5 * decay[block] * p.square().sum().full_tensor()
        return total

    params = dict(model.named_parameters())
    return lambda side: _by_differences(outer, inner, params, problem.hparams, side)


def _by_differences(outer: Any, inner: Any, params: Params, hparams: Tensor, side: str) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        grads: Tensor = hypergrad.implicit_grad(
            outer, hypergrad.Minimum(inner, products="difference"), params, hparams,
            solver=hypergrad.CG(maxiter=PRODUCTS, rtol=0.0), **SIDES[side],
        )  # fmt: skip
        return grads


def measured(call: Callable[[], Tensor]) -> dict[str, Any]:
    """Peak bytes of a call that has been made before, and what it gave."""
    call()
    seen: list[Tensor] = []
    return {"bytes": peak_bytes(lambda: seen.append(call())), "hypergradient": seen[0].tolist()}


def in_a_rank(size: Size, side: str, rank: int, folder: str) -> dict[str, Any]:
    """Measure one of the processes."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=COUNT
    )
    call = sharded(Problem(size), rank)
    figures = measured(lambda: call(side))
    torch.distributed.destroy_process_group()
    return figures


def beside(side: str, *options: str) -> dict[str, Any]:
    """Measure one process alone, and then the processes together."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def started(*arguments: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "benchmarks.several_processes", *arguments, *options]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)

    def ended(process: subprocess.Popen[str]) -> dict[str, Any]:
        said = process.communicate(timeout=600)[0]
        if process.returncode:
            raise RuntimeError(f"a process ended with {process.returncode}")
        figures: dict[str, Any] = json.loads(said.splitlines()[-1])
        return figures

    one = ended(started(side, "alone"))
    with tempfile.TemporaryDirectory() as folder:
        together = [started(side, "rank", str(rank), folder) for rank in range(COUNT)]
        ranks = [ended(process) for process in together]
    expected = torch.tensor(one["hypergradient"])
    apart = [(torch.tensor(r["hypergradient"]) - expected).norm() / expected.norm() for r in ranks]
    most, parameters = max(r["bytes"] for r in ranks), one["parameters"]
    return {
        "copies of one": one["bytes"] / (4 * parameters),
        "copies of a rank": most / (4 * parameters),
        "share": most / one["bytes"],
        "apart": float(max(apart)),
    }


def point(arguments: list[str]) -> dict[str, Any]:
    """Measure what a command line asks for."""
    torch.set_num_threads(1)
    side, *options = arguments
    size = QUICK if "quick" in options else SIZE
    if "rank" in options:
        rank, folder = options[options.index("rank") + 1 :][:2]
        return in_a_rank(size, side, int(rank), folder)
    if "alone" in options:
        problem = Problem(size)
        figures = measured(lambda: hypergradient(problem, side))
        return {**figures, "parameters": problem.count}
    return beside(side, *options)


def benchmarks() -> dict[str, Callable[[Settings], list[Row]]]:
    return {"sharded-memory": measure}


def measure(settings: Settings) -> list[Row]:
    """Peak memory of a process, in copies of all parameters."""
    rows = []
    for side in SIDES:
        found = beside(side, *(("quick",) if settings.quick else ()))
        note = f"{found['share']:.2f} of one process; apart {found['apart']:.1e}"
        for name in ("one", "a rank"):
            figure = found[f"copies of {name}"]
            rows.append(
                Row("sharded-memory", f"{name}, {side}", "copies",
                    Quartiles(figure, figure, figure), 1, note=note)
            )  # fmt: skip
    return rows


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(json.dumps(point(sys.argv[1:])))
    else:
        for row in measure(Settings(1, 1, quick=False)):
            print(row.side, "|", f"{row.figure.median:.2f}", row.unit, "|", row.note, flush=True)
