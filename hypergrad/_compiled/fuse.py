"""Writing two operations as one, where PyTorch has one for both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from .clean import Form, drop_dead

aten = torch.ops.aten

#: A product of matrices, and the operation that adds it to something.
_ADDED = {
    aten.bmm.default: aten.baddbmm.default,
    aten.mm.default: aten.addmm.default,
    aten.mv.default: aten.addmv.default,
}
#: Operations that broadcast their arguments by themselves.
_BROADCASTING = frozenset({
    aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.addcmul.default,
    aten.where.self, aten.maximum.default, aten.minimum.default, aten.baddbmm.default,
})  # fmt: skip


def fuse(graph: fx.Graph, forms: Mapping[fx.Node, Form], constants: Mapping[fx.Node, Any]) -> None:
    """Write sums with products of matrices as one operation, and leave out needless expansions.

    Parameters
    ----------
    graph : Graph
        It is changed.
    forms : mapping
        What the tensors are like.
    constants : mapping
        Nodes that are constant.
    """
    for node in list(graph.nodes):
        known = node in constants or node not in forms
        if node.target is aten.add.Tensor and not node.kwargs and not known:
            _add_product(node, forms)
    drop_dead(graph)
    for node in list(graph.nodes):
        if node.target is aten.expand.default and node not in constants and node in forms:
            _leave_out(node, forms)
    drop_dead(graph)


def _add_product(node: fx.Node, forms: Mapping[fx.Node, Form]) -> None:
    arguments: Any = node.args
    for product, other in (arguments, reversed(arguments)):
        if not isinstance(product, fx.Node) or product.target not in _ADDED:
            continue
        if not isinstance(other, fx.Node) or other not in forms or len(product.users) > 1:
            continue
        form = forms[node]
        if forms[product] == form and forms[other].dtype == form.dtype and other is not product:
            target = _ADDED[product.target]
            node.target, node.args = target, (other, *product.args)
            return


def _leave_out(node: fx.Node, forms: Mapping[fx.Node, Form]) -> None:
    """Give what an expansion expands to the operations that broadcast it themselves."""
    source: Any = node.args[0]
    for user in list(node.users):
        if user.target not in _BROADCASTING or user not in forms:
            continue
        others = [a for a in user.all_input_nodes if a is not node and a in forms]
        if not others or node in user.kwargs.values():
            continue
        shapes = [forms[other].shape for other in others]
        if user.target is aten.baddbmm.default:
            if user.args[0] is not node or node in user.args[1:]:
                continue
            shapes = [forms[user].shape]
        if torch.broadcast_shapes(*shapes, forms[source].shape) == forms[user].shape:
            user.replace_input_with(node, source)
