"""Folding chains of scalings into one coefficient, which is computed once for all products.

A product with a Hessian is linear in its vector, and what stands between two matrix products is a
chain of elementwise scalings by tensors that do not depend on the vector. Taken together they are
one coefficient, which is the same in each product of a solve. A logistic regression becomes its
closed form, ``X^T (d * (X v))``, by this alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import fx

from .clean import Form, drop_dead

aten = torch.ops.aten


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
        if before is not None and len(base.users) == 1:
            base, number = before.base, number * before.number
            factors = (*before.factors, *factors)
        self._scaled[node] = scaled = _Scaled(base, number, factors)
        if len(scaled.factors) + (scaled.number != 1) > 1 or before is not None:
            self._write(node, scaled)

    def _step(self, node: fx.Node) -> _Scaled | None:
        """Read a node as one scaling of its later argument; None: it is none."""
        target, args = node.target, node.args
        form = self._forms[node]
        if not form.dtype.is_floating_point or node.kwargs:
            return None
        if target in (aten.mul.Scalar, aten.div.Scalar) and self._like(args[0], form):
            number = args[1] if target is aten.mul.Scalar else 1 / args[1] if args[1] else None
            return None if number is None else _Scaled(args[0], float(number), ())
        if target is aten.neg.default and self._like(args[0], form):
            return _Scaled(args[0], -1.0, ())
        if target is not aten.mul.Tensor:
            return None
        pair = sorted((a for a in args if isinstance(a, fx.Node)), key=self._order.__getitem__)
        if len(pair) < 2 or not self._like(pair[1], form) or pair[0] is pair[1]:
            return None
        if self._forms[pair[0]].dtype != form.dtype:
            return None
        return _Scaled(pair[1], 1.0, (pair[0],))

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
            self._order[made] = self._order[node]
            self._forms[made] = dataclasses.replace(self._forms[nodes[0]], shape=shape)
            self._coefficients[target, args] = made
        return self._coefficients[target, args]

    def _fuse(self, node: fx.Node) -> None:
        """Write a sum with a scaled term as one operation."""
        if node.target not in (aten.add.Tensor, aten.sub.Tensor) or node.kwargs:
            return
        first, second = node.args
        sign = 1.0 if node.target is aten.add.Tensor else -1.0
        if sign == 1 and self._alone(first) and not self._alone(second):
            first, second = second, first
        if not self._alone(second) or not isinstance(first, fx.Node):
            return
        form, term = self._forms[node], second
        if not (self._like(first, form) and self._like(term, form)):
            return
        base, factor = term.args
        if term.target is aten.mul.Scalar:
            node.target, node.args = aten.add.Tensor, (first, base)
            node.kwargs = {"alpha": sign * factor}
        elif all(self._forms[f].dtype == form.dtype for f in (base, factor)):
            node.target, node.args = aten.addcmul.default, (first, base, factor)
            node.kwargs = {} if sign == 1 else {"value": -1}

    def _alone(self, node: Any) -> bool:
        """Say whether a node scales by one factor, for one use."""
        scales = isinstance(node, fx.Node) and node.target in (aten.mul.Tensor, aten.mul.Scalar)
        return scales and len(node.users) == 1 and node in self._forms and (
            self._forms[node].dtype.is_floating_point and node not in self._constants
            and all(isinstance(a, fx.Node) and a in self._forms or node.target is aten.mul.Scalar
                    for a in node.args)
        )
