"""What makes a host wait for a GPU, forbidden."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_READS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.cpu, Tensor.numpy, Tensor.nonzero}
_MAKES = {torch.tensor, torch.as_tensor, Tensor.new_tensor}


class _NotAsked(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert func not in _READS, f"{func} waits for the device"
        found = func(*args, **(kwargs or {}))
        copied = func in _MAKES and not isinstance(args[0], Tensor) and found.device.type != "cpu"
        assert not copied, f"{func} copies {args} from the host, which waits for the device"
        return found


def host_is_not_asked():
    """Fail where a value is read, or numbers of the host are copied to a device.

    On the meta device the first fails by itself; this sees it on the CPU too.
    """
    return _NotAsked()
