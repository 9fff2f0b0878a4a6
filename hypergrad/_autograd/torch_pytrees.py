"""PyTorch's pytrees, whose module is private: imported here alone."""

from torch.utils import _pytree as pytree

__all__ = ["pytree"]
