"""Modules in whose forward pass a derivative would be lost: refused, by name and with the cure."""

from __future__ import annotations

from torch import Tensor, nn

from .._errors import UnsupportedOperation

#: Classes of tensors and parameters that are not split over processes.
WHOLE = frozenset({Tensor, nn.Parameter, type(None)})
#: Modules that reduce gradients in their own backward().
OWN_BACKWARD = frozenset({"DistributedDataParallel", "FSDPModule"})
_CURES = {
    "DistributedDataParallel": (
        "whose gradients hypergrad would see unreduced. Pass the module inside it (.module), and "
        "wrap both losses in hypergrad.all_reduced; or form products from first derivatives, "
        'implicit_grad with Minimum(f, products="difference"), which runs the module as it is.'
    ),
    "FullyShardedDataParallel": (
        "whose parameters lie in pieces on several processes, without a second derivative. Build "
        "the module without FullyShardedDataParallel, and wrap both losses in "
        "hypergrad.all_reduced where each process has its own part of the data."
    ),
    "FSDPModule": (
        "made by fully_shard (FSDP2): its parameters lie in pieces on several processes, without "
        "a second derivative. Form products from first derivatives, implicit_grad with "
        'Minimum(f, products="difference"), which runs the module as it is; or build the module '
        "without fully_shard, and wrap both losses in hypergrad.all_reduced where each process has "
        "its own part of the data."
    ),
    "DTensor": (
        "whose values lie in pieces on several processes (tensor parallel, fully_shard or FSDP2). "
        "implicit_grad and custom_argmin keep params that are DTensors in pieces. Elsewhere use "
        "whole tensors, tensor.full_tensor(), and a module that has not been parallelised; wrap "
        "both losses in hypergrad.all_reduced where each process has its own part of the data."
    ),
}


class RunsOnProcesses(UnsupportedOperation):
    """A loss runs a module that is differentiated by its own backward() alone.

    Attributes
    ----------
    module : nn.Module
        It.
    """

    def __init__(self, message: str, module: nn.Module) -> None:
        super().__init__(message)
        self.module = module


def refuse_distributed_module(module: nn.Module) -> None:
    """Raise for a module that is wrapped for, or split over, several processes.

    Raises
    ------
    RunsOnProcesses
        Naming its class, where it has a backward() of its own.
    UnsupportedOperation
        Naming its class, where it has none.
    """
    kind = kind_of(module)
    if kind:
        message = f"A loss runs {_named(type(module), kind)}, {_CURES[kind]}"
        if kind in OWN_BACKWARD:
            raise RunsOnProcesses(message, module)
        raise UnsupportedOperation(message)


def kind_of(module: nn.Module) -> str:
    """Name the known class of several processes that a module is, or is made from; empty: none."""
    return _distributed(type(module)) or ""


def refuse_distributed_tensor(what: str, tensor: Tensor | None) -> None:
    """Raise for a tensor that is split over several processes.

    Raises
    ------
    UnsupportedOperation
        Naming it.
    """
    kind = _distributed(type(tensor))
    if kind is not None:
        raise UnsupportedOperation(f"{what} is a {kind}, {_CURES[kind]}")


def moves_without_derivative(module: nn.Module) -> bool:
    """Say whether a module is a `spectral_norm`, which in train mode moves its vectors so."""
    if type(module).__name__ == "_SpectralNorm":
        return "_u" in module._buffers
    hooks = module._forward_pre_hooks
    return bool(hooks) and any(type(hook).__name__ == "SpectralNorm" for hook in hooks.values())


def _distributed(kind: type) -> str | None:
    """Name the known class that a class is, or is made from."""
    for base in kind.__mro__:
        if base.__name__ in _CURES and base.__module__.startswith("torch."):
            return base.__name__
    return None


def _named(kind: type, base: str) -> str:
    return f"a {base}" if kind.__name__ == base else f"{kind.__name__}, a {base}"
