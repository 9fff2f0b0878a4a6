"""Processes that work together: a reduction, and the end of all of them where one fails."""

from __future__ import annotations

import datetime
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from .._errors import NotConnected, RankFailed
from .refused_modules import RunsOnProcesses

_PATIENCE = 3.0  # seconds that a process which has failed waits for the others to fail too
_NOBODY = 2**15 + 1741  # a tag that no message has
# What the errors of gloo and of NCCL have in their text.
_SIGNS = ("/gloo/", "pair closure", "Connection closed", "NCCL", "timed out", "Timed out")
_evaluations: dict[str, int] = {}  # how many evaluations began, by the group's name
# Who evaluates together with this process.
_group: ContextVar[Any] = ContextVar("hypergrad_ranks_together", default=None)


def all_reduce(figures: Tensor, group: Any, kind: str = "sum") -> Tensor:
    """Reduce figures over processes.

    Parameters
    ----------
    figures : Tensor
        One's own, which stay as they are.
    group : ProcessGroup
        Who takes part.
    kind : {"sum", "max"}
        How.

    Returns
    -------
    reduced : Tensor
        The same, bit for bit, in all processes.

    Raises
    ------
    RankFailed
        If another process has ended, or did not arrive in time.
    """
    operation = {"sum": torch.distributed.ReduceOp.SUM, "max": torch.distributed.ReduceOp.MAX}[kind]
    packed = figures.detach().clone(memory_format=torch.contiguous_format)
    try:
        torch.distributed.all_reduce(packed, op=operation, group=group)
    except RuntimeError as error:
        raise RankFailed(_parted(group, error)) from error
    return packed


def any_process(here: Sequence[bool], group: Any) -> list[bool]:
    """Say what is true in any of the processes.

    Parameters
    ----------
    here : sequence of bool
        What is true in this one.
    group : ProcessGroup
        Who takes part.

    Returns
    -------
    anywhere : list of bool
        As many.
    """
    device = torch.device("cpu")
    if torch.distributed.get_backend(group) == "nccl":
        device = torch.device("cuda", torch.cuda.current_device())
    flags = torch.tensor([float(flag) for flag in here], device=device)
    return (all_reduce(flags, group, "max") > 0).tolist()


def run_alike(here: bool) -> None:
    """Raise if a module of several processes runs in some of those that evaluate together alone.

    Parameters
    ----------
    here : bool
        Whether it runs in this one, where that is not an error.

    Raises
    ------
    NotConnected
        If it does not, and does so in another process.
    """
    group = _group.get()
    if group is not None and any_process([here], group)[0] and not here:
        raise NotConnected(
            "In this process a loss does not run the module, and in another one it does: is its "
            "batch empty? All processes run it together: add module(x).sum() * 0 of an empty x, or "
            "leave such a batch out in all of them.",
            argument="params",
        )


def _parted(group: Any, error: BaseException) -> str:
    """Word the error of a process whose collective did not come about."""
    failed = _failed(group)
    if failed:
        return (
            f"A loss raised an error in process {', '.join(map(str, failed))}, which raises it "
            "there. All processes stop, so that none waits for another; their process group "
            "cannot be used any more."
        )
    return (
        "A reduction over processes did not come about: another process has ended or did not "
        f"arrive in time. Look for its own error. ({error})"
    )


@contextmanager
def together(group: Any) -> Iterator[None]:
    """Evaluate something that all processes evaluate, with collectives of PyTorch's own in it.

    Where it fails in all of them, each raises its own error. Where it fails in some, the others
    would wait in a collective for ever: those that failed break the group's connections, so that
    the others raise `RankFailed`.

    Parameters
    ----------
    group : ProcessGroup
        Who takes part.

    Yields
    ------
    None
        While it runs.

    Raises
    ------
    RankFailed
        If it has failed in another process and not here.
    """
    if _group.get() is not None:
        yield
        return
    name = _name(group)
    _evaluations[name] = _evaluations.get(name, 0) + 1
    token = _group.set(group)
    try:
        yield
    except Exception as error:
        if isinstance(error, RankFailed | RunsOnProcesses):
            raise
        if _broken(error):
            raise RankFailed(_parted(group, error)) from error
        _end(group)
        raise
    finally:
        _group.reset(token)


def _broken(error: BaseException | None) -> bool:
    """Say whether an error is that of a collective that another process did not take part in."""
    if error is None:
        return False
    of_collective = type(error) is RuntimeError or isinstance(error, torch.distributed.DistError)
    if of_collective and any(sign in str(error) for sign in _SIGNS):
        return True
    return _broken(error.__cause__)


def _key(group: Any, rank: int) -> str:
    name = _name(group)
    return f"hypergrad/{name}/{_evaluations.get(name, 0)}/failed/{rank}"


def _name(group: Any) -> str:
    return str(getattr(group, "group_name", ""))


def _store() -> Any:
    return torch.distributed.distributed_c10d._get_default_store()


def _failed(group: Any) -> list[int]:
    """List the processes whose evaluation has failed."""
    distributed, store = torch.distributed, _store()
    own, count = distributed.get_rank(group), distributed.get_world_size(group)
    return [r for r in range(count) if r != own and store.add(_key(group, r), 0) > 0]


def _end(group: Any) -> None:
    """Tell the others that this process has failed, and wake those that have not."""
    distributed = torch.distributed
    own, count = distributed.get_rank(group), distributed.get_world_size(group)
    if count == 1:
        return
    _store().add(_key(group, own), 1)
    until = time.monotonic() + _PATIENCE
    while time.monotonic() < until:
        if len(_failed(group)) == count - 1:
            return
        time.sleep(0.05)
    with suppress(Exception):
        if distributed.get_backend(group) == "gloo":
            # A receipt that is out of time closes the connections to all others.
            peer = distributed.get_global_rank(group, (own + 1) % count)
            nothing = torch.zeros(1, device="cpu")
            work = distributed.irecv(nothing, src=peer, group=group, tag=_NOBODY)
            assert work is not None
            work.wait(datetime.timedelta(milliseconds=1))
        else:
            group.abort()
