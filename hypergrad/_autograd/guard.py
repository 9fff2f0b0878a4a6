"""Calling a user's function so that nothing of the caller's is changed."""

from __future__ import annotations

from contextvars import Token
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional, init
from torch.overrides import TorchFunctionMode
from torch.utils import checkpoint as checkpoints

from .._errors import UnsupportedOperation
from .attention import ATTENTION, called
from .checkpoints import Recompute, Region
from .double_backward import changed_in_place
from .module_hooks import Watcher, unwatch, watch
from .module_state import ModuleState
from .refused_modules import (
    OWN_BACKWARD,
    WHOLE,
    kind_of,
    moves_without_derivative,
    refuse_distributed_module,
    refuse_distributed_tensor,
)
from .trace import notes, refuse_moving
from .transforms import is_batched, layers, level_of, outside_transforms
from .turns import end_turn, take_turn

_RUNNING = (
    "A loss runs a batch-norm layer in train mode with running statistics, which would be changed "
    "by evaluating it. Call module.eval(), or build the layer with track_running_stats=False "
    "(batch statistics alone), or use GroupNorm."
)
_NORMS = frozenset({functional.batch_norm, functional.instance_norm})
_EMBEDDINGS = frozenset({functional.embedding, functional.embedding_bag, torch.embedding})
# The functions that return memory of their own; the last five, where they convert.
_MAKES_NEW = frozenset({
    torch.clone, torch.zeros, torch.ones, torch.empty, torch.full, torch.tensor, torch.rand,
    torch.randn, torch.zeros_like, torch.ones_like, torch.empty_like, torch.full_like,
    torch.rand_like, torch.randn_like, torch.stack, torch.cat, Tensor.clone, Tensor.new_zeros,
    Tensor.new_ones, Tensor.new_empty, Tensor.new_full, Tensor.new_tensor, Tensor.__deepcopy__,
    Tensor.to, Tensor.double, Tensor.float, Tensor.half, Tensor.bfloat16,
})  # fmt: skip


def _in_place(owner: Any) -> set[Any]:
    named = {name for name in dir(owner) if name.endswith("_") and not name.startswith("_")}
    return {getattr(owner, name) for name in named - {"requires_grad_", "detach_", "share_memory_"}}


_OPERATORS = ("add", "and", "mod", "mul", "or", "pow", "sub", "truediv", "floordiv", "xor")
_IN_PLACE = frozenset({
    *_in_place(Tensor),
    *_in_place(torch),
    *_in_place(init),
    *(getattr(Tensor, f"__i{name}__") for name in _OPERATORS if hasattr(Tensor, f"__i{name}__")),
    Tensor.__setitem__,
})
_WATCHED = _IN_PLACE | _NORMS | _EMBEDDINGS | _MAKES_NEW | {torch.autograd.grad}


class Guard(TorchFunctionMode):
    """One evaluation of a user's function, in which nothing of the caller's may change.

    Modules that run work on copies of their state, which is put back at the end. Calls that would
    change a caller's tensor otherwise, or have no derivative, are refused before they do: norm
    layers that would update running statistics, embeddings that would renormalise their weight,
    parameters that are overwritten, modules that are split over processes. One thread at a time
    is inside.

    It may be entered once more when it has been left, for another evaluation: what it knows of
    modules without state then serves again.
    """

    def __init__(self) -> None:
        super().__init__()
        self._kinds: set[type] = set()
        self._level = level_of()
        self._known: ModuleState | None = None

    def __enter__(self) -> Guard:
        """Begin the evaluation."""
        self._turn = take_turn()
        self._new: set[int] = set()
        self._counters: list[Tensor] = []
        self._regions: list[Region] = []
        self._state = ModuleState(self._is_new) if self._known is None else self._known
        self._token: Token[Watcher | None] = watch(self)
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Put back what modules held."""
        try:
            super().__exit__(*error)
        finally:
            unwatch(self._token)
            self._state.put_back()
            again = self._state.is_stateless and not self._regions
            self._known = self._state if again else None
            if self._turn:
                end_turn()

    @property
    def noticed(self) -> bool:
        """Whether a module has run, or a checkpoint's region begun."""
        return bool(self._regions) or len(self._state) > 0

    def enter(self, module: nn.Module) -> None:
        """Note that a module is about to run."""
        with torch._C.DisableTorchFunction():  # these questions are not the function's doing
            in_place = notes().in_place
            if in_place is not None and kind_of(module) in OWN_BACKWARD:
                in_place.entering(module)
            elif type(module) not in self._kinds:
                refuse_distributed_module(module)
                self._kinds.add(type(module))
            for name, parameter in module._parameters.items():
                if type(parameter) not in WHOLE and not (notes().placed or notes().in_place):
                    refuse_distributed_tensor(f"{type(module).__name__}.{name}", parameter)
            hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
            if hooks is not None and hooks[0].__module__ != checkpoints.__name__:
                notes().around = Guard  # this part may run in products again
            known = len(self._state)
            self._state.enter(module)
            if self._regions and len(self._state) > known:
                for region in self._regions:
                    region.add(self._state.slots(known))
            if module.training and moves_without_derivative(module):
                notes().moving.append(self._state.path(module))
                if level_of() > self._level:
                    refuse_moving()  # inside a torch.func transform of the function's own

    def leave(self, module: nn.Module) -> None:
        """Note that a module has run, or failed."""
        self._state.leave(module)

    def keeps(self) -> bool:
        """Say whether a region under a checkpoint is to keep what it computes, here."""
        return level_of() > 0  # in a function transform, where PyTorch cannot compute it again

    def begin(self, again: Recompute) -> Recompute:
        """Note that a checkpoint's region begins; wrap the function that computes it again."""
        if self.keeps() or not torch.is_grad_enabled():
            return again  # which will never be called
        region = Region(self._state.slots())
        self._regions.append(region)

        def compute(*args: Any) -> None:
            turn = take_turn()
            try:
                with outside_transforms(), region.held(), Guard():
                    again(*args)
            finally:
                if turn:
                    end_turn()

        return compute

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Pass every other operation on, with as little in between as may be."""
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():  # which would follow all of this
            return self._compiled(func, args, kwargs)
        if func in ATTENTION:
            return called(func, args, kwargs)
        if func not in _WATCHED and "out" not in kwargs:
            return func(*args, **kwargs)
        with torch._C.DisableTorchFunction():
            args, kwargs = self._allowed(func, args, kwargs)
        try:
            result = func(*args, **kwargs)
        except RuntimeError as error:
            if args and self._state.is_copy(args[0]):
                _refuse_in_transform(args[0], error)
            raise
        if func in _MAKES_NEW and isinstance(result, Tensor):
            with torch._C.DisableTorchFunction():
                memory = _memory(result)
                if memory is not None and not (args and _memory(args[0]) == memory):
                    self._new.add(memory)
        return result

    def _compiled(self, func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        """Call an operation of a compiled function, in which modules are not noticed."""
        if func in _NORMS and _updated(func, args, kwargs):
            raise self._running()
        if func in (functional.embedding, torch.embedding):
            args, kwargs = _densely(func, args, kwargs)
        result = func(*args, **kwargs)
        if func is Tensor.add_ and args[0].ndim == 0 and args[0].dtype == torch.int64:
            self._counters.append(args[0])  # of batches, which the layer moves first
        return result

    def _allowed(self, func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """Choose the arguments to call a function with, unless it is refused."""
        if func in _NORMS:
            self._refuse_updates(func, args, kwargs)
        elif func in _EMBEDDINGS:
            if func is not torch.embedding:
                args, kwargs = _without_renormalising(func, args, kwargs)
            if func is not functional.embedding_bag:
                args, kwargs = _densely(func, args, kwargs)
        elif func is torch.autograd.grad:
            if kwargs.get("create_graph"):
                refuse_moving()
        elif func not in _MAKES_NEW:
            self._refuse_change(kwargs.get("out", args[0] if args else None))
        return args, kwargs

    def _is_new(self, tensor: Tensor) -> bool:
        return bool(self._new) and _memory(tensor) in self._new

    def _refuse_updates(self, func: Any, args: Any, kwargs: dict[str, Any]) -> None:
        """Raise for a norm layer that would update running statistics of the caller's."""
        for statistic in _updated(func, args, kwargs):
            if self._state.is_copy(statistic) or not self._is_new(statistic):
                raise self._running()

    def _running(self) -> UnsupportedOperation:
        for counter in self._counters:
            counter.sub_(1)
        return UnsupportedOperation(_RUNNING)

    def _refuse_change(self, target: Any) -> None:
        """Raise before an argument, or a parameter of a module, is overwritten."""
        if not isinstance(target, Tensor) or (target.requires_grad and torch.is_grad_enabled()):
            return  # autograd itself refuses the latter, or knows it for a result of its own
        memory = _memory(target)
        if memory is None or memory in self._new or self._state.is_copy(target):
            return
        for tree in notes().callers:
            for position, variable in enumerate(tree.variables):
                if _memory(variable) == memory:
                    raise changed_in_place(
                        "A loss", tree.variable_path(position), leaf=tree.variable_path(position)
                    )
        for module in self._state.modules:
            for name, parameter in module._parameters.items():
                if parameter is not None and _memory(parameter) == memory:
                    raise UnsupportedOperation(
                        f"A loss changes {self._state.path(module)}.{name}, a parameter, in place. "
                        "Its derivative would not know of it, and the caller's own would change. "
                        "Compute the new value as a tensor of its own."
                    )


def _updated(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    """List the running statistics that a norm layer would update."""
    training = "training" if func is functional.batch_norm else "use_input_stats"
    default = func is not functional.batch_norm
    names = ("input", "running_mean", "running_var", "weight", "bias", training)
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not given.get(training, default):
        return []
    statistics = (given.get("running_mean"), given.get("running_var"))
    return [statistic for statistic in statistics if statistic is not None]


def _refuse_in_transform(buffer: Tensor, error: RuntimeError) -> None:
    """Raise where PyTorch cannot change a buffer in place inside a function transform."""
    if "mutate a captured Tensor" not in str(error) and "vmap: inplace" not in str(error):
        return
    if buffer.ndim == 0 and buffer.dtype == torch.int64:  # batch norm's counter
        raise UnsupportedOperation(_RUNNING) from error
    raise UnsupportedOperation(
        "A loss runs a module that changes a buffer in place, inside a function transform "
        "(torch.func.grad, vmap, ...), where PyTorch cannot. Call module.eval(), assign a new "
        f"tensor to the buffer, or pass copies of the buffers to functional_call. ({error})"
    ) from error


def _densely(func: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Turn off an embedding's sparse gradient, from which no product is formed."""
    names: tuple[str, ...] = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    if func is functional.embedding:
        names = ("input", "weight", "padding_idx", "max_norm", "norm_type", *names[3:])
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    if not given.get("sparse"):
        return args, kwargs
    return (), {**given, "sparse": False}


def _without_renormalising(
    func: Any, args: Any, kwargs: dict[str, Any]
) -> tuple[Any, dict[str, Any]]:
    """Drop an embedding's max_norm from its arguments; raise where it would change rows."""
    names: tuple[str, ...] = ("input", "weight", "padding_idx", "max_norm", "norm_type")
    if func is functional.embedding_bag:
        names = ("input", "weight", "offsets", "max_norm", "norm_type")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    largest = given.get("max_norm")
    if largest is None:
        return args, kwargs
    rows, weight = given["input"], given["weight"]
    known = not (is_batched(rows) or is_batched(weight))
    if known:
        with torch.no_grad():
            rows, weight = layers(rows)[-1].reshape(-1), layers(weight)[-1].detach()
            norms = torch.linalg.vector_norm(weight[rows], given.get("norm_type", 2.0), dim=-1)
            if not bool((norms > largest).any()):  # or else the weight's version would change
                more = {k: v for k, v in kwargs.items() if k != "max_norm"}
                return (*args[:3], *((None, *args[4:]) if len(args) > 3 else ())), more
    raise UnsupportedOperation(
        f"A loss runs an embedding with max_norm={largest:g}, which would renormalise rows of its "
        "weight in place, without a derivative. Build it without max_norm, and scale the rows "
        "yourself: before the call, or in the loss by differentiable operations."
    )


def _memory(tensor: Any) -> int | None:
    """Look up the address of a tensor's memory; None where it has none of its own."""
    if not isinstance(tensor, Tensor):
        return None
    try:
        return layers(tensor)[-1].untyped_storage().data_ptr() or None
    except (NotImplementedError, RuntimeError):  # sparse, nested, of a subclass
        return None
