"""Folding chains of scalings into one coefficient, which is computed once for all products.

A product with a Hessian is linear in its vector, and what stands between two matrix products is a
chain of elementwise scalings by tensors that do not depend on the vector. Taken together they are
one coefficient, which is the same in each product of a solve. A logistic regression becomes its
closed form, ``X^T (d * (X v))``, by this alone.

The factors are multiplied in another order than the graph has them in. Where they are so large that
their product overflows, a zero in the vector becomes nan (0 * inf), and a number that would have
been in reach becomes inf; a sum of scalings of one tensor may do the same. Whoever replays a graph
makes the call anew where its answer is not finite. Nothing is folded in float16, whose range is
reached by numbers that are met in training, and a nan or inf that the graph has is never lost.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from .clean import Form, drop_dead

aten = torch.ops.aten


#: The dtypes that are folded: their range is wide.
_WIDE = frozenset({torch.float64, torch.float32, torch.bfloat16})


class _Scaled(NamedTuple):
    """A base times a number and tensors that are known before it."""

    base: fx.Node
    number: float
    factors: tuple[fx.Node, ...]


class Folded:
    """A graph whose chains of scalings are folded.

    Parameters
    ----------
    graph : Graph
        It is changed.
    forms : mapping
        What the tensors are like.
    constants : mapping
        Nodes that are constant.
    """

    def __init__(
        self, graph: fx.Graph, forms: dict[fx.Node, Form], constants: Mapping[fx.Node, Any]
    ) -> None:
        self.graph, self._forms, self._constants = graph, forms, constants
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._scaled: dict[fx.Node, _Scaled] = {}
        self._coefficients: dict[Any, fx.Node] = {}
        for node in list(graph.nodes):
            if node.op == "call_function" and node in forms and node not in constants:
                self._fold(node)
        drop_dead(graph)
        for node in list(graph.nodes):
            if node.op == "call_function" and node in forms and node not in constants:
                self._fuse(node)
        drop_dead(graph)

    def _fold(self, node: fx.Node) -> None:
        step = self._step(node)
        if step is None:
            return
        base, number, factors = step
        before = self._scaled.get(base)
        if before is not None and not _is_moderate(number * before.number):
            before = None
        if before is not None and len(base.users) == 1:
            base, number = before.base, number * before.number
            factors = (*before.factors, *factors)
        self._scaled[node] = scaled = _Scaled(base, number, factors)
        written = node.target in _BACKWARD or any(a in self._constants for a in node.args)
        if len(scaled.factors) + (scaled.number != 1) > 1 or before is not None or written:
            self._write(node, scaled)

    def _step(self, node: fx.Node) -> _Scaled | None:
        """Read a node as one scaling of its later argument; None: it is none."""
        target, args = node.target, _args(node)
        form = self._forms[node]
        if not args or form.dtype not in _WIDE or node.kwargs:
            return None
        if not self._like(args[0], form):
            return self._by_tensor(node, form)
        if target is aten.neg.default:
            return _Scaled(args[0], -1.0, ())
        if target in _BACKWARD and self._before(args[1], args[0]):
            return _Scaled(args[0], 1.0, (_BACKWARD[target](self, node, args[1]),))
        if len(args) == 2 and isinstance(args[1], int | float):
            number = float(args[1])
            if target in (aten.mul.Scalar, aten.mul.Tensor) and _is_moderate(number):
                return _Scaled(args[0], number, ())
            if target in (aten.div.Scalar, aten.div.Tensor) and _is_moderate(number):
                return _Scaled(args[0], 1 / number, ())
        return self._by_tensor(node, form)

    def _by_tensor(self, node: fx.Node, form: Form) -> _Scaled | None:
        """Read a product of two tensors as a scaling of the later one."""
        if node.target is not aten.mul.Tensor or form.dtype not in _WIDE:
            return None
        nodes = [a for a in node.args if isinstance(a, fx.Node) and a in self._forms]
        if len(nodes) < 2 or nodes[0] is nodes[1]:
            return None
        for one, other in (nodes, reversed(nodes)):
            number = self._number(one)
            if number is not None and self._like(other, form):
                return _Scaled(other, number, ())
        earlier, later = sorted(nodes, key=self._order.__getitem__)
        if not self._like(later, form) or self._forms[earlier].dtype != form.dtype:
            return None
        return _Scaled(later, 1.0, (earlier,))

    def _number(self, node: fx.Node) -> float | None:
        """Read a constant that is all of one number; None: it is none."""
        constant = self._constants.get(node)
        if constant is None or not constant.numel():
            return None
        number = constant.flatten()[0]
        return float(number) if bool((constant == number).all()) else None

    def _before(self, factor: Any, base: Any) -> bool:
        """Say whether a tensor is there before another, and as large."""
        like = isinstance(factor, fx.Node) and self._like(factor, self._forms[base])
        return like and self._order[factor] < self._order[base]

    def of_sigmoid(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """Write the derivative of a sigmoid of this value."""
        rest = self._made(node, aten.rsub.Scalar, (value, 1))
        return self._made(node, aten.mul.Tensor, (value, rest))

    def of_tanh(self, node: fx.Node, value: fx.Node) -> fx.Node:
        """Write the derivative of a hyperbolic tangent of this value."""
        square = self._made(node, aten.mul.Tensor, (value, value))
        return self._made(node, aten.rsub.Scalar, (square, 1))

    def _like(self, node: Any, form: Form) -> bool:
        return isinstance(node, fx.Node) and node in self._forms and self._forms[node].same_as(form)

    def _write(self, node: fx.Node, scaled: _Scaled) -> None:
        """Write a node as its base times one coefficient."""
        base = scaled.base
        if any(self._order[factor] >= self._order[base] for factor in scaled.factors):
            return
        if not scaled.factors:
            node.target, node.args = aten.mul.Scalar, (base, scaled.number)
            return
        coefficient = self._coefficient(node, scaled)
        node.target, node.args = aten.mul.Tensor, (base, coefficient)

    def _coefficient(self, node: fx.Node, scaled: _Scaled) -> fx.Node:
        """Multiply the factors, before a node; once for all nodes with the same."""
        factors = sorted(scaled.factors, key=self._order.__getitem__)
        product = factors[0]
        for factor in factors[1:]:
            product = self._made(node, aten.mul.Tensor, (product, factor))
        if scaled.number != 1:
            product = self._made(node, aten.mul.Scalar, (product, scaled.number))
        return product

    def _made(self, node: fx.Node, target: Any, args: tuple[Any, ...]) -> fx.Node:
        if (target, args) not in self._coefficients:
            with self.graph.inserting_before(node):
                made = self.graph.call_function(target, args)
            nodes = [a for a in args if isinstance(a, fx.Node)]
            shape = torch.broadcast_shapes(*(self._forms[n].shape for n in nodes))
            self._order[made] = max(self._order[n] for n in nodes)  # it is known from there on
            self._forms[made] = dataclasses.replace(self._forms[nodes[0]], shape=shape)
            self._coefficients[target, args] = made
        return self._coefficients[target, args]

    def _fuse(self, node: fx.Node) -> None:
        """Write a sum with a scaled term as one operation."""
        if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
            return
        first, second = _args(node)
        sign = 1.0 if node.target is aten.add.Tensor else -1.0
        if sign == 1 and self._alone(first) and not self._alone(second):
            first, second = second, first
        if not self._alone(second) or not isinstance(first, fx.Node):
            return
        if sign == 1 and self._alone(first) and self._sum_of_one(node, first, second):
            return
        form, term = self._forms[node], second
        if not (self._like(first, form) and self._like(term, form)):
            return
        base, factor = _args(term)
        if term.target is aten.mul.Scalar:
            node.target, node.args = aten.add.Tensor, (first, base)
            node.kwargs = {"alpha": sign * factor}
        elif all(self._forms[f].dtype == form.dtype for f in (base, factor)):
            node.target, node.args = aten.addcmul.default, (first, base, factor)
            node.kwargs = {} if sign == 1 else {"value": -1}

    def _sum_of_one(self, node: fx.Node, first: fx.Node, second: fx.Node) -> bool:
        """Write a sum of scalings of one tensor as one scaling of it."""
        shared = set(_args(first)) & set(_args(second))
        if (
            first.target is not aten.mul.Tensor
            or second.target is not aten.mul.Tensor
            or not shared
        ):
            return False
        base = max(shared, key=self._order.__getitem__)
        factors = [a if b is base else b for a, b in (_args(first), _args(second))]
        if base in factors or not all(self._order[f] < self._order[base] for f in factors):
            return False
        form = self._forms[node]
        if not self._like(base, form) or any(self._forms[f].dtype != form.dtype for f in factors):
            return False  # masks, say: their sum is no number
        node.target, node.args = (
            aten.mul.Tensor,
            (base, self._made(node, aten.add.Tensor, tuple(factors))),
        )
        return True

    def _alone(self, node: Any) -> bool:
        """Say whether a node scales by one factor, for one use."""
        scales = isinstance(node, fx.Node) and node.target in (aten.mul.Tensor, aten.mul.Scalar)
        return (
            scales
            and len(node.users) == 1
            and node in self._forms
            and (
                self._forms[node].dtype in _WIDE
                and node not in self._constants
                and all(
                    (isinstance(a, fx.Node) and a in self._forms) or node.target is aten.mul.Scalar
                    for a in node.args
                )
            )
        )


def _is_moderate(number: float) -> bool:
    """Say whether a number is so far from the ends of the range that a product stays inside."""
    return 1e-15 < abs(number) < 1e15


def _args(node: fx.Node) -> Any:
    """List the arguments of a node."""
    return node.args


#: Derivatives of functions that scale what comes in by a coefficient of their value.
_BACKWARD: dict[Any, Callable[[Folded, fx.Node, fx.Node], fx.Node]] = {
    aten.sigmoid_backward.default: Folded.of_sigmoid,
    aten.tanh_backward.default: Folded.of_tanh,
}
