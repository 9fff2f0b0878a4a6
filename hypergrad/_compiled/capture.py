"""A user's functions as one graph of PyTorch's operations, by Dynamo, which guards what they read.

Dynamo follows the functions' Python, so that whatever they read without its being a tensor (a
number, a branch, an attribute) is checked at each call, and each tensor that they reach past their
arguments becomes an input of the graph. What is made of the graph is the caller's.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import CodeType, FunctionType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx
from torch._C._dynamo.eval_frame import set_eval_frame

from .._autograd.torch_pytrees import pytree
from .._autograd.transforms import depth

#: The versions of PyTorch, from and to, that the capture has been tested with.
_TESTED = (2, 10), (2, 15)

#: Settings of Dynamo for the length of a call: nothing that a function reads goes unguarded.
#: The caller's own come back after it.
_STRICT: dict[str, Any] = {
    "guard_nn_modules": True,
    "skip_nnmodule_hook_guards": False,
    "skip_no_tensor_aliasing_guards_on_parameters": False,
    "skip_tensor_guards_with_matching_dict_tags": False,
    "skip_guards_on_constant_func_defaults": False,
    "capture_scalar_outputs": False,
    "capture_dynamic_output_shape_ops": False,
    "suppress_errors": False,
    "error_on_recompile": False,
    "fail_on_recompile_limit_hit": False,
}

#: Of the functions that Dynamo writes a transform as: where the number of its level stands.
_LEVELS = {
    "_add_batch_dim": 2, "_remove_batch_dim": 1, "_wrap_for_grad": 1, "_unwrap_for_grad": 1,
}  # fmt: skip
#: Names of the functions that begin or end a state of PyTorch: a transform, autocast, a grad mode.
_OF_STATE = re.compile(r"_nesting$|^_?(enter|exit|set)_|_hooks_(dis|en)able$|^_sdpa_kernel$")

#: ``(function, stage)``: what is called, and the earlier stage whose value is its first argument;
#: None: the first of all arguments.
Stage = tuple[Callable[..., Any], int | None]


class NotCaptured(Exception):
    """The functions cannot be captured; the text says why."""


class Failed(Exception):
    """Something fails at the values of this call; the text says what."""


class _Unknown(Exception):
    """Dynamo has followed no call with the guards of this one."""


def mark(tensor: Tensor, stage: int, leaf: int) -> Tensor:
    """Mark a tensor that a function has returned; Dynamo does not look inside."""
    return tensor.clone()


def _run(stages: Sequence[Stage], arguments: Sequence[Any]) -> list[Any]:
    """Call the functions one after the other: what Dynamo follows."""
    if not torch.compiler.is_dynamo_compiling():
        raise _Unknown
    values: list[Any] = []
    for number, (function, first) in enumerate(stages):
        given = arguments if first is None else (values[first], *arguments[1:])
        leaves, spec = pytree.tree_flatten(function(*given))
        marked = [
            mark(leaf, number, place) if isinstance(leaf, Tensor) else leaf
            for place, leaf in enumerate(leaves)
        ]
        values.append(pytree.tree_unflatten(marked, spec))
    return values


@dataclasses.dataclass(eq=False)
class Captured:
    """The functions as a graph, for one set of guards.

    Attributes
    ----------
    module : GraphModule
        Dynamo's: PyTorch's functions, and marks.
    codes : sequence of code
        Of all functions that were followed.
    methods : list of tuple
        The methods among them, as ``(class, name, code)``, which Dynamo does not guard.
    stages : tuple of (int or None)
        For each function the earlier one whose value is its first argument.
    places : list of (int or None)
        For each tensor among the arguments the input that stands for it; None: none reads it.
    lifted : list of int
        The other inputs, which the functions have captured.
    returned : list of TreeSpec
        How each function returns what it returns.
    tensors : int
        How many tensors they return.
    depth : int
        How many transforms surrounded it where it was captured.
    kept : dict
        What the caller has made of it, to be used again.
    """

    module: fx.GraphModule
    codes: Sequence[CodeType]
    methods: list[tuple[type, str, CodeType]]
    stages: tuple[int | None, ...] = ()
    places: list[int | None] = dataclasses.field(default_factory=list)
    lifted: list[int] = dataclasses.field(default_factory=list)
    returned: list[pytree.TreeSpec] = dataclasses.field(default_factory=list)
    tensors: int = 0
    depth: int = 0
    kept: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def functions(self, lifted: Callable[[int], Tensor]) -> list[_Stage]:
        """Make functions that compute what the captured ones do, at other tensors.

        Parameters
        ----------
        lifted : callable
            ``lifted(i)``: the tensor for the i-th of the inputs in `lifted`, asked for where a
            function is called.

        Returns
        -------
        functions : list of callable
            In the order of the stages.
        """
        return [_Stage(self, number, lifted) for number in range(len(self.stages))]


class _Stage:
    """One of the captured functions, as its part of the graph."""

    def __init__(
        self,
        captured: Captured,
        number: int,
        lifted: Callable[[int], Tensor],
    ) -> None:
        self._captured, self._number, self._lifted = captured, number, lifted
        graph = captured.module.graph
        marks = {n: (n.args[1], n.args[2]) for n in graph.nodes if n.target is mark}
        self._leaves = {leaf: n for n, (stage, leaf) in marks.items() if stage == number}
        first = captured.stages[number]
        self._first = [] if first is None else [n for n, (s, _) in marks.items() if s == first]
        self._placeholders = [n for n in graph.nodes if n.op == "placeholder"]
        # All that is between the marks of the stage before and its own: also what nothing reads,
        # such as the beginning of a `no_grad`, or a change in place.
        nodes = list(graph.nodes)
        last = {marks[n][0]: place for place, n in enumerate(nodes) if n in marks}
        start, stop = last.get(number - 1, -1) + 1, last.get(number, len(nodes) - 1)
        known, wanted = set(self._first), set(nodes[start : stop + 1])
        self._nodes = []
        for node in reversed(nodes):
            if node in wanted and node not in known and node.op not in ("placeholder", "output"):
                self._nodes.append(node)
                wanted.update(node.all_input_nodes)
        self._nodes.reverse()

    def __call__(self, *arguments: Any) -> Any:
        """Run its part of the graph."""
        captured = self._captured
        values: dict[fx.Node, Any] = {}
        if captured.stages[self._number] is not None:
            first = [t for t in pytree.tree_leaves(arguments[0]) if isinstance(t, Tensor)]
            values.update(zip(self._first, first, strict=True))
            arguments = (None, *arguments[1:])
        given = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
        places = captured.places[len(captured.places) - len(given) :]
        for place, tensor in zip(places, given, strict=True):
            if place is not None:
                values[self._placeholders[place]] = tensor
        for number, place in enumerate(captured.lifted):
            values[self._placeholders[place]] = self._lifted(number)
        further = depth() - captured.depth
        nodes = iter(self._nodes)
        try:
            for node in nodes:
                values[node] = _value(captured.module, node, values, further)
        except BaseException:  # what has been entered is left, as a `with` does it
            for node in nodes:
                if _is_of_state(node) and all(used in values for used in node.all_input_nodes):
                    values[node] = _value(captured.module, node, values, further)
            raise
        spec = captured.returned[self._number]
        leaves = [self._leaves.get(place) for place in range(spec.num_leaves)]
        made = [None if node is None else values[node] for node in leaves]
        return pytree.tree_unflatten(made, spec)


def _value(module: Any, node: fx.Node, values: dict[fx.Node, Any], further: int) -> Any:
    """Compute a node's value, where there are so many more transforms around than there were."""
    known: Any = fx.node.map_arg((node.args, node.kwargs), values.__getitem__)
    (args, kwargs), target = known, cast("Any", node.target)
    if node.op == "get_attr":
        return _attribute(module, target)
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_module":
        return module.get_submodule(target)(*args, **kwargs)
    if target is mark:
        return args[0]
    place = _LEVELS.get(getattr(target, "__name__", ""))
    if place is not None:
        args = (*args[:place], args[place] + further, *args[place + 1 :])
    return target(*args, **kwargs)


def _is_of_state(node: fx.Node) -> bool:
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and _OF_STATE.search(name) is not None


def _attribute(module: Any, path: str) -> Any:
    for name in path.split("."):
        module = getattr(module, name)
    return module


class Seen(NamedTuple):
    """What was seen of a call.

    Attributes
    ----------
    captured : Captured
        The graph whose guards hold.
    tensors : sequence of Tensor
        All that it reads.
    values : list
        What the functions return, with any tensors in the places of theirs.
    """

    captured: Captured
    tensors: Sequence[Tensor]
    values: list[Any]


#: PyTorch's tracers have state of the process: none runs while another thread's does.
TRACING = threading.RLock()


class Capture:
    """Captures calls of functions with the same code, each set of guards once."""

    def __init__(self) -> None:
        self._now = threading.local()

        def backend(module: fx.GraphModule, examples: Any) -> Callable[..., Any]:
            codes = torch._guards.TracingContext.get_traced_code() or []
            followed = torch._dynamo.symbolic_convert.InstructionTranslator.current_tx()
            if followed.output.random_calls:  # before any number is drawn
                raise NotCaptured("random numbers are drawn by Python's random")
            captured = Captured(module, codes, _methods(codes))
            self.graphs.append(captured)
            return lambda *real: self._called(captured, real)

        # Dynamo refuses other backends inside torch.func.vmap, for the compilers that cannot.
        backend.compiler_fn = torch._dynamo.lookup_backend("eager")  # type: ignore[attr-defined]
        torch._dynamo.allow_in_graph(mark)
        own = FunctionType(_run.__code__.replace(), _run.__globals__, _run.__name__)
        self.graphs: list[Captured] = []
        config: Any = torch._dynamo.config
        self._known: Callable[..., list[Any]] = own
        self._followed = torch._dynamo.optimize(backend, nopython=True, dynamic=False)(own)
        known = {name: value for name, value in _STRICT.items() if hasattr(config, name)}
        self._strict: Callable[[], Callable[[], None]] = config._make_closure_patcher(**known)

    def __call__(self, stages: Sequence[Stage], arguments: Sequence[Any]) -> Seen:
        """Check the guards, and follow the functions where there is no graph yet.

        Parameters
        ----------
        stages : sequence of Stage
            The functions.
        arguments : sequence of pytree
            With tensors that nothing else holds.

        Returns
        -------
        seen : Seen
            The graph, and the tensors that it reads in this call.

        Raises
        ------
        NotCaptured
            If the functions cannot be followed.
        Failed
            If one of them raises.
        """
        _refuse_where_unsure()
        leaves = [t for t in pytree.tree_leaves(tuple(arguments)) if isinstance(t, Tensor)]
        before = getattr(self._now, "call", None)
        self._now.call = call = _Call(tuple(first for _, first in stages), leaves)
        # As where the functions are called without this: their own `no_grad` ends in grad mode.
        with TRACING, torch.inference_mode(False), torch.enable_grad():
            try:
                values = self._values(list(stages), tuple(arguments))
            except NotCaptured:
                raise
            except Exception as error:
                inside = getattr(error, "inner_exception", None)
                if isinstance(inside, NotCaptured):
                    raise inside from error
                if str(error).startswith("Observed exception"):
                    raise Failed("one of its functions raises") from error
                raise NotCaptured(_why(error)) from error
            finally:
                self._now.call = before
        if call.captured is None:
            raise NotCaptured("torch.compile is switched off (its stance, or its configuration)")
        for owner, name, code in call.captured.methods:
            if _code_in(owner, name) is not code:
                raise NotCaptured(f"{owner.__name__}.{name} was replaced")
        if not call.captured.returned:
            call.captured.returned = [pytree.tree_structure(value) for value in values]
        return Seen(call.captured, call.tensors, values)

    def _values(self, *call: Any) -> list[Any]:
        """Look for a graph whose guards hold, and follow the functions where there is none."""
        if self.graphs:  # without Dynamo's own preparations, which take longer than the guards
            callback = set_eval_frame(False)
            try:
                return self._known(*call)
            except _Unknown:
                pass
            finally:
                set_eval_frame(callback)
        revert = self._strict()
        try:
            with _quiet():
                values: list[Any] = self._followed(*call)
            return values
        finally:
            revert()

    def _called(self, captured: Captured, real: Sequence[Tensor]) -> Sequence[Tensor]:
        """Note what a graph is called with, in the place of running it."""
        call: _Call = self._now.call
        if not captured.stages:
            _refuse_impure(captured)
            own = {id(t): place for place, t in enumerate(real)}
            captured.places = [own.get(id(t)) for t in call.leaves]
            known = set(captured.places)
            captured.lifted = [place for place in range(len(real)) if place not in known]
            captured.tensors = returned(captured)
            captured.stages, captured.depth = call.stages, depth()
        call.captured, call.tensors = captured, real
        return [torch.zeros(())] * captured.tensors


def returned(captured: Captured) -> int:
    """Count the tensors that the functions return.

    Returns
    -------
    count : int
        How many there are.

    Raises
    ------
    NotCaptured
        If a tensor leaves them in another way.
    """
    output = next(node for node in captured.module.graph.nodes if node.op == "output")
    nodes = list(output.args[0])
    if any(node.target is not mark for node in nodes):
        raise NotCaptured("a tensor leaves the function other than by its return")
    return len(nodes)


def _methods(codes: Sequence[CodeType]) -> list[tuple[type, str, CodeType]]:
    """Find the classes whose methods were followed, where they can be found by name."""
    files = {getattr(module, "__file__", None): module for module in list(sys.modules.values())}
    methods = []
    for code in dict.fromkeys(codes):  # a function that is followed again comes again
        owner: Any = files.get(code.co_filename)
        *path, name = code.co_qualname.split(".")
        for part in path:
            owner = getattr(owner, part, None)
        if path and isinstance(owner, type) and _code_in(owner, name) is code:
            methods.append((owner, name, code))
    return methods


def _code_in(owner: type, name: str) -> CodeType | None:
    held: Any = vars(owner).get(name)
    held = getattr(held, "fget", None) or getattr(held, "__func__", held)
    code: CodeType | None = getattr(held, "__code__", None)
    return code


def _refuse_impure(captured: Captured) -> None:
    """Raise where a graph holds a tensor, or reads variables of the system."""
    module = captured.module
    if any({"environ", "getenv"} & {*code.co_names} for code in captured.codes):
        raise NotCaptured("a variable of the environment is read")
    if not _forwards().isdisjoint(captured.codes):
        raise NotCaptured("a torch.autograd.Function is called, which has a backward of its own")
    if [*module.parameters(), *module.buffers()]:
        raise NotCaptured("a module's tensors cannot be told from the program")


def _forwards() -> set[CodeType]:
    """List the code of each `torch.autograd.Function`, of which Dynamo may keep that alone."""
    codes: set[CodeType] = set()
    new: list[type] = [torch.autograd.Function]
    while new:
        owner = new.pop()
        new += owner.__subclasses__()
        code = getattr(getattr(owner, "forward", None), "__code__", None)
        codes |= set() if code is None else {code}
    return codes


@contextmanager
def _quiet() -> Iterator[None]:
    """Hide what Dynamo logs of functions that it does not follow, which is said by a warning."""
    if "TORCH_LOGS" in os.environ:
        yield
        return
    loggers = [logging.getLogger(f"torch.{name}") for name in ("_dynamo", "_subclasses", "fx")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclasses.dataclass
class _Call:
    """A call on its way through Dynamo."""

    stages: tuple[int | None, ...]
    leaves: list[Tensor]
    captured: Captured | None = None
    tensors: Sequence[Tensor] = ()


def _refuse_where_unsure() -> None:
    """Refuse where Dynamo's checks are off, or have not been tested."""
    lowest, highest = _TESTED
    major, minor = torch.__version__.split(".")[:2]
    if not lowest <= (int(major), int(minor)) <= highest:
        raise NotCaptured(
            f"it has not been tested with PyTorch {torch.__version__}, but with "
            f"{'.'.join(map(str, lowest))} to {'.'.join(map(str, highest))}"
        )
    if torch.nn.modules.module._has_any_global_hook():
        raise NotCaptured("a hook of all modules is registered")
    stance = torch._dynamo.eval_frame._stance
    if stance.skip_guard_eval_unsafe:
        raise NotCaptured("torch.compiler.set_stance has switched off the checks of torch.compile")


def _why(error: BaseException) -> str:
    """Say in a line why Dynamo has given up."""
    if "RecompileLimit" in type(error).__name__ or "recompile_limit" in str(error):
        return (
            "shapes, or what its functions read beside tensors, change again and again, and each "
            "time takes a graph of its own. Pass a number that changes as a tensor"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    detail = [line for line in lines if line.startswith(("Explanation:", "Developer debug"))]
    text = " ".join([*lines[:1], *detail[:1]]) or type(error).__name__
    return text.rstrip(".")
