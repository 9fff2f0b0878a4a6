"""Interleaved timing: all sides in one process, round by round, with warm-up."""

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

SHORTEST = 0.02  # seconds: what takes less is repeated, so that all sides have warm caches

Side = Callable[[], object]


@dataclass(frozen=True)
class Quartiles:
    """Lower quartile, median and upper quartile."""

    low: float
    median: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> "Quartiles":
        low, median, high = statistics.quantiles(values, n=4)
        return cls(low, median, high)

    def __str__(self) -> str:
        return f"{self.median:.2f} ({self.low:.2f} to {self.high:.2f})"


def seconds(
    sides: Mapping[str, Side], *, rounds: int = 60, warm_up: int = 5, threads: int = 1
) -> dict[str, list[float]]:
    """Seconds that each side took in each round.

    With one thread they are the processor's, so that other programs on the machine count less;
    with several, those of a clock on the wall. The order moves on by one place a round, so that
    no side always follows the same other one. Garbage is collected between rounds alone.
    """
    clock = time.process_time if threads == 1 else time.perf_counter
    repeats = {}
    for name, side in sides.items():
        for _ in range(warm_up):
            side()
        repeats[name] = max(1, math.ceil(SHORTEST / _timed(side, 1, clock)))
    found: dict[str, list[float]] = {name: [] for name in sides}
    order = list(sides)
    collecting = gc.isenabled()
    try:
        for _ in range(rounds):
            gc.collect()
            gc.disable()
            for name in order:
                found[name].append(_timed(sides[name], repeats[name], clock))
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return found


def in_units(
    found: Mapping[str, list[float]], unit: str, parts: Mapping[str, int] | None = None
) -> dict[str, Quartiles]:
    """Each side's seconds in units of one side's of the same round; `parts`: divided by these."""
    parts = parts or {}
    return {
        name: Quartiles.of([
            a / b / parts.get(name, 1) for a, b in zip(values, found[unit], strict=True)
        ])
        for name, values in found.items()
        if name != unit
    }


def ratios(
    sides: Mapping[str, Side], unit: str, *, rounds: int = 60, warm_up: int = 5
) -> dict[str, Quartiles]:
    """Time every side in every round, and give each in units of one of them, round by round."""
    return in_units(seconds(sides, rounds=rounds, warm_up=warm_up), unit)


def _timed(side: Side, repeats: int, clock: Callable[[], float]) -> float:
    start = clock()
    for _ in range(repeats):
        side()
    return (clock() - start) / repeats
