"""Everything that a training carries from one meta-step to the next, to a checkpoint and back."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from reproduction.method.episodes import Params
from reproduction.runs.checkpoint import Checkpoint, CheckpointError


@dataclass
class History:
    """What a run has measured so far."""

    records: list[dict[str, float]] = field(default_factory=list)
    """One a validation: same seed, same numbers on the CPU."""
    timings: list[dict[str, float]] = field(default_factory=list)
    """Beside each record, the seconds of meta-steps so far."""

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Return the seconds and the values of one figure."""
        return [t["seconds"] for t in self.timings], [r[name] for r in self.records]


class Means:
    """Averages over meta-steps, kept on the device until they are asked for."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.steps = 0

    def add(self, figures: dict[str, Tensor]) -> None:
        """Add the figures of one meta-step, each a scalar."""
        for name, value in figures.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def take(self) -> dict[str, float]:
        """Return the averages, and begin anew."""
        means = {name: (total / self.steps).item() for name, total in self.sums.items()}
        self.sums, self.steps = {}, 0
        return means


class TrainingState:
    """Parameters, Adam's state, random numbers, the best so far and what was measured.

    Parameters
    ----------
    start
        The initial meta-parameters.
    generator
        What draws the tasks, if the training is to be kept.
    """

    def __init__(self, start: Params, generator: torch.Generator | None) -> None:
        self.params = {name: leaf.detach().clone() for name, leaf in start.items()}
        self.optimiser = torch.optim.Adam(list(self.params.values()))
        self.generator = generator
        self.best, self.best_params = math.inf, self.params
        self.step, self.seconds = 0, 0.0
        self.history, self.means = History(), Means()

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.params.values())).device

    def update(self, gradient: Params, rate: float) -> None:
        """Take one step of Adam."""
        self.optimiser.param_groups[0]["lr"] = rate
        for name, leaf in self.params.items():
            leaf.grad = gradient[name]
        self.optimiser.step()

    def note_best(self, badness: float) -> None:
        """Keep the parameters if they are the best so far."""
        if badness < self.best:
            self.best = badness
            self.best_params = {n: leaf.detach().clone() for n, leaf in self.params.items()}

    def is_finite(self) -> bool:
        """Return whether all parameters are finite numbers."""
        return all(bool(leaf.isfinite().all()) for leaf in self.params.values())

    def save(self, configuration: dict[str, Any]) -> Checkpoint:
        """Return a checkpoint.

        Parameters
        ----------
        configuration
            What the training was started with.

        Returns
        -------
        Checkpoint
            All that `load` needs.
        """
        tensors = {**_named("params", self.params), **_named("best", self.best_params)}
        for name, leaf in self.params.items():
            for key, value in self.optimiser.state[leaf].items():
                tensors[f"adam {key}/{name}"] = value
        tensors |= _named("sum", self.means.sums)
        tensors["random/torch"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["random/cuda"] = torch.cuda.get_rng_state(self.device)
        if self.generator is not None:
            tensors["random/tasks"] = self.generator.get_state()
        figures = {
            "step": self.step,
            "seconds": self.seconds,
            "best": self.best,
            "steps_since_validation": self.means.steps,
            "records": self.history.records,
            "timings": self.history.timings,
        }
        return Checkpoint(configuration, figures, tensors)

    def load(self, checkpoint: Checkpoint) -> None:
        """Take up what `save` returned.

        Parameters
        ----------
        checkpoint
            From a training of the same network.

        Raises
        ------
        CheckpointError
            If it is one of another network, or of something else.
        """
        figures, tensors = checkpoint.figures, checkpoint.tensors
        best = self._read_like_params(tensors, "best")
        adam = {
            key: self._read_like_params(tensors, f"adam {key}") for key in ("exp_avg", "exp_avg_sq")
        }
        for name, value in self._read_like_params(tensors, "params").items():
            self.params[name].copy_(value)
        one = torch.Size()
        if any(t.shape != one for n, t in tensors.items() if n.startswith(("adam step/", "sum/"))):
            raise CheckpointError("the checkpoint holds no such training: a count is no number")
        try:
            self.optimiser.load_state_dict({
                "param_groups": self.optimiser.state_dict()["param_groups"],
                "state": {
                    k: {"step": tensors[f"adam step/{name}"]}
                    | {key: values[name] for key, values in adam.items()}
                    for k, name in enumerate(self.params)
                },
            })
            self.means.sums = {
                name.partition("/")[2]: value.to(self.device)
                for name, value in tensors.items()
                if name.startswith("sum/")
            }
            self.means.steps = int(figures["steps_since_validation"])
            self.history = History(list(figures["records"]), list(figures["timings"]))
            self.best, self.best_params = float(figures["best"]), best
            self.step, self.seconds = int(figures["step"]), float(figures["seconds"])
            torch.set_rng_state(tensors["random/torch"])
            if self.device.type == "cuda":
                torch.cuda.set_rng_state(tensors["random/cuda"], self.device)
            if self.generator is not None:
                self.generator.set_state(tensors["random/tasks"])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the checkpoint holds no such training: {error!r}") from error

    def _read_like_params(self, tensors: dict[str, Tensor], group: str) -> Params:
        found: Params = {}
        for name, leaf in self.params.items():
            value = tensors.get(f"{group}/{name}")
            if value is None or (value.shape, value.dtype) != (leaf.shape, leaf.dtype):
                text = "missing" if value is None else f"{value.dtype} {list(value.shape)}"
                raise CheckpointError(
                    f"the checkpoint is of another network: {group}/{name} is {text}, "
                    f"expected {leaf.dtype} {list(leaf.shape)}"
                )
            found[name] = value.to(leaf.device)
        return found


def _named(group: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{group}/{name}": tensor for name, tensor in tensors.items()}
