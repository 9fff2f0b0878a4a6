"""What a training asks of a learner, whatever part of the network a task adapts."""

from typing import Protocol

from torch import Tensor

from reproduction.method.episodes import Episodes, Params
from reproduction.method.systems import Differentiation, Method


class Learner(Protocol):
    """How a task is adapted to, and how the meta-parameters learn from it."""

    @property
    def method(self) -> Method:
        """The name of the system that this is."""
        ...

    @property
    def differentiation(self) -> Differentiation:
        """How the meta-gradient is computed."""
        ...

    def start(self, params: Params) -> Params:
        """Return the meta-parameters to start from, given the network's parameters."""
        ...

    def model(self, params: Params, x: Tensor, /) -> Tensor:
        """Return a task's outputs before adaptation."""
        ...

    def predict(self, meta: Params, episodes: Episodes) -> Tensor:
        """Adapt to each task of a batch and evaluate the network at its queries."""
        ...

    def predict_one_at_a_time(self, meta: Params, episodes: Episodes) -> Tensor:
        """Adapt to each task, and evaluate each query in a batch of the support set and itself."""
        ...

    def meta_gradient(self, meta: Params, episodes: Episodes) -> tuple[Params, dict[str, Tensor]]:
        """Average the tasks' meta-gradients."""
        ...
