"""Orders of growth: straight lines through measurements, with intervals over seeds."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

# The 97.5% quantile of Student's t, by the number of seeds.
QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}

RATES: dict[str, Callable[[float], float]] = {
    "gradient descent": lambda kappa: (kappa - 1) / (kappa + 1),
    "Nesterov": lambda kappa: math.sqrt(1 - 1 / math.sqrt(kappa)),
    "CG": lambda kappa: (math.sqrt(kappa) - 1) / (math.sqrt(kappa) + 1),
}


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
            return f"{self.value:.3f}"
        return f"{self.value:.3f} ± {self.interval:.3f}"


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


def rate_exponent(kappas: Sequence[float], rate: Callable[[float], float]) -> float:
    """Fit the number of steps that a textbook rate stands for, over the same condition numbers.

    Parameters
    ----------
    kappas
        The condition numbers.
    rate
        From a condition number to the factor by which each step lowers the error.

    Returns
    -------
    float
        The exponent of -1 / log(rate); that of large condition numbers is met in the limit.
    """
    return exponent([[(k, -1 / math.log(rate(k))) for k in kappas]]).value


def agreement(found: float, promised: float) -> str:
    """Say in words whether an exponent is the promised one, to within 0.1."""
    if abs(found - promised) <= 0.1:
        return "agrees"
    return "grows more slowly" if found < promised else "grows faster"
