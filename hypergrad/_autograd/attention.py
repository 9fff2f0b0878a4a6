"""Attention: its fused kernels have no second derivative, its MATH kernel has.

A recording that is to be differentiated again and went through a fused kernel is made once more
under the MATH kernel. The choice of kernels belongs to the process, so all threads that need MATH
share it: the first of them saves the caller's choice, and the last restores it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from .._errors import UnsupportedOperation
from .random_numbers import Draw
from .transforms import inside_vmap

T = TypeVar("T")

#: The functions of Python through which losses call attention.
ATTENTION = frozenset({
    functional.scaled_dot_product_attention,
    functional.multi_head_attention_forward,
})

_ATTEMPTS = 3  # another thread may change the choice of the process at any time
_IN_MESSAGES = "scaled_dot_product"
_NODE = "ScaledDotProduct"  # Flash, FlashForCpu, Efficient, Cudnn, FusedOverrideable
_WITHOUT_DERIVATIVE = "torch::autograd::NotImplemented"

_WHY = "A second derivative is needed of attention, and of its kernels SDPBackend.MATH alone has it"
_FIRST_ORDER = 'Minimum(..., products="difference") and penalty_grad need first derivatives alone.'
_AROUND = (
    f"{_WHY}, which is switched off around the call: by torch.nn.attention.sdpa_kernel(...), or by "
    "torch.backends.cuda.enable_math_sdp(False). Add SDPBackend.MATH to the list, or call "
    f"hypergrad outside of it. {_FIRST_ORDER}"
)
_INSIDE = (
    f"{_WHY}, which a loss excludes by torch.nn.attention.sdpa_kernel(...) of its own. Add "
    "SDPBackend.MATH to the list, or leave the context out of the loss. "
    f"{_FIRST_ORDER}"
)
_STILL = (
    f"{_WHY}, but a loss ran another one where MATH was chosen for it: it calls a kernel directly, "
    "or another thread chooses kernels for the process at the same time. Call "
    "torch.nn.functional.scaled_dot_product_attention, and sdpa_kernel(...) in one thread."
)


class FusedAttention(Exception):
    """A recording that went through a fused kernel; whoever makes it begins again."""


class _Shared:
    """The MATH kernel as the choice of the process, for as long as any thread needs it.

    Attributes
    ----------
    users : int
        How many are inside.
    entries : int
        How many have been.
    """

    def __init__(self) -> None:
        self.users = self.entries = 0
        self._lock = threading.Lock()
        self._before: list[bool] = []

    # Not by sdpa_kernel, which must be left by the thread that has entered it (from torch 2.15 on).
    def __enter__(self) -> None:
        with self._lock:
            if not self.users:
                self._before = [enabled() for _, enabled, _ in _kernels()]
                for name, _, enable in _kernels():
                    enable(name == "math")
            self.users += 1
            self.entries += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self.users -= 1
            if not self.users:
                for (_, _, enable), before in zip(_kernels(), self._before, strict=True):
                    enable(before)


def _kernels() -> list[tuple[str, Callable[[], bool], Callable[[bool], None]]]:
    """List the kernels of the process by name, with how to ask for each and how to enable it."""
    return [
        (
            name,
            getattr(torch.backends.cuda, f"{name}_sdp_enabled"),
            getattr(torch.backends.cuda, f"enable_{name}_sdp"),
        )
        for name in ("flash", "mem_efficient", "math", "cudnn")
    ]


_shared = _Shared()


class _Attempt:
    """One attempt at a recording.

    Attributes
    ----------
    math : bool
        Whether it is made under the MATH kernel.
    seen : bool
        Whether a loss has called attention in it.
    excluded : bool
        Whether one did so where it excludes the MATH kernel itself.
    """

    def __init__(self, *, math: bool) -> None:
        self.math, self.seen, self.excluded = math, False, False


_attempt: ContextVar[_Attempt | None] = ContextVar("hypergrad_attention_attempt", default=None)


def under_math() -> bool:
    """Say whether the current recording is made under the MATH kernel."""
    attempt = _attempt.get()
    return attempt is not None and attempt.math


@contextmanager
def math_kernel() -> Iterator[None]:
    """Surround what computes attention that must have a second derivative."""
    with _shared, InnerChoices():
        yield


def recorded(record: Callable[[], T], draw: Draw) -> T:
    """Record a call of a user's functions, again under the MATH kernel where that is needed.

    Both times the functions see the same random numbers.

    Parameters
    ----------
    record : callable
        Makes the recording, from the beginning each time.
    draw : Draw
        The random numbers of the call.

    Returns
    -------
    answer
        What `record` returned.

    Raises
    ------
    UnsupportedOperation
        If the caller has chosen kernels among which MATH is not.
    RuntimeError
        Whatever `record` raises.
    """
    with draw.evaluation():
        if under_math():
            return record()
        attempt = _Attempt(math=False)
        disturbed, entries = _shared.users > 0, _shared.entries
        token = _attempt.set(attempt)
        try:
            answer = record()
            # Under the kernel that another thread needed, a product would not be.
            if not (attempt.seen and (disturbed or _shared.entries > entries)):
                return answer
        except FusedAttention:
            pass
        except (RuntimeError, UnsupportedOperation) as error:
            if _IN_MESSAGES not in str(error):
                raise
        finally:
            _attempt.reset(token)
        return _recorded_under_math(record, draw)


def _recorded_under_math(record: Callable[[], T], draw: Draw) -> T:
    if not torch.backends.cuda.math_sdp_enabled():
        raise UnsupportedOperation(_AROUND)
    attempt = _Attempt(math=True)
    for _ in range(_ATTEMPTS):
        draw.again()
        token = _attempt.set(attempt)
        try:
            with math_kernel():
                return record()
        except FusedAttention:
            if attempt.excluded:
                break
        except (RuntimeError, UnsupportedOperation) as error:
            if not (attempt.excluded and _IN_MESSAGES in str(error)):
                raise
            raise UnsupportedOperation(_INSIDE) from error
        finally:
            _attempt.reset(token)
    raise UnsupportedOperation(_INSIDE if attempt.excluded else _STILL)


def has_fused(nodes: set[Any], *, again: bool) -> bool:
    """Say whether a graph goes through a fused kernel and may: else the recording begins again.

    Parameters
    ----------
    nodes : set
        Those of the graph.
    again : bool
        Whether its derivative will be differentiated too.

    Returns
    -------
    fused : bool
        Whether there is one, of which the first derivative alone is needed.

    Raises
    ------
    FusedAttention
        If its second derivative is needed: `again`, or the graph holds the first already.
    """
    names = {node.name() for node in nodes}
    fused = [name for name in names if name.startswith(_NODE)]
    if not fused:
        return False
    if again or _WITHOUT_DERIVATIVE in names:
        raise FusedAttention
    return True


def called(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Call one of `ATTENTION` for a loss."""
    attempt = _attempt.get()
    if attempt is not None:
        attempt.seen = True
    # The fused kernel of the CPU has no batching rule: PyTorch loops, and warns of it.
    if inside_vmap() and _on_cpu(args, kwargs) and torch.backends.cuda.math_sdp_enabled():
        with _shared:
            return func(*args, **kwargs)
    return func(*args, **kwargs)


def _on_cpu(args: Any, kwargs: dict[str, Any]) -> bool:
    first = args[0] if args else kwargs.get("query")
    return isinstance(first, Tensor) and first.device.type == "cpu"


class InnerChoices(TorchFunctionMode):
    """Sees to the kernel where a loss chooses some of its own and MATH is among them."""

    @classmethod
    def alone(cls) -> bool:
        """Say whether no other mode is around."""
        return all(isinstance(mode, cls) for mode in _get_current_function_mode_stack())

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every other operation on."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # which would follow all of this
            return func(*args, **kwargs)
        if func in ATTENTION and _others_enabled():
            if torch.backends.cuda.math_sdp_enabled():
                with sdpa_kernel(SDPBackend.MATH):
                    return func(*args, **kwargs)
            if (attempt := _attempt.get()) is not None:
                attempt.excluded = True
        return func(*args, **kwargs)


def _others_enabled() -> bool:
    return any(enabled() for name, enabled, _ in _kernels() if name != "math")
