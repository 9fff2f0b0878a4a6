"""Sinusoid regression as in Finn et al. 2017."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from reproduction.method.episodes import Episodes

AMPLITUDES = (0.1, 5.0)
PHASES = (0.0, math.pi)
INPUTS = (-5.0, 5.0)


@dataclass(frozen=True)
class SinusoidTasks:
    """Draws batches of tasks y = amplitude * sin(x - phase).

    Parameters
    ----------
    shots
        Points a task gives to adapt to, drawn evenly at random from [-5, 5].
    queries
        Points that judge the adapted network, drawn in the same way.
    """

    shots: int
    queries: int

    def sample(self, tasks: int, generator: torch.Generator) -> Episodes:
        """Draw `tasks` tasks; inputs and targets have shape (tasks, points, 1).

        Parameters
        ----------
        tasks
            Number of tasks.
        generator
            The source of random numbers; its device is where the tasks live.

        Returns
        -------
        Episodes
            Support set and queries of each task.
        """
        return self._draw(tasks, generator, None)

    def sample_for_test(self, tasks: int, generator: torch.Generator, points: int) -> Episodes:
        """Draw `tasks` tasks whose queries are `points` even points of [-5, 5].

        Parameters
        ----------
        tasks
            Number of tasks.
        generator
            The source of random numbers; its device is where the tasks live.
        points
            Number of queries a task.

        Returns
        -------
        Episodes
            Support set and queries of each task.
        """
        grid = torch.linspace(*INPUTS, points, device=generator.device)
        return self._draw(tasks, generator, grid.view(1, points, 1).expand(tasks, points, 1))

    def _draw(self, tasks: int, generator: torch.Generator, query_x: Tensor | None) -> Episodes:
        def uniform(bounds: tuple[float, float], *shape: int) -> Tensor:
            low, high = bounds
            unit = torch.rand(tasks, *shape, 1, generator=generator, device=generator.device)
            return low + (high - low) * unit

        amplitude, phase = uniform(AMPLITUDES, 1), uniform(PHASES, 1)
        support_x = uniform(INPUTS, self.shots)
        if query_x is None:
            query_x = uniform(INPUTS, self.queries)
        return Episodes(
            support_x,
            amplitude * torch.sin(support_x - phase),
            query_x,
            amplitude * torch.sin(query_x - phase),
        )
