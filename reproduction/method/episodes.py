"""What a task is: a support set to adapt to and queries to be judged by."""

from typing import NamedTuple, TypeAlias

from torch import Tensor

Params: TypeAlias = dict[str, Tensor]


class Episodes(NamedTuple):
    """One task, or a batch of tasks along the first dimension of each tensor."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
