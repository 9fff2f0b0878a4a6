"""Taking out of a graph what computes nothing: copies of views, repetitions, and constants."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, fx

aten = torch.ops.aten

#: Constants up to this size are computed once, when the graph is made.
_CONSTANT = 1 << 16
#: All constants of a graph, but those of one number, together have as many entries at most.
_CONSTANTS = 1 << 22
#: Operations that return their first argument, or another view of all of it.
_SAME = frozenset({
    aten.detach.default, aten.alias.default, aten.lift_fresh.default, aten.lift_fresh_copy.default,
    aten.clone.default, aten.lift.default,
})  # fmt: skip
#: Operations that depend on the form of their first argument alone.
_OF_FORM = frozenset({
    aten.zeros_like.default, aten.ones_like.default, aten.full_like.default,
    aten.new_zeros.default, aten.new_ones.default, aten.new_full.default,
})  # fmt: skip
_VIEWS = frozenset({aten.view.default, aten._unsafe_view.default, aten.reshape.default})


@dataclasses.dataclass(frozen=True)
class Form:
    """What a node's tensor is like: seen by running the graph once."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        """Describe a tensor."""
        return cls(tensor.shape, tensor.dtype, tensor.device)

    def same_as(self, other: Form) -> bool:
        """Say whether two tensors agree in all but their values and their order in memory."""
        # A view of them is then taken by `reshape`, which asks for no order.
        return self == other


class Cleaned:
    """A graph without what computes nothing, and the constants that it reads.

    Parameters
    ----------
    graph : Graph
        Of ATen operations, without mutations.
    examples : sequence of Tensor
        Inputs, from which the forms of all tensors are found.
    constants : dict
        The tensors that stand for nodes already.

    Attributes
    ----------
    graph : Graph
        The clean graph.
    constants : dict
        The tensors that stand for nodes.
    """

    def __init__(
        self, graph: fx.Graph, examples: Sequence[Tensor], constants: dict[fx.Node, Tensor]
    ) -> None:
        self.graph, self.constants = graph, constants
        self.forms: dict[fx.Node, Form] = {}
        self._orders: dict[fx.Node, list[tuple[int, ...] | None]] = {}
        self._held = 0
        drop_dead(graph)  # such as what PyTorch does on the meta device, for shapes
        self._run(examples)
        self._simplify()
        self._share()
        self._drop_dead()

    def _run(self, examples: Sequence[Tensor]) -> None:
        """Run the graph once, for the forms, the orders in memory and the constants."""

        def before(node: fx.Node, values: dict[fx.Node, Any]) -> None:
            if not _of_any_order(node):
                self._orders[node] = [_order(values[used]) for used in _inputs(node)]

        for node, value in self._values(examples, before):
            if node.op == "call_function" and node not in self.constants:
                self._note_constant(node, value)
            if isinstance(value, Tensor):
                self.forms[node] = Form.of(value)

    def _values(
        self,
        examples: Sequence[Tensor],
        before: Callable[[fx.Node, dict[fx.Node, Any]], None],
    ) -> Iterator[tuple[fx.Node, Any]]:
        """Run the graph, node by node; ``before(node, values)`` sees what a node is given."""
        values: dict[fx.Node, Any] = {}
        inputs = iter(examples)
        uses = {node: len(node.users) for node in self.graph.nodes}
        for node in list(self.graph.nodes):
            if node.op == "output":
                return
            if node.op == "placeholder":
                value: Any = next(inputs)
            elif node in self.constants:
                value = self.constants[node]
            else:
                before(node, values)
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
                value = _call(node, args, kwargs)
            values[node] = value
            yield node, value
            for used in node.all_input_nodes:
                if used in uses:
                    uses[used] -= 1
                    if not uses[used]:
                        values.pop(used, None)

    def _note_constant(self, node: fx.Node, value: Any) -> None:
        operation = isinstance(node.target, torch._ops.OpOverload)
        if not operation or not isinstance(value, Tensor) or value.numel() > _CONSTANT:
            return
        known = all(used in self.constants for used in node.all_input_nodes)
        one = node.target is aten.pow.Tensor_Scalar and node.args[1] == 0
        if known or one or node.target in _OF_FORM:
            held = 0 if node.target in _OF_FORM else value.numel()
            if self._held + held <= _CONSTANTS:
                self._held += held
                self.constants[node] = value

    def _simplify(self) -> None:
        """Replace each node that returns one of its inputs."""
        for node in list(self.graph.nodes):
            if node.op != "call_function" or node in self.constants:
                continue
            other = self._other(node)
            if other is not None and other is not node:
                node.replace_all_uses_with(other)

    def _other(self, node: fx.Node) -> fx.Node | None:
        """Find the node that has the same value; None: there is none."""
        target, args = node.target, cast("Any", node.args)
        if not args or not isinstance(args[0], fx.Node) or node not in self.forms:
            return None
        first = args[0]
        if first not in self.forms:
            return None
        like = self.forms[node].same_as(self.forms[first])
        if target in _SAME:
            return first
        if target in _VIEWS:
            return self._viewed(node, first, like)
        if target in (aten.expand.default, aten.permute.default, aten._to_copy.default):
            if target is aten.permute.default and not _in_place(args[1]):
                return None
            return first if like else None
        if target is aten.transpose.int and first.target is aten.transpose.int:
            again = {first.args[1], first.args[2]} == {args[1], args[2]}
            return _first(first) if again else None
        if target is aten.t.default and first.target is aten.t.default:
            return _first(first)
        if target is aten.where.self:
            return self._chosen(node)
        if target is aten.bitwise_or.Tensor and like and self._is(args[1], 0):
            return first
        if target is aten.bitwise_and.Tensor and like and self._is_true(args[1]):
            return first
        if not like:
            return self._second(node)
        if target in (aten.mul.Tensor, aten.div.Tensor) and self._is(args[1], 1):
            return first
        if target in (aten.add.Tensor, aten.sub.Tensor) and self._is(args[1], 0):
            return first
        if target in (aten.mul.Scalar, aten.pow.Tensor_Scalar, aten.div.Scalar) and args[1] == 1:
            return first
        return self._second(node)

    def _second(self, node: fx.Node) -> fx.Node | None:
        """Find out whether a node returns its second argument."""
        args: Any = node.args
        if len(args) < 2 or not isinstance(args[1], fx.Node) or args[1] not in self.forms:
            return None
        if not self.forms[node].same_as(self.forms[args[1]]):
            return None
        if node.target is aten.mul.Tensor and self._is(args[0], 1):
            return args[1]
        if node.target is aten.bitwise_or.Tensor and self._is(args[0], 0):
            return args[1]
        if node.target is aten.bitwise_and.Tensor and self._is_true(args[0]):
            return args[1]
        if node.target is aten.add.Tensor and self._is(args[0], 0) and not node.kwargs:
            return args[1]
        return None

    def _chosen(self, node: fx.Node) -> fx.Node | None:
        """Find what a choice chooses, where that is known."""
        args: Any = node.args
        for place, value in ((1, 1), (2, 0)):
            other = args[place]
            if isinstance(other, fx.Node) and other in self.forms and self._is(args[0], value):
                return other if self.forms[other].same_as(self.forms[node]) else None
        return None

    def _viewed(self, node: fx.Node, first: fx.Node, like: bool) -> fx.Node | None:
        if like:
            return first
        if first.target in _VIEWS and isinstance(first.args[0], fx.Node):
            below = first.args[0]
            if self.forms[node].same_as(self.forms[below]):
                return below
            node.update_arg(0, below)
        return None

    def _is(self, value: Any, number: float) -> bool:
        """Say whether an argument is a constant tensor, all of one number."""
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value == number
        constant = self.constants.get(value) if isinstance(value, fx.Node) else None
        return constant is not None and bool((constant == number).all())

    def _is_true(self, node: Any) -> bool:
        """Say whether an argument is true all over: a one among integers is not."""
        return self._is(node, 1) and self.forms[node].dtype == torch.bool

    def _share(self) -> None:
        """Compute what is computed several times once."""
        known: dict[Any, fx.Node] = {}
        for node in list(self.graph.nodes):
            if node.op != "call_function":
                continue
            if node in self.constants:
                key: Any = _of_constant(self.constants[node])
            else:
                orders = tuple(self._orders.get(node, ()))
                key = node.target, _key(node.args), _key(node.kwargs), orders
            if key is None:
                continue
            try:
                earlier = known.setdefault(key, node)
            except TypeError:  # an argument without a hash
                continue
            if earlier is not node:
                node.replace_all_uses_with(earlier)

    def settle(self, examples: Sequence[Tensor]) -> None:
        """Put arguments back into their order in memory, where an operation may go by it.

        And mark the changes of shape that need no copy, which `view` makes in half the time.

        Parameters
        ----------
        examples : sequence of Tensor
            Inputs of the graph, which has been changed since it was cleaned.
        """

        def before(node: fx.Node, values: dict[fx.Node, Any]) -> None:
            self._restore(node, values)
            first = _first(node) if node.target in _VIEWS else None
            if first is not None:
                node.meta["view"] = _is_viewed(values[first], cast("Any", node.args[1]))

        for _ in self._values(examples, before):
            pass

    def _restore(self, node: fx.Node, values: dict[fx.Node, Any]) -> None:
        """Copy the arguments of a node that lie in another order than they were traced in."""
        orders = self._orders.get(node)
        if orders is None:
            return
        then = iter(orders)

        def placed(used: fx.Node) -> fx.Node:
            order = next(then)
            if order is None or _same_order(values[used], order):
                return used
            with self.graph.inserting_before(node):
                made = self.graph.call_function(_ordered, (used, order))
            self.forms[made], values[made] = self.forms[used], _ordered(values[used], order)
            return made

        node.args, node.kwargs = fx.node.map_arg((node.args, node.kwargs), placed)

    def _drop_dead(self) -> None:
        """Erase what nothing needs, and what only a constant was made from."""
        for node in self.constants:
            if node.op == "call_function":
                node.args, node.kwargs = (), {}
        drop_dead(self.graph)


#: Operations whose result is the same in whatever order their arguments lie in memory.
_ANY_ORDER = frozenset({
    "_log_softmax", "_log_softmax_backward_data", "_softmax", "_softmax_backward_data", "_to_copy",
    "_unsafe_view", "abs", "add", "addcdiv", "addcmul", "addmm", "addmv", "alias", "all", "amax",
    "amin", "any", "argmax", "argmin", "baddbmm", "binary_cross_entropy_with_logits", "bitwise_and",
    "bitwise_not", "bitwise_or", "bitwise_xor", "bmm", "cat", "ceil", "clamp", "clamp_max",
    "clamp_min", "clone", "constant_pad_nd", "convolution", "convolution_backward", "copy", "cos",
    "cosh", "cummax", "cumsum", "detach", "diag_embed", "diagonal", "div", "dot", "elu",
    "elu_backward", "embedding", "eq", "erf", "exp", "expand", "expm1", "flip", "floor", "full",
    "full_like", "gather", "ge", "gelu", "gelu_backward", "gt", "index", "index_put", "isfinite",
    "isinf", "isnan", "le", "lerp", "lift_fresh_copy", "linalg_vector_norm", "log", "log1p",
    "logical_and", "logical_not", "logical_or", "logsumexp", "lt", "maximum", "mean", "median",
    "minimum", "mm", "mse_loss", "mse_loss_backward", "mul", "mv", "nan_to_num", "ne", "neg",
    "new_full", "new_ones", "new_zeros", "ones_like", "outer", "permute", "pow", "prod",
    "reciprocal", "relu", "repeat", "round", "rsqrt", "rsub", "scatter", "scatter_add", "select",
    "select_backward", "select_scatter", "sigmoid", "sigmoid_backward", "sign", "silu",
    "silu_backward", "sin", "sinh", "slice", "slice_backward", "slice_scatter", "softplus",
    "softplus_backward", "split", "split_with_sizes", "sqrt", "squeeze", "stack", "sub", "sum", "t",
    "tanh", "tanh_backward", "threshold_backward", "transpose", "unbind", "unsqueeze", "var",
    "view", "where", "zeros_like",
})  # fmt: skip


def _of_any_order(node: fx.Node) -> bool:
    """Say whether the order in memory of a node's arguments does not matter."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return True
    name = target._schema.name
    return name.startswith("aten::") and name[6:] in _ANY_ORDER and target._overloadname != "dtype"


def _in_place(dims: Sequence[int]) -> bool:
    """Say whether a permutation leaves every dimension in its place."""
    return [dim % len(dims) for dim in dims] == list(range(len(dims)))


def _inputs(node: fx.Node) -> list[fx.Node]:
    """List the nodes among the arguments, each as often as it stands there."""
    inputs: list[fx.Node] = []

    def listed(used: fx.Node) -> fx.Node:
        inputs.append(used)
        return used

    fx.node.map_arg((node.args, node.kwargs), listed)
    return inputs


def _order(value: Any) -> tuple[int, ...] | None:
    """Describe the order of a tensor in memory."""
    return tuple(value.stride()) if isinstance(value, Tensor) else None


def _same_order(tensor: Tensor, strides: Sequence[int]) -> bool:
    """Say whether a tensor lies in this order; a dimension of one entry has none."""
    triples = zip(tensor.shape, tensor.stride(), strides, strict=True)
    return all(size == 1 or here == there for size, here, there in triples)


def _call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """Call a node's operation, a view as the code of a graph takes it."""
    if node.target in _VIEWS:
        return args[0].reshape(args[1])
    target: Any = node.target
    return target(*args, **kwargs)


def _is_viewed(tensor: Tensor, shape: Sequence[int]) -> bool:
    try:
        tensor.view(shape)
    except RuntimeError:
        return False
    return True


def _ordered(tensor: Tensor, strides: Sequence[int]) -> Tensor:
    """Copy a tensor into an order of memory."""
    shape = tensor.shape
    copy = torch.empty_strided(shape, strides, dtype=tensor.dtype, device=tensor.device)
    return copy.copy_(tensor)


def _first(node: fx.Node) -> fx.Node | None:
    argument = node.args[0]
    return argument if isinstance(argument, fx.Node) else None


def drop_dead(graph: fx.Graph) -> None:
    """Erase what nothing needs."""
    for node in reversed(list(graph.nodes)):
        if node.op not in ("output", "placeholder") and not node.users and not is_check(node):
            graph.erase_node(node)


def is_check(node: fx.Node) -> bool:
    """Say whether an operation returns nothing, but may raise: what a user asserts, say."""
    return isinstance(node.target, torch._ops.OpOverload) and not node.target._schema.returns


def _of_constant(tensor: Tensor) -> Any:
    """Make a key of a constant that is all of one number."""
    if tensor.numel() == 0 or tensor.is_complex():
        return None
    number = tensor.flatten()[0]
    if not bool(((tensor == number) & (tensor.signbit() == number.signbit())).all()):
        return None
    form = tensor.dtype, tensor.shape, tensor.stride(), tensor.device
    return "constant", repr(number.item()), *form


def _key(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return tuple(map(_key, value))
    if isinstance(value, dict):
        return tuple((k, _key(v)) for k, v in sorted(value.items()))
    if isinstance(value, bool | int | float):  # 1, 1.0 and True are not the same argument
        return type(value), repr(value)
    return value
