"""What the papers report on Omniglot: accuracy in %, and half of the 95% interval.

Rajeswaran et al. 2019, table 2, which has the figures of Finn et al. 2017 and Nichol et al. 2018
beside its own.
"""

from typing import TypeAlias

from reproduction.method.systems import Method

Setting: TypeAlias = tuple[int, int]
"""Ways and shots."""

SETTINGS: tuple[Setting, ...] = ((5, 1), (5, 5), (20, 1), (20, 5))

_ROWS: dict[Method, tuple[tuple[float, float], ...]] = {
    "maml": ((98.7, 0.4), (99.9, 0.1), (95.8, 0.3), (98.9, 0.2)),
    "fomaml": ((98.3, 0.5), (99.2, 0.2), (89.4, 0.5), (97.9, 0.1)),
    "reptile": ((97.68, 0.04), (99.48, 0.06), (89.43, 0.14), (97.12, 0.32)),
    "imaml-gd": ((99.16, 0.35), (99.67, 0.12), (94.46, 0.42), (98.69, 0.1)),
    "imaml-hf": ((99.50, 0.26), (99.74, 0.11), (96.18, 0.36), (99.14, 0.1)),
}

PUBLISHED: dict[tuple[Method, Setting], tuple[float, float]] = {
    (method, setting): row[k] for method, row in _ROWS.items() for k, setting in enumerate(SETTINGS)
}
META_STEPS, TASKS = 20_000, 32
"""At least so many meta-steps, of so many tasks, are behind the rows of iMAML."""
