"""Models of a thousand features on data of scikit-learn, with 1, 10, 100 or 1,000 weight decays.

The features, the data and both losses of a data set are the same whatever the number of decays: ten
widths of random Fourier features, times ten views of the data, times ten draws. One decay is shared
by all; ten, a width each; a hundred, a width of a view each; a thousand, a feature each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits
from torch import Tensor
from torch.nn import functional

COUNTS = (1, 10, 100, 1000)
FEATURES = 1000
LOW, HIGH = math.log(1e-6), math.log(1e2)  # of the logarithm of every decay
MIDDLE = (LOW + HIGH) / 2  # where every search begins

Loss = Callable[[Tensor, Tensor], Tensor]
Rows = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Problem:
    """Three losses of the weights and the log decays, float64.

    Parameters
    ----------
    inner, validation, test
        ``(w, log_decay) -> loss``. The last of the 1,001 entries of `w` is the intercept, which no
        decay holds back.
    count
        How many decays.
    train
        Features and targets that the inner loss is made of.
    """

    name: str
    count: int
    inner: Loss
    validation: Loss
    test: Loss
    train: Rows

    @property
    def start(self) -> Tensor:
        """The log decays in the middle of their range."""
        return torch.full((self.count,), MIDDLE, dtype=torch.float64)

    @property
    def zeros(self) -> Tensor:
        """The weights that an inner solver starts from."""
        return torch.zeros(FEATURES + 1, dtype=torch.float64)


def coefficients(w: Tensor, log_decay: Tensor) -> Tensor:
    """The coefficients of the features: `w` is in units in which all of them decay alike.

    A decay d of a coefficient is a scale 1 / sqrt(d) of its feature, and a decay of one. The
    minimiser is the same model, and is found in fewer products.
    """
    scale = (-log_decay / 2).exp().repeat_interleave(FEATURES // len(log_decay))
    return scale * w[:-1]


def problem(name: str, count: int, seed: int) -> Problem:
    """One data set, split at random into thirds, with some number of decays."""
    train, valid, test = _thirds(name, seed)
    error: Callable[..., Tensor] = functional.mse_loss
    if name != "diabetes":
        error = functional.binary_cross_entropy_with_logits

    def on(rows: Rows) -> Loss:
        x, y = rows
        return lambda w, log_decay: error(x @ coefficients(w, log_decay) + w[-1], y)

    fitted = on(train)

    def inner(w: Tensor, log_decay: Tensor) -> Tensor:
        return fitted(w, log_decay) + w[:-1].square().sum() / 2

    return Problem(name, count, inner, on(valid), on(test), train)


def _thirds(name: str, seed: int) -> tuple[Rows, Rows, Rows]:
    """The features and targets of training, validation and test rows."""
    x, y, views = DATA[name]()
    generator = torch.Generator().manual_seed(1000 + seed)
    order = torch.randperm(len(x), generator=generator)
    x, y = x[order], y[order]
    third = len(x) // 3
    x = (x - x[:third].mean(0)) / x[:third].std(0).clamp(min=0.05 * x.std())
    if name == "diabetes":
        y = (y - y[:third].mean()) / y[:third].std()
    columns = []
    for width in torch.logspace(-1, 0.5, 10).tolist():
        for view in views:
            shape = len(view), FEATURES // 100
            slopes = torch.randn(*shape, generator=generator, dtype=x.dtype) * width
            shifts = torch.rand(shape[1], generator=generator, dtype=x.dtype) * 2 * math.pi
            columns.append(torch.cos(x[:, view] @ slopes / math.sqrt(len(view)) + shifts))
    features = torch.cat(columns, dim=1) * math.sqrt(2 / FEATURES)
    cuts = slice(third), slice(third, 2 * third), slice(2 * third, None)
    first, second, last = ((features[cut], y[cut]) for cut in cuts)
    return first, second, last


def _breast_cancer() -> tuple[Tensor, Tensor, list[list[int]]]:
    """Ten measurements of a cell, with the mean, the deviation and the worst of each."""
    data = load_breast_cancer()
    views = [[i, i + 10, i + 20] for i in range(10)]
    return torch.from_numpy(data.data), torch.from_numpy(data.target).double(), views


def _diabetes() -> tuple[Tensor, Tensor, list[list[int]]]:
    """Ten numbers of a patient, each by itself."""
    data = load_diabetes()
    return torch.from_numpy(data.data), torch.from_numpy(data.target), [[i] for i in range(10)]


def _digits() -> tuple[Tensor, Tensor, list[list[int]]]:
    """Even or odd; nine windows of 4 x 4 pixels, and the whole image."""
    data = load_digits()
    places = torch.arange(64).reshape(8, 8)
    windows = [
        places[i : i + 4, j : j + 4].flatten().tolist() for i in (0, 2, 4) for j in (0, 2, 4)
    ]
    targets = torch.from_numpy(data.target % 2).double()
    return torch.from_numpy(data.data), targets, [*windows, places.flatten().tolist()]


DATA: dict[str, Callable[[], tuple[Tensor, Tensor, list[list[int]]]]] = {
    "breast_cancer": _breast_cancer,
    "diabetes": _diabetes,
    "digits": _digits,
}
