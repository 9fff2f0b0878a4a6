"""Which seconds count: the processor's own, where one thread of it does a process's work."""

import time
from typing import Literal, TypeAlias

import torch

ClockName: TypeAlias = Literal["processor", "wall"]


def clock_for(device: torch.device, threads: int) -> ClockName:
    """Choose the seconds that budgets are counted in.

    On a CPU with one thread they are the processor's: other programs on the machine then do not
    decide how far a training gets. Of several processes the first one's count; while it waits for
    the others it burns none. Threads that wait for each other do burn processor time, and a GPU
    burns none, so that there it is the clock on the wall.

    Parameters
    ----------
    device, threads
        What a process runs on.

    Returns
    -------
    str
        'processor' or 'wall'.
    """
    return "processor" if device.type == "cpu" and threads == 1 else "wall"


class Clock:
    """Measures the seconds between `start` and `stop`.

    Parameters
    ----------
    device
        What is waited for in `synchronise`.
    name
        Which seconds.
    """

    def __init__(self, device: torch.device, name: ClockName) -> None:
        self._device = device
        self._now = time.process_time if name == "processor" else time.perf_counter
        self._began = 0.0

    def start(self) -> None:
        """Begin to count."""
        self._began = self._now()

    def stop(self) -> float:
        """Return the seconds since `start`."""
        return self._now() - self._began

    def synchronise(self) -> float:
        """Wait for the device, and return the seconds that took."""
        if self._device.type != "cuda":
            return 0.0
        self.start()
        torch.cuda.synchronize(self._device)
        return self.stop()
