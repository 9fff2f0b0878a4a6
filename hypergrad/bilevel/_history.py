"""The numbers that a run leaves behind, few enough to be kept, plotted and saved."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from torch import Tensor

from .._errors import StructureMismatch
from .._info import Status
from ._step_info import StepInfo

_MOST = 2048  # records
_AT_ONCE = 64  # tensors that wait to be read
_FIELDS = ("step", "seconds", "outer_value", "inner_norm", "residual_norm", "status")
_LABELS = {"outer_value": "outer loss", "inner_norm": "norm of the inner gradient"}

_Record = list[Any]  # in the order of the fields


class History:
    """The numbers of the steps that `Bilevel.run` has made.

    Up to 2048 steps all are kept. Then every second one is left out, and every second of those to
    come, and so on: a history is never longer, whatever the length of the run. Numbers are read
    from the device when they are asked for, or 64 steps at a time.

    Attributes
    ----------
    step : list of int
        Which steps these are: the one after the first is 2, say.
    seconds : list of float
        Of the clock, since the first step began; the time between two calls of `run` is left out.
    outer_value, inner_norm : list of float
        As in `StepInfo`.
    residual_norm : list of float
        The relative residual of the linear system, as in `SolveInfo`; NaN where there is none.
    status : list of int
        The `Status` of the linear system; -1 where there is none.

    Examples
    --------
    >>> import torch, hypergrad
    >>> loop = hypergrad.Bilevel(
    ...     lambda w, t: (w**2).sum(), lambda w, t: ((w - t) ** 2).sum() / 2,
    ...     torch.zeros(2), torch.ones(2),
    ...     inner_optimizer=lambda v: torch.optim.SGD(v, lr=1.0),
    ...     outer_optimizer=lambda v: torch.optim.SGD(v, lr=0.25),
    ... )
    >>> for step in loop.run(3):
    ...     pass
    >>> loop.history.step, loop.history.outer_value
    ([1, 2, 3], [2.0, 0.5, 0.125])
    """

    def __init__(self) -> None:
        self._records: list[_Record] = []
        self._unread = 0  # of them, at the end
        self._every = 1
        self._seconds = 0.0

    def add(self, info: StepInfo, seconds: float) -> None:
        """Add a step.

        Parameters
        ----------
        info : StepInfo
            Its record.
        seconds : float
            How long it took, with what was done since the last one.
        """
        self._seconds += seconds
        if info.step % self._every:
            return
        solve = info.info
        record = [info.step, self._seconds, info.outer_value, info.inner_norm, math.nan, -1]
        if solve is not None:
            record[4:] = [solve.residual_norm, solve.status]
        self._records.append(record)
        self._unread += 1
        if self._unread >= _AT_ONCE:
            self._read()
        if len(self._records) > _MOST:
            self._read()
            self._every *= 2
            self._records = [r for r in self._records if not r[0] % self._every]

    def __len__(self) -> int:
        """Count the steps that are kept."""
        return len(self._records)

    def __repr__(self) -> str:
        """Write how much there is."""
        of = f"every {self._every} steps, " if self._every > 1 else ""
        return f"History({len(self)} steps, {of}{self._seconds:.3g} s)"

    @property
    def step(self) -> list[int]:
        """Which steps these are."""
        return self._column("step")

    @property
    def seconds(self) -> list[float]:
        """The time since the first step began."""
        return self._column("seconds")

    @property
    def outer_value(self) -> list[float]:
        """The outer loss of each step."""
        return self._column("outer_value")

    @property
    def inner_norm(self) -> list[float]:
        """The norm of the inner condition of each step."""
        return self._column("inner_norm")

    @property
    def residual_norm(self) -> list[float]:
        """The residual of each step's linear system."""
        return self._column("residual_norm")

    @property
    def status(self) -> list[int]:
        """The status of each step's linear system."""
        return self._column("status")

    def plot(self, axes: Any = None) -> Any:
        """Plot the outer loss and the norm of the inner gradient against the step.

        Parameters
        ----------
        axes : sequence of matplotlib.axes.Axes, optional
            Two to draw in. None: a figure is made.

        Returns
        -------
        figure : matplotlib.figure.Figure
            With `savefig`, say.

        Raises
        ------
        ImportError
            Where matplotlib is not installed.
        ValueError
            If there is no step to plot.
        """
        try:
            import matplotlib.pyplot as plt
        except ImportError as error:
            raise ImportError(
                "history.plot() needs matplotlib: pip install matplotlib. The numbers themselves "
                "are history.step, history.outer_value and so on."
            ) from error
        if not len(self):
            raise ValueError(
                "There is nothing to plot: the history has the steps of Bilevel.run, and none was "
                "made."
            )
        if axes is None:
            _, axes = plt.subplots(2, 1, sharex=True, figsize=(6.4, 5.0), layout="constrained")
        for one, (name, label) in zip(axes, _LABELS.items(), strict=True):
            values = self._column(name)
            one.plot(self.step, values, color="C0")
            failed = [i for i, status in enumerate(self.status) if status in _FAILED]
            if name == "outer_value" and failed:
                at = [self.step[i] for i in failed], [values[i] for i in failed]
                one.plot(*at, ".", color="C1", label="linear system not solved")
                one.legend()
            one.set_ylabel(label)
            one.grid(alpha=0.3)
        if all(value > 0 for value in self.inner_norm):
            axes[1].set_yscale("log")
        axes[1].set_xlabel("outer step")
        return axes[0].figure

    def write(self, writer: Any, prefix: str = "bilevel/") -> None:
        """Write all of it to TensorBoard.

        Parameters
        ----------
        writer
            A `torch.utils.tensorboard.SummaryWriter`, or anything with
            ``add_scalar(tag, value, step)``.
        prefix : str
            What the tags begin with.

        Raises
        ------
        TypeError
            If it has no `add_scalar`.
        """
        if not callable(getattr(writer, "add_scalar", None)):
            raise TypeError(
                "writer must have add_scalar(tag, value, step), as the SummaryWriter of "
                f"torch.utils.tensorboard has; got {type(writer).__name__}."
            )
        for record in self._rows():
            for name, value in zip(_FIELDS[1:], record[1:], strict=True):
                if value == value and (name != "status" or value >= 0):
                    writer.add_scalar(prefix + name, value, record[0])

    def state(self) -> dict[str, Any]:
        """Copy it as lists of numbers, for a state that is saved."""
        columns = {name: self._column(name) for name in _FIELDS}
        return {"every": self._every, "total": self._seconds, **columns}

    @classmethod
    def of(cls, state: dict[str, Any]) -> History:
        """Make one of what `state` has returned; of an empty dict, one without steps.

        Parameters
        ----------
        state : dict
            A state.

        Returns
        -------
        history : History
            With the steps in it.

        Raises
        ------
        StructureMismatch
            If it is none.
        """
        made = cls()
        if not state:
            return made
        columns = [state.get(name) for name in _FIELDS]
        lengths = {len(c) if isinstance(c, list) else -1 for c in columns}
        if len(lengths) != 1 or -1 in lengths or not {"every", "total"} <= state.keys():
            raise StructureMismatch(
                f"The history in this state is none: it must have {', '.join(_FIELDS)}, lists of "
                "numbers of one length.",
                argument="state",
            )
        made._records = [list(row) for row in zip(*(c or () for c in columns), strict=True)]
        made._every, made._seconds = int(state["every"]), float(state["total"])
        return made

    def _column(self, name: str) -> list[Any]:
        place = _FIELDS.index(name)
        return [record[place] for record in self._rows()]

    def _rows(self) -> Iterator[_Record]:
        self._read()
        return iter(self._records)

    def _read(self) -> None:
        """Turn the tensors of the last records into numbers."""
        for record in self._records[len(self._records) - self._unread :]:
            for place, value in enumerate(record):
                if isinstance(value, Tensor):
                    record[place] = value.max().item()  # of several tasks, the worst
        self._unread = 0


_FAILED = {int(s) for s in Status} - {
    int(Status.CONVERGED),
    int(Status.STAGNATED),
    int(Status.MAX_ITERATIONS),
}
