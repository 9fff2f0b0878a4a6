"""A graph as Python code, with as little around each operation as may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

# The operations whose function in the namespace of torch takes the same arguments: half the time.
_NAMES = frozenset({
    "abs", "add", "addcmul", "addmm", "addmv", "all", "amax", "amin", "any", "baddbmm",
    "bitwise_and", "bitwise_not", "bitwise_or", "bmm", "cat", "cos", "diag_embed", "div", "dot",
    "eq", "exp", "ge", "gt", "isfinite", "le", "log", "lt", "maximum", "minimum", "mm", "mul",
    "mv", "nan_to_num", "ne", "neg", "outer", "permute", "reciprocal", "relu", "rsqrt", "select",
    "sigmoid", "sign", "sin", "sqrt", "squeeze", "stack", "sub", "sum", "t", "tanh", "transpose",
    "unsqueeze", "where",
})  # fmt: skip


def runner(graph: fx.Graph, constants: Mapping[fx.Node, Tensor]) -> Callable[..., list[Tensor]]:
    """Compile a graph to a Python function of its inputs.

    Parameters
    ----------
    graph : Graph
        Of ATen operations.
    constants : mapping
        The tensors that stand for nodes.

    Returns
    -------
    run : callable
        ``run(*inputs) -> outputs``.
    """
    names: dict[fx.Node, str] = {}
    globe: dict[str, Any] = {}
    known: dict[Any, str] = {}
    last = _last_uses(graph)
    lines, inputs = [], []

    def held(value: Any) -> str:
        """Name a value that the code reads."""
        key = value if isinstance(value, Callable) else id(value)  # type: ignore[arg-type]
        if key not in known:
            known[key] = f"c{len(known)}"
            globe[known[key]] = value
        return known[key]

    def text(value: Any) -> str:
        if isinstance(value, fx.Node):
            return names[value]
        if isinstance(value, list | tuple):
            inside = ", ".join(map(text, value))
            return f"[{inside}]" if isinstance(value, list) else f"({inside},)"
        if value is None or isinstance(value, bool | int | str):
            return repr(value)
        return held(value)

    for node in graph.nodes:
        name = names[node] = f"v{len(names)}"
        if node.op == "placeholder":
            inputs.append(name)
            continue
        if node.op == "output":
            lines.append(f"return {text(list(node.args[0]))}")
            break
        if node in constants:
            names[node] = held(constants[node])
            continue
        if getattr(node.target, "__name__", "") == "getitem":
            lines.append(f"{name} = {text(node.args[0])}[{text(node.args[1])}]")
        else:
            given = [*map(text, node.args), *(f"{k}={text(v)}" for k, v in node.kwargs.items())]
            lines.append(_call(name, node, held, given, text))
        done = [names[n] for n in last.get(node, ()) if n not in constants]
        if done:
            lines.append(f"del {', '.join(done)}")
    body = "\n    ".join(lines)
    exec(f"def run({', '.join(inputs)}):\n    {body}\n", globe)
    run: Callable[..., list[Tensor]] = globe["run"]
    return run


def _call(name: str, node: fx.Node, held: Callable[[Any], str], given: list[str], text: Any) -> str:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return f"{name} = {held(target)}({', '.join(given)})"
    base = target._schema.name.removeprefix("aten::")
    if base in ("view", "_unsafe_view", "reshape"):
        method = "view" if node.meta.get("view") else "reshape"
        return f"{name} = {given[0]}.{method}({given[1]})"
    if base == "expand" and not node.kwargs:
        return f"{name} = {given[0]}.expand({given[1]})"
    function = getattr(torch, base) if base in _NAMES else target._op
    return f"{name} = {held(function)}({', '.join(given)})"


def _last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """List for each node the ones that nobody needs after it."""
    seen: set[fx.Node] = set()
    last: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for used in node.all_input_nodes:
            if used not in seen:
                seen.add(used)
                if used.op != "placeholder":
                    last.setdefault(node, []).append(used)
    return last
