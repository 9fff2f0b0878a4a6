"""Two autograd functions that make derivatives of every order those of a sum over processes.

`_Copy` is the identity on what all processes hold alike, and its derivative is the sum of theirs;
`_Sum` is the sum, and its derivative is the identity. Each is the other's backward, so that any
order of derivative is made of them. Both carry an anchor, a number of value zero: through it every
process's graph leads to the same collectives in the same order, also where a process's share of
the data is empty and its loss does not depend on anything.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.search import in_front
from .._errors import RankFailed

_FAILED = -1.0
_MOST = 5  # process numbers that a message names


class Session:
    """One evaluation of a shared function: the group, and the figures that are checked.

    Attributes
    ----------
    connected : list of bool, optional
        For each variable of the evaluation, whether some process's share depends on it.
    """

    def __init__(self, group: Any) -> None:
        self._group = group
        self._rank = torch.distributed.get_rank(group)
        self._world = torch.distributed.get_world_size(group)
        self._square: Tensor | None = None  # of the norm of what was copied and not yet checked
        self._count = 0
        self.connected: list[bool] | None = None

    def note(self, parts: Sequence[Tensor]) -> None:
        """Remember a vector that must be the same in all processes, for the next reduction."""
        for part in parts:
            square = part.detach().to(torch.float64).square().sum()
            self._square = square if self._square is None else self._square + square

    def reduce(self, flat: Tensor, *, failed: bool = False) -> Tensor:
        """Sum a vector over processes, after a check that they are at the same place.

        Parameters
        ----------
        flat : Tensor
            One's own part.
        failed : bool
            Whether the vector is a mere stand-in, since there is nothing to give.

        Returns
        -------
        total : Tensor
            The sum; of no meaning with `failed`.

        Raises
        ------
        RankFailed
            If a process has failed, was given other variables, or is somewhere else.
        """
        self._count += 1
        header = flat.new_zeros(2 * self._world)
        if self._square is not None:
            header[self._rank] = self._square.sqrt()
        header[self._world + self._rank] = _FAILED if failed else float(self._count)
        self._square = None
        packed = torch.cat([flat.detach().reshape(-1), header])
        try:
            torch.distributed.all_reduce(packed, group=self._group)
        except RuntimeError as error:
            raise RankFailed(
                f"A reduction over processes did not come about: another process has ended or did "
                f"not arrive in time. Look for its own error. ({error})"
            ) from error
        total, norms, places = packed.split([flat.numel(), self._world, self._world])
        if not failed:
            self._judge(norms.tolist(), places.tolist(), torch.finfo(flat.dtype).eps)
        return total

    def _judge(self, norms: list[float], places: list[float], eps: float) -> None:
        """Judge the same numbers in every process, and so reach the same verdict."""
        failed = [rank for rank, place in enumerate(places) if place == _FAILED]
        if failed:
            raise RankFailed(
                f"The loss or condition raised an error in process {_list(failed)}, which raises "
                "it there. All processes stop, so that none waits for another."
            )
        if any(place != places[0] for place in places):
            raise RankFailed(
                "The processes have parted: they are at different places of one evaluation. Call "
                "the same functions in the same order in all of them, with the same settings."
            )
        # Without rounding they are equal; processors of several kinds may round differently.
        most = max(norms, key=abs)
        if not all(abs(n - norms[0]) <= 1e4 * eps * abs(most) for n in norms) and most == most:
            other = [rank for rank, n in enumerate(norms) if n != norms[0]]
            raise RankFailed(
                f"Process {_list(other)} has other numbers than process 0: the norm of what "
                f"derivatives are taken by, or of the vector that is multiplied, is "
                f"{norms[other[0]]:.6g} there and {norms[0]:.6g} here. Start all processes from "
                "the same params and hparams (broadcast them), wrap both losses in all_reduced, "
                "and pass the same x0."
            )


def copies(session: Session, first: int, parts: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Make aliases of variables whose derivatives are sums over processes, and their anchor."""
    *aliases, anchor = _Copy.apply(session, first, (), *parts)
    return aliases, anchor


def summed(
    session: Session, flags: Sequence[bool], dtype: torch.dtype, anchor: Tensor, parts: list[Tensor]
) -> list[Tensor]:
    """Sum values over processes; `flags`: which variables they depend on, here."""
    return list(_Sum.apply(session, tuple(flags), dtype, anchor, *parts))


def stand_in(
    session: Session, flags: int, dtype: torch.dtype, numel: int, device: torch.device
) -> None:
    """Take part in the reduction of `summed` without having anything to give."""
    zeros = torch.zeros(numel + flags, dtype=dtype, device=device)
    session.reduce(zeros, failed=True)


class _Copy(torch.autograd.Function):
    @staticmethod
    def forward(
        session: Session, first: int | None, lead: tuple[int, ...], *parts: Tensor
    ) -> tuple[Tensor, ...]:
        session.note(parts)
        return *[part.view_as(part) for part in parts], parts[0].new_zeros(lead)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.session, ctx.first, _, *parts = inputs
        ctx.count = len(parts)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *parts, anchor = grads
        known = None if ctx.first is None else ctx.session.connected
        connected = [True] * ctx.count
        if known is not None:
            connected = known[ctx.first : ctx.first + ctx.count]
        if not any(connected):
            return (None,) * (3 + ctx.count)
        sums = _Sum.apply(ctx.session, None, widest(parts), anchor, *parts)
        return None, None, None, *[s if k else None for s, k in zip(sums, connected, strict=True)]

    @staticmethod
    def vmap(
        info: Any, in_dims: Any, session: Session, first: int | None, lead: Any, *parts: Tensor
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        batched = in_front(parts, in_dims[3:], info.batch_size)
        aliases = _Copy.apply(session, first, (info.batch_size, *lead), *batched)
        return aliases, (0,) * len(aliases)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(
        session: Session,
        flags: tuple[bool, ...] | None,
        dtype: torch.dtype,
        anchor: Tensor,
        *parts: Tensor,
    ) -> tuple[Tensor, ...]:
        flat = [part.reshape(-1).to(dtype) for part in parts]
        if flags is not None:
            flat.append(torch.tensor(flags, dtype=dtype, device=flat[0].device))
        sizes = [part.numel() for part in flat]
        sums = list(session.reduce(torch.cat(flat)).split(sizes))
        if flags is not None:
            session.connected = [number > 0 for number in sums.pop().tolist()]
        return tuple(s.reshape(p.shape).to(p.dtype) for s, p in zip(sums, parts, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.session, _, _, anchor, *_ = inputs
        ctx.lead = tuple(anchor.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        *parts, anchor = _Copy.apply(ctx.session, None, ctx.lead, *grads)
        return None, None, None, anchor, *parts

    @staticmethod
    def vmap(
        info: Any,
        in_dims: Any,
        session: Session,
        flags: Any,
        dtype: torch.dtype,
        anchor: Tensor,
        *parts: Tensor,
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        anchor, *batched = in_front((anchor, *parts), in_dims[3:], info.batch_size)
        sums = _Sum.apply(session, flags, dtype, anchor, *batched)
        return sums, (0,) * len(sums)


def widest(parts: Sequence[Tensor]) -> torch.dtype:
    """Choose the dtype that sums are formed in: never narrower than float32."""
    return functools.reduce(torch.promote_types, [p.dtype for p in parts], torch.float32)


def _list(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks[:_MOST])) + (", ..." if len(ranks) > _MOST else "")
