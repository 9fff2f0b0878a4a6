"""Inner steps by torchopt's functional optimisers, where torchopt is installed."""

import warnings
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree as pytree

from reproduction.method.episodes import Params
from reproduction.method.inner import FirstOrderSteps, ProximalProblem

OPTIMISERS: dict[str, dict[str, float]] = {
    "sgd": {},
    "adam": {"eps_root": 1e-8},  # at 0 the derivative is not finite where a gradient is zero
    "rmsprop": {},
    "adagrad": {},
}
UNROLLABLE = ("sgd", "adam")


@dataclass(frozen=True)
class TorchOptSteps(FirstOrderSteps):
    """A fixed number of steps of an optimiser of torchopt, at its defaults but for the rate.

    One can differentiate through those of `UNROLLABLE`; the others take the square root of zero.

    Parameters
    ----------
    optimiser
        The name of a function of torchopt, one of `OPTIMISERS`.
    steps
        Number of steps.
    lr
        Its rate.
    proximal
        Whether the proximal term takes part; MAML has none.

    Raises
    ------
    ImportError
        If torchopt is not installed.
    """

    optimiser: str
    steps: int
    lr: float
    proximal: bool = True

    def __post_init__(self) -> None:
        """Say at once that torchopt is missing."""
        self._transformation()

    @property
    def unrollable(self) -> bool:
        """Whether the steps have finite derivatives."""
        return self.optimiser in UNROLLABLE

    def start(self, centre: Params) -> tuple[Params, Any]:
        """Return the parameters and the optimiser's own state."""
        return centre, self._transformation().init(centre)

    def step(
        self, problem: ProximalProblem, state: tuple[Params, Any], centre: Params
    ) -> tuple[Params, Any]:
        """Take one step."""
        torchopt = _torchopt()
        params, memory = state
        slope = self.slope(problem, params, centre)
        # torchopt adds to its memory in place, so under vmap that has to be one a task as well.
        zero = torch.zeros_like(next(iter(slope.values())).sum())
        memory = pytree.tree_map(
            lambda leaf: leaf + zero if torch.is_floating_point(leaf) else leaf, memory
        )
        with warnings.catch_warnings():
            # Its addcmul_ is a loop over the tasks under vmap: right, and slower.
            warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)
            updates, memory = self._transformation().update(
                slope, memory, params=params, inplace=False
            )
        return torchopt.apply_updates(params, updates, inplace=False), memory

    def params(self, state: tuple[Params, Any]) -> Params:
        """Return the parameters without the optimiser's state."""
        return state[0]

    def _transformation(self) -> Any:
        return getattr(_torchopt(), self.optimiser)(self.lr, **OPTIMISERS[self.optimiser])


def _torchopt() -> Any:
    with warnings.catch_warnings():
        # torchopt calls torch.func by its old name.
        warnings.filterwarnings("ignore", "We've integrated functorch", FutureWarning)
        import torchopt
    return torchopt
