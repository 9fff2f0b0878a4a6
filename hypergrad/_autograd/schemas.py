"""The arguments of PyTorch's own functions, which Python's `inspect` does not know."""

from __future__ import annotations

from typing import Any

import torch


def positional_names(operation: Any) -> list[list[str]]:
    """List the names of the positional arguments of an operation, for each of its overloads.

    Parameters
    ----------
    operation : Any
        A function such as `torch.relu`, or a method such as `torch.Tensor.relu`.

    Returns
    -------
    overloads : list of list of str
        Without those that write to `out`; empty for what is no operation of PyTorch's.
    """
    home = getattr(operation, "__module__", None) or getattr(operation, "__objclass__", None)
    name = getattr(operation, "__name__", "")
    if not (str(home).startswith("torch") or home is torch._C.TensorBase) or not name:
        return []
    packet = getattr(torch.ops.aten, name, None)
    if packet is None:
        return []
    schemas = [getattr(packet, overload)._schema.arguments for overload in packet.overloads()]
    return [
        [argument.name for argument in arguments if not argument.kwarg_only]
        for arguments in schemas
        if not any(argument.is_out for argument in arguments)
    ]
