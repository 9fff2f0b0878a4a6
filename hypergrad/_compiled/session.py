"""What lives from one call of a compiled function to the next: graphs, programs, why none was made.

A program is one graph that does a whole call of the library, from the captured functions to the
evidence. Where the host has looked at a value while it was traced, the program returns that flag;
a replay holds where all flags are as they were, and another program is traced where they are not.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._autograd.transforms import is_batched
from .._autograd.vmaps import Vmaps, outside
from .._errors import CompileMismatch, NotCompiled
from .._warnings import warn_of_compiling
from ..solvers._recycle import Memory
from .capture import Capture, Captured, NotCaptured, Stage, mark
from .clean import Cleaned, mark_views
from .fold import Folded
from .fuse import fuse
from .part import Changed, cut_out_parts
from .run import runner
from .trace import traced

Backend = Literal["aten", "inductor", "cudagraphs"]
OnFallback = Literal["warn", "raise", "ignore"]

#: So many sets of branches of one call are kept; where it takes more it is not compiled.
_BRANCHES = 4
#: So many shapes and choices of one call are kept; where it takes more it is not compiled.
_KINDS = 16
_PLAIN = (Tensor, torch.nn.Parameter, torch.nn.Buffer)


class Body(NamedTuple):
    """What a call computes, and what of it is no tensor."""

    tensors: Sequence[Tensor]
    static: Any = None


@dataclasses.dataclass
class Program:
    """A traced call that can be replayed.

    Attributes
    ----------
    run : callable
        ``run(*inputs) -> tensors``.
    seen : list of bool
        What the host has looked at while it was traced.
    static : object
        What of the call's outcome is no tensor.
    nodes : int
        How many operations it has.
    checked : bool
        Whether it has been compared with the call as it is.
    calls : int
        How often it has been replayed.
    """

    run: Callable[..., Sequence[Tensor]]
    seen: list[bool]
    static: Any
    nodes: int
    checked: bool = False
    calls: int = 0


class Replayed(NamedTuple):
    """The outcome of a replay.

    Attributes
    ----------
    tensors : list of Tensor
        What the call has computed.
    program : Program
        By which.
    lifted : sequence of Tensor
        What the functions have captured.
    """

    tensors: list[Tensor]
    program: Program
    lifted: Sequence[Tensor] = ()


class Session:
    """The state of a compiled function.

    Parameters
    ----------
    backend : {"aten", "inductor", "cudagraphs"}
        What runs the graphs.
    on_fallback : {"warn", "raise", "ignore"}
        What to do where a call cannot be compiled.
    check : int
        Each so many calls of a program it is compared with the call as it is; 0: the first alone.
    """

    def __init__(
        self, backend: Backend = "aten", on_fallback: OnFallback = "warn", check: int = 0
    ) -> None:
        self.backend, self.on_fallback, self.check = backend, on_fallback, check
        self._captures: dict[Hashable, Capture] = {}
        #: Why calls were not compiled, by what was called.
        self.causes: dict[tuple[Hashable, ...], str] = {}
        self._said: set[str] = set()
        self._memories: dict[Hashable, Memory] = {}

    @property
    def programs(self) -> list[Program]:
        """All programs that were made."""
        kept = [c.kept for capture in self._captures.values() for c in capture.graphs]
        return [program for of_graph in kept for many in of_graph.values() for program in many]

    @contextmanager
    def entered(self) -> Iterator[None]:
        """Compile what the library is called for in the body."""
        token = _session.set(self)
        try:
            yield
        finally:
            _session.reset(token)

    def replay(
        self,
        name: str,
        key: Hashable,
        stages: Sequence[Stage],
        arguments: Sequence[Any],
        tensors: Sequence[Tensor],
        body: Callable[[list[Any], list[Tensor]], Body],
        vmaps: Vmaps | None,
        again: Callable[[], None] = lambda: None,
    ) -> Replayed | None:
        """Replay a call of the library, or trace it first.

        Parameters
        ----------
        name : str
            What is called, for messages.
        key : hashable
            All that the call depends on beside tensors and the functions.
        stages : sequence of Stage
            The user's functions.
        arguments : sequence of pytree
            What they are called with, to be followed: tensors that nothing else holds.
        tensors : sequence of Tensor
            What the call is made of beside what the functions capture, as the caller sees it.
        body : callable
            ``body(functions, tensors)``: the call, outside of the caller's vmaps.
        vmaps : Vmaps, optional
            These.
        again : callable
            Undoes what an attempt at the call has left behind.

        Returns
        -------
        replayed : Replayed or None
            None: the call is to be made as it is.
        """
        of = (name, *(_code(function) for function, _ in stages))
        if of in self.causes:
            return None
        outcome: list[Replayed | None] = []

        def then(captured: Captured, real: Sequence[Tensor]) -> Sequence[Tensor]:
            outcome.append(self._replayed(captured, real, key, tensors, body, vmaps, again))
            return [real[0]] * _returned(captured)

        try:
            capture = self._captures.get(of) or self._captures.setdefault(of, Capture())
            capture(stages, arguments, then)
        except NotCaptured as cause:
            self.fall_back(of, str(cause))
            return None
        return outcome[0]

    def explain(self) -> str:
        """Say what was compiled, and why something was not.

        Returns
        -------
        text : str
            A line for each program, and for each function that runs as without a compiler.
        """
        lines = [
            f"{program.nodes} operations in one graph, replayed {program.calls} times"
            for program in self.programs
        ]
        lines += [f"{of[0]} is not compiled: {cause}" for of, cause in self.causes.items()]
        return "\n".join(lines) or "nothing was compiled yet"

    def memory(self, *functions: Any) -> Memory:
        """Give the memory of the linear system that these functions pose."""
        return self._memories.setdefault(tuple(map(_code, functions)), Memory())

    def agree(
        self,
        program: Program,
        replayed: Sequence[Tensor],
        present: Sequence[Tensor],
        rtol: float = 0.0,
    ) -> None:
        """Compare a replay with the call as it is.

        Parameters
        ----------
        program : Program
            What was replayed.
        replayed, present : sequence of Tensor
            What it computed, and what the call did.
        rtol : float
            Where both end by a tolerance, they may end a step apart.

        Raises
        ------
        CompileMismatch
            If they differ by more than rounding makes.
        """
        for ours, theirs in zip(replayed, present, strict=True):
            eps = torch.finfo(theirs.dtype).eps if theirs.is_floating_point() else 0.0
            a, b = ours.detach().double(), theirs.detach().double()
            away = torch.linalg.vector_norm(a - b) / torch.linalg.vector_norm(b)
            if bool(away > _ALLOWED * max(eps**0.5, rtol)):
                raise CompileMismatch(
                    f"A compiled call is off by {float(away):.2g} from the same call as it is. "
                    "Please report it; hypergrad.compile is not to be used for this function."
                )
        program.checked = True

    def is_due(self, program: Program) -> bool:
        """Say whether a program is to be compared in this call."""
        return not program.checked or (self.check > 0 and program.calls % self.check == 0)

    def fall_back(self, of: tuple[Hashable, ...], cause: str) -> None:
        """Say, once for each cause, that a call is not compiled."""
        self.causes[of] = cause
        if self.on_fallback == "ignore":
            return
        text = f"{of[0]} is not compiled: {cause}. It runs as it does without hypergrad.compile."
        if self.on_fallback == "raise":
            raise NotCompiled(text)
        if cause not in self._said:
            self._said.add(cause)
            warn_of_compiling(text)

    def _replayed(
        self,
        captured: Captured,
        real: Sequence[Tensor],
        key: Hashable,
        tensors: Sequence[Tensor],
        body: Callable[[list[Any], list[Tensor]], Body],
        vmaps: Vmaps | None,
        again: Callable[[], None],
    ) -> Replayed | None:
        lifted = [real[place] for place in captured.lifted]
        for tensor in real:
            if not isinstance(tensor, _PLAIN) or tensor.layout != torch.strided:
                raise NotCaptured(f"a {type(tensor).__name__} is captured")
        batched = tuple(map(is_batched, lifted))
        inputs = list(tensors) + lifted
        if vmaps is not None:
            all_batched = (True,) * len(tensors) + batched
            inputs = [
                vmaps.unwrapped(t) if b else t for t, b in zip(inputs, all_batched, strict=True)
            ]
        inputs = [t.detach() for t in inputs]
        forms = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
        kind = key, forms, batched, None if vmaps is None else vmaps.sizes
        if kind not in captured.kept and len(captured.kept) == _KINDS:
            raise NotCaptured(
                f"the call is made in more than {_KINDS} ways: shapes, or a number among its "
                "arguments (of the solver, say), change from call to call"
            )
        programs = captured.kept.setdefault(kind, [])
        with outside(vmaps), torch.no_grad(), _without_autocast(inputs):
            for place, program in enumerate(programs):
                again()
                replayed = _run(program, inputs)
                if replayed is not None:
                    programs.insert(0, programs.pop(place))  # the next call is likely to be alike
                    return replayed._replace(lifted=lifted)
            if len(programs) == _BRANCHES:
                raise NotCaptured(
                    "what the host sees changes from call to call, so that the steps of the call do"
                )
            again()
            program = _made(captured, inputs, len(tensors), batched, body, vmaps)
            programs.append(program)
            again()
            made = _run(program, inputs)
            return None if made is None else made._replace(lifted=lifted)


def compiling() -> Session | None:
    """Say what compiles the library's calls; None: nothing does."""
    return _session.get()


#: The session of calls that ask for it one by one.
EVERYWHERE = Session()
_session: ContextVar[Session | None] = ContextVar("hypergrad_session", default=None)


def _run(program: Program, inputs: list[Tensor]) -> Replayed | None:
    """Replay a program; None: the host would have seen something else."""
    try:
        outputs = [tensor.contiguous() for tensor in program.run(*inputs)]
    except Changed:
        return None
    if program.seen and outputs.pop().tolist() != program.seen:
        return None
    program.calls += 1
    return Replayed(outputs, program)


def _made(
    captured: Captured,
    inputs: list[Tensor],
    own: int,
    batched: Sequence[bool],
    body: Callable[[list[Any], list[Tensor]], Body],
    vmaps: Vmaps | None,
) -> Program:
    """Trace a call."""
    static: list[Any] = []

    def noted(*inputs: Tensor) -> list[Tensor]:
        lifted = inputs[own:]

        def lift(place: int) -> Tensor:
            tensor = lifted[place]
            return vmaps.wrapped(tensor) if vmaps is not None and batched[place] else tensor

        made = body(captured.functions(lift), list(inputs[:own]))
        static.append(made.static)
        return [tensor.detach() for tensor in made.tensors]

    graph = traced(noted, inputs)
    cleaned = Cleaned(graph.graph, inputs, graph.constants)
    Folded(cleaned.graph, cleaned.forms, cleaned.constants)
    fuse(cleaned.graph, cleaned.forms, cleaned.constants)
    mark_views(cleaned.graph, inputs, cleaned.constants)
    cut_out_parts(cleaned.graph)
    run = runner(cleaned.graph, cleaned.constants)
    nodes = len(cleaned.graph.nodes)
    return Program(run, list(graph.seen), static[-1], nodes)


@contextmanager
def _without_autocast(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Leave the caller's autocast: a graph holds its casts already."""
    kind = tensors[0].device.type
    if not torch.is_autocast_enabled(kind):
        yield
        return
    with torch.autocast(kind, enabled=False):
        yield


def _returned(captured: Captured) -> int:
    """Count the outputs of a graph; refuse a tensor that leaves the functions in another way."""
    output = next(node for node in captured.module.graph.nodes if node.op == "output")
    returned = list(output.args[0])
    if any(node.target is not mark for node in returned):
        raise NotCaptured("a tensor leaves the function other than by its return")
    return len(returned)


def _code(function: Any) -> Hashable:
    """Tell functions apart by their code."""
    function = inspect.unwrap(function)
    code: Any = getattr(function, "__code__", None) or type(function)
    return code


#: The roots of a rounding by which a replay may be off: a graph is computed in another order, and
#: iterations take that further. What a graph had kept of an old call was off by a part of all.
_ALLOWED = 30.0
