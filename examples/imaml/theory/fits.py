"""Orders of growth: straight lines through measurements, with intervals over seeds."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

# The 97.5% quantile of Student's t, by the number of seeds.
QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


@dataclass(frozen=True)
class Exponent:
    """An exponent p of y = c x^p, and half the width of its 95% interval.

    Parameters
    ----------
    value
        The mean over the seeds.
    interval
        Half the width; NaN for a single seed.
    """

    value: float
    interval: float

    def __str__(self) -> str:
        """Write both."""
        if math.isnan(self.interval):
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ± {self.interval:.2f}"


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Return the slope of the least-squares line through points."""
    x_mean, y_mean = sum(x) / len(x), sum(y) / len(y)
    above = sum((a - x_mean) * (b - y_mean) for a, b in zip(x, y, strict=True))
    return above / sum((a - x_mean) ** 2 for a in x)


def exponent(points: Sequence[Sequence[tuple[float, float]]]) -> Exponent:
    """Fit a power law to each seed's points by log-log regression.

    Parameters
    ----------
    points
        For each seed its (x, y), all positive.

    Returns
    -------
    Exponent
        Mean and interval of the slopes.
    """
    slopes = []
    for of_seed in points:
        logs = [(math.log(x), math.log(y)) for x, y in of_seed]
        slopes.append(slope(*zip(*logs, strict=True)))
    mean = sum(slopes) / len(slopes)
    if len(slopes) == 1:
        return Exponent(mean, math.nan)
    deviation = math.sqrt(sum((s - mean) ** 2 for s in slopes) / (len(slopes) - 1))
    quantile = QUANTILES.get(len(slopes), 2.0)
    return Exponent(mean, quantile * deviation / math.sqrt(len(slopes)))


def bound_exponent(kappas: Sequence[float], promised: float) -> float:
    """Fit the textbook rate itself over the same condition numbers.

    Parameters
    ----------
    kappas
        The condition numbers.
    promised
        The exponent that the rate has for large ones: 1 or 1/2.

    Returns
    -------
    float
        The exponent of -1 / log(rate), the rate being (kappa - 1) / (kappa + 1) of gradient
        descent, or sqrt(1 - 1 / sqrt(kappa)) of Nesterov's method.
    """
    rates = [
        (k - 1) / (k + 1) if promised == 1 else math.sqrt(1 - 1 / math.sqrt(k)) for k in kappas
    ]
    points = [(k, -1 / math.log(rate)) for k, rate in zip(kappas, rates, strict=True)]
    return exponent([points]).value


def agreement(found: float, promised: float) -> str:
    """Say in words whether an exponent is the promised one, to within 0.1."""
    if abs(found - promised) <= 0.1:
        return "agrees"
    return "grows more slowly" if found < promised else "grows faster"
