"""Interleaved timing: all sides in one process, round by round, with warm-up."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass


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


def ratios(
    sides: Mapping[str, Callable[[], object]],
    unit: str,
    *,
    rounds: int = 60,
    warm_up: int = 5,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Quartiles]:
    """Time every side in every round, and give each in units of one of them, round by round."""
    for _ in range(warm_up):
        for side in sides.values():
            side()
    found: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds):
        seconds = {}
        for name, side in sides.items():
            start = clock()
            side()
            seconds[name] = clock() - start
        for name, value in seconds.items():
            found[name].append(value / seconds[unit])
    return {name: Quartiles.of(values) for name, values in found.items() if name != unit}
