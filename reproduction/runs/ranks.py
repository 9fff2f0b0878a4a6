"""Several processes, started by torchrun, that share the tasks of each meta-step."""

import os
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from reproduction.method.episodes import Episodes, Params
from reproduction.runs.interruption import Interrupted


def count() -> int:
    """Return how many processes torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Return whether this is the process that writes and speaks."""
    return os.environ.get("RANK", "0") == "0"


def own_device(kind: str) -> torch.device:
    """Return the device of this process, a GPU of its own where `kind` is 'cuda'."""
    if kind == "cuda" and count() > 1:
        return torch.device(kind, int(os.environ["LOCAL_RANK"]))
    return torch.device(kind)


@contextmanager
def join(device: torch.device) -> Iterator["Ranks"]:
    """Join the other processes: by NCCL on GPUs, by gloo on CPUs.

    Parameters
    ----------
    device
        Where this process computes.

    Yields
    ------
    Ranks
        What a meta-step shares its tasks with.
    """
    if count() == 1:
        yield Ranks()
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    together = True
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size())
    except BaseException as error:
        # After any other error the others may be inside a reduction: torchrun ends them.
        together = isinstance(error, Interrupted)
        raise
    finally:
        if together:
            dist.destroy_process_group()


@dataclass
class Ranks:
    """The processes among which the tasks of a meta-step are divided; by default this one alone.

    Every process draws the whole batch from the same stream of random numbers and takes its
    part, so that the tasks do not depend on the number of processes. Each takes the same Adam
    step. What must not differ, the seconds that decide the end and the request to stop, travels
    with the gradient in one reduction.
    """

    rank: int = 0
    size: int = 1
    _agreed: tuple[float, bool] = (0.0, False)
    _pending: deque[tuple[Tensor, torch.cuda.Event | None]] = field(default_factory=deque)

    def begin(self, seconds: float) -> None:
        """Start a training that has taken so many seconds already."""
        self._agreed = (seconds, False)
        self._pending.clear()

    def share(self, episodes: Episodes) -> Episodes:
        """Return this process's part of a batch of tasks."""
        start, end = self._bounds(len(episodes.support_x))
        return Episodes(*(part[start:end] for part in episodes))

    def average(
        self, gradient: Params, figures: dict[str, Tensor], tasks: int, seconds: float, stop: bool
    ) -> tuple[Params, dict[str, Tensor]]:
        """Average over all tasks of a meta-step what each process has averaged over its part.

        Parameters
        ----------
        gradient
            The mean over this process's part.
        figures
            Scalars, means over this process's part.
        tasks
            Tasks of the whole meta-step.
        seconds, stop
            What `agreed` is to return, see there.

        Returns
        -------
        gradient : Params
            The mean over all tasks.
        figures : dict of Tensor
            The means over all tasks.
        """
        if self.size == 1:
            return gradient, figures
        start, end = self._bounds(tasks)
        leaves = [leaf.reshape(-1) for leaf in gradient.values()]
        measured = torch.stack(list(figures.values()))
        words = torch.tensor([seconds if self.rank == 0 else 0.0, float(stop)])
        if measured.is_cuda:
            words = words.pin_memory().to(measured.device, non_blocking=True)
        flat = torch.cat([*leaves, measured]) * ((end - start) / tasks)
        flat = torch.cat([flat, words])
        dist.all_reduce(flat)
        *parts, means, words = flat.split([*map(len, leaves), len(measured), len(words)])
        self._remember(words)
        reduced = {
            name: part.view(leaf.shape).to(leaf.dtype)
            for (name, leaf), part in zip(gradient.items(), parts, strict=True)
        }
        return reduced, dict(zip(figures, means.float(), strict=True))

    def agreed(self, seconds: float, stop: bool) -> tuple[float, bool]:
        """Return the first process's seconds, and whether any process is to stop.

        They are those of the last `average`; on GPUs of the one before it, so that no process
        waits for its GPU.

        Parameters
        ----------
        seconds, stop
            The answer where this process is alone.

        Returns
        -------
        tuple of float and bool
            The same in all processes.
        """
        if self.size == 1:
            return seconds, stop
        while self._pending:
            words, copied = self._pending[0]
            if copied is not None:
                if len(self._pending) == 1:
                    break
                copied.synchronize()
            self._pending.popleft()
            first, stops = words.tolist()
            self._agreed = (first, stops > 0)
        return self._agreed

    def broadcast(self, content: bytes) -> bytes:
        """Return the first process's bytes in each process."""
        if self.size == 1:
            return content
        device = "cuda" if dist.get_backend() == "nccl" else "cpu"
        length = torch.tensor([len(content)], device=device)
        dist.broadcast(length, 0)
        if not int(length):
            return b""
        data = torch.zeros(int(length), dtype=torch.uint8, device=device)
        if self.rank == 0:
            data.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
        dist.broadcast(data, 0)
        return data.cpu().numpy().tobytes()

    def _bounds(self, tasks: int) -> tuple[int, int]:
        return self.rank * tasks // self.size, (self.rank + 1) * tasks // self.size

    def _remember(self, words: Tensor) -> None:
        if not words.is_cuda:
            self._pending.append((words, None))
            return
        here = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
        here.copy_(words, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        self._pending.append((here, copied))
