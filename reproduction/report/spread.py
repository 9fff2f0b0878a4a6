"""Means over seeds, and differences between two systems seed by seed."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import mean, stdev

# Student's t, 97.5%, by degrees of freedom.
STUDENT = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """A mean over seeds, the standard deviation, and half of the mean's 95% interval.

    The last two are NaN for a single seed.
    """

    mean: float
    deviation: float
    interval: float
    count: int

    @property
    def is_apart_from_zero(self) -> bool:
        """Whether the interval leaves zero out; never for a single seed."""
        return abs(self.mean) > self.interval


def spread(values: Sequence[float]) -> Spread:
    """Summarise one value a seed.

    Parameters
    ----------
    values
        At least one, at most ten.

    Returns
    -------
    Spread
        By Student's t.
    """
    n = len(values)
    if n < 2:
        return Spread(values[0], math.nan, math.nan, n)
    deviation = stdev(values)
    return Spread(mean(values), deviation, STUDENT[n - 1] * deviation / math.sqrt(n), n)


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Spread | None:
    """Summarise the differences of two systems over the seeds that both have.

    Parameters
    ----------
    one, other
        A value by seed.

    Returns
    -------
    Spread or None
        Of one minus other; None where they share no seed.
    """
    seeds = sorted(one.keys() & other.keys())
    return spread([one[s] - other[s] for s in seeds]) if seeds else None
