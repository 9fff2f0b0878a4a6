"""What is made of the rows of a run: tables and an overview."""

from __future__ import annotations

from benchmarks.results import Row, markdown, overview
from benchmarks.timing import Quartiles


def row(side, median, **fields):
    figure = Quartiles(median - 1, median, median + 1)
    return Row(fields.pop("benchmark", "sinusoid-8"), side, "gradients a task", figure, 3, **fields)


ROWS = [
    row("hypergrad", 10.0, error=1e-3, products=6, judged="8 tasks, float64", unit_ms=0.25),
    row("hypergrad, whole step", 8.0, error=1e-3, products=6),
    row("by hand, batched", 5.0, error=1e-3, products=5),
    row("jax under jit and vmap, own process", 0.5, error=1e-3, note="compiled in 9 s"),
    row("jax under jit and vmap, in gradients of jax", 0.1, error=1e-3),
    row("hypergrad", 4.0, error=1e-3, threads=2),
    row("hypergrad", 7.0, benchmark="memory", note="4 inner steps"),
]


def test_a_table_for_every_benchmark_and_number_of_threads():
    first, second, memory = markdown(ROWS, folded=True).split("\n:::\n")[:3]
    assert first.startswith(
        ":::{dropdown} Meta-step of iMAML, 8 sinusoid tasks (a gradient took 0.25 ms)"
    )
    assert "| hypergrad | 10.00 (9.00 to 11.00) | 1.00 | 1.0e-03 (8 tasks, float64) | 6 |" in first
    assert "| by hand, batched | 5.00 (4.00 to 6.00) | 0.50 | 1.0e-03 | 5 |" in first
    assert "own process (compiled in 9 s) | 0.50" in first
    assert "8 sinusoid tasks, 2 threads" in second
    assert "| hypergrad (4 inner steps) | 7.00 (6.00 to 8.00) |" in memory


def test_the_overview_has_the_quickest_of_each_kind():
    *_, line = overview(ROWS).strip().splitlines()
    assert line == (
        "| Meta-step of iMAML, 8 sinusoid tasks, in gradients a task | 8 | 5 |  |  | 0.5 |"
    )
