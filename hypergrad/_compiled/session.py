"""What lives from one call of a compiled function to the next: graphs, programs, why none was made.

A program is one graph that does a whole call of the library, from the captured functions to the
evidence. Where the host has looked at a value while it was traced, the program returns that flag;
a replay holds where all flags are as they were, and another program is traced where they are not.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from contextvars import ContextVar
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from .._autograd.transforms import forward_mode_active, has_tangent, is_batched
from .._autograd.vmaps import StaysInside, Vmaps, outside
from .._errors import CompileMismatch, HypergradError, NotCompiled
from .._warnings import warn_of_compiling
from ..solvers._recycle import Memory
from .capture import TRACING, Capture, Captured, Failed, NotCaptured, Seen, Stage
from .clean import Cleaned
from .cudagraphs import NoRecorder, recorded
from .fold import Folded
from .fuse import fuse
from .inductor import NoCompiler, compiled
from .part import Changed, cut_out_parts
from .run import runner
from .trace import Traced, traced

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
        What the body returned; nothing else holds their memory.
    program : Program
        What was replayed.
    of : tuple
        What was called.
    values : list
        What the user's functions have returned this time, with any tensors in the places of theirs.
    lifted : list of Tensor
        What they capture.
    """

    tensors: list[Tensor]
    program: Program
    of: tuple[Hashable, ...] = ()
    values: Sequence[Any] = ()
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
    fixed : bool
        With ``"inductor"``: compile each graph as one.
    """

    def __init__(
        self,
        backend: Backend = "aten",
        on_fallback: OnFallback = "warn",
        check: int = 0,
        fixed: bool = False,
    ) -> None:
        self.backend, self.on_fallback, self.check = backend, on_fallback, check
        self.fixed = fixed
        self._captures: dict[Hashable, Capture] = {}
        #: Why calls were not compiled, by what was called.
        self.causes: dict[tuple[Hashable, ...], str] = {}
        self._said: set[str] = set()
        self._failed: dict[tuple[Hashable, ...], int] = {}
        self._memories: dict[Hashable, Memory] = {}

    def __reduce__(self) -> Any:
        """Copy, or pickle, how it compiles, and not what it has compiled."""
        return Session, (self.backend, self.on_fallback, self.check, self.fixed)

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

        Raises
        ------
        NotCompiled
            Where it cannot be compiled, if that is asked for.
        """
        of = (name, *(_code(function) for function, _ in stages))
        if of in self.causes:
            if self.on_fallback == "raise":
                raise NotCompiled(_not_compiled(name, self.causes[of]))
            return None
        try:
            capture = self._captures.get(of) or self._captures.setdefault(of, Capture())
            seen = capture(stages, arguments)
            replayed = self._replayed(seen, key, tensors, body, vmaps, again)
            self._failed.pop(of, None)
            return replayed._replace(of=of)
        except NotCaptured as cause:
            self.fall_back(of, str(cause))
        except NotCompiled:
            raise
        except (HypergradError, Failed) as error:  # so does the call as it is, in its own words
            self._failed[of] = self._failed.get(of, 0) + 1
            if self._failed[of] == _BRANCHES:
                self.fall_back(of, f"it fails again and again ({_first_line(error)})")
        return None

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
        replay: Replayed,
        ours: Sequence[Tensor],
        present: Sequence[Tensor],
        nudged: Callable[[], Sequence[Tensor]] | None = None,
        unsolved: float = 0.0,
        *,
        sure: bool = True,
    ) -> None:
        """Compare a replay with the call as it is.

        Parameters
        ----------
        replay : Replayed
            The replay.
        ours, present : sequence of Tensor
            Its answer, and that of the call as it is.
        nudged : callable, optional
            The answer of the call as it is from where one rounding leads: asked for where the
            others differ, which an ill-conditioned system can make of mere rounding.
        unsolved : float
            The relative residual that a solve leaves: an iteration that is rounded in another way
            may stop somewhere else within it.
        sure : bool
            Whether the call as it is takes its own answer for good. Where it does not, another
            one shows nothing, and a later call is compared.

        Raises
        ------
        CompileMismatch
            If they differ by more than rounding makes. What was called is not compiled any more.
        """
        away = distance(ours, present)
        moved = distance(nudged(), present) if away > 1 and nudged is not None else 0.0
        free = min(_UNSOLVED * unsolved, _MOST) / _allowed(present)
        if away > 1 and not away <= max(_NUDGES * moved, free):
            if not sure:
                return
            self.causes[replay.of] = "a compiled call differed from the same call as it is"
            raise CompileMismatch(
                f"A compiled call is off by {away * _allowed(present):.2g} from the same call as "
                "it is, relative to it. Please report it. Later calls of these functions run as "
                "they do without hypergrad.compile, so that catching this error is all that is to "
                "be done."
            )
        replay.program.checked = True

    def is_due(self, program: Program) -> bool:
        """Say whether a program is to be compared in this call."""
        return not program.checked or (self.check > 0 and program.calls % self.check == 0)

    def refuse(self, name: str, cause: str) -> None:
        """Say once that a call is not compiled, whatever its functions are."""
        if (name, cause) not in self.causes or self.on_fallback == "raise":
            self.fall_back((name, cause), cause)

    def fall_back(self, of: tuple[Hashable, ...], cause: str) -> None:
        """Note that something is not compiled, and say so once."""
        self.causes[of] = cause
        self._say(cause, _not_compiled(str(of[0]), cause))

    def _say(self, cause: str, text: str) -> None:
        """Say once that something falls back, or raise it."""
        if self.on_fallback == "raise":
            raise NotCompiled(text)
        if self.on_fallback == "warn" and cause not in self._said:
            self._said.add(cause)
            warn_of_compiling(text)

    def _assembled(
        self, graph: Cleaned, inputs: Sequence[Tensor]
    ) -> Callable[..., Sequence[Tensor]]:
        """Make what runs a graph, by the backend."""
        forms, constants = graph.forms, graph.constants
        try:
            if self.backend == "inductor":
                return compiled(graph.graph, forms, constants, inputs, self.fixed).run
            if self.backend == "cudagraphs":
                return recorded(graph.graph, forms, constants, inputs)
        except (NoCompiler, NoRecorder) as error:
            text = (
                f"backend={self.backend!r} is not possible: {error}. 'aten' is used in its place."
            )
            self._say(str(error), text)
        return runner(graph.graph, constants)

    def _replayed(
        self,
        seen: Seen,
        key: Hashable,
        tensors: Sequence[Tensor],
        body: Callable[[list[Any], list[Tensor]], Body],
        vmaps: Vmaps | None,
        again: Callable[[], None],
    ) -> Replayed:
        captured = seen.captured
        lifted = [seen.tensors[place] for place in captured.lifted]
        dual = forward_mode_active()
        for tensor in seen.tensors:
            if type(tensor) not in _PLAIN or tensor.layout != torch.strided:
                raise NotCaptured(f"a {type(tensor).__name__} is an argument, or captured")
            if dual and has_tangent(tensor):
                raise NotCaptured("a captured tensor is differentiated in forward mode")
        own, inputs = len(tensors), list(tensors) + lifted
        batched = tuple(map(is_batched, inputs))
        if vmaps is not None:
            inputs = [
                vmaps.unwrapped(t) if place < own or batched[place] else t
                for place, t in enumerate(inputs)
            ]
        inputs = [_as_read(t.detach()) for t in inputs]
        forms = tuple((t.shape, t.stride(), t.dtype, t.device) for t in inputs)
        kind = key, forms, batched, None if vmaps is None else vmaps.sizes, _surroundings(inputs)
        programs = captured.kept.get(kind)
        if programs is None:
            if len(captured.kept) == _KINDS:
                raise NotCaptured(
                    f"the call is made in more than {_KINDS} ways: shapes, or a number among its "
                    "arguments (of the solver, say), change from call to call"
                )
            programs = captured.kept.setdefault(kind, [])
        with outside(vmaps), torch.inference_mode(False), torch.no_grad():
            replayed = _first(programs, inputs, again)
            if replayed is None:
                with TRACING:
                    replayed = _first(programs, inputs, again)  # of another thread
                    if replayed is None:
                        program = _made(
                            self, captured, inputs, own, batched[own:], body, vmaps, again
                        )
                        programs.append(program)
                        replayed = _first([program], inputs, again)
        if replayed is None:
            raise Failed(_OF_ROUNDING)
        return replayed._replace(values=seen.values, lifted=lifted)


def compiling() -> Session | None:
    """Say what compiles the library's calls; None: nothing does."""
    return _session.get()


#: The session of calls that ask for it one by one.
EVERYWHERE = Session()
_session: ContextVar[Session | None] = ContextVar("hypergrad_session", default=None)


def _as_read(tensor: Tensor) -> Tensor:
    """Write out a view whose sign is turned as it is read: a kernel would miss that."""
    turned = tensor.is_neg() or tensor.is_conj()
    return tensor.resolve_conj().resolve_neg() if turned else tensor


def _first(
    programs: list[Program], inputs: list[Tensor], again: Callable[[], None]
) -> Replayed | None:
    """Replay the first of the programs that holds; None: none does, and another may be made."""
    for program in list(programs):
        again()
        outputs = _run(program, inputs)
        if outputs is not None:
            if program is not programs[0]:  # it will hold again sooner than the others
                programs[:] = [program, *(other for other in programs if other is not program)]
            return Replayed(outputs, program)
    if len(programs) >= _BRANCHES:
        raise NotCaptured(
            f"its steps change from call to call, and after {_BRANCHES} graphs no more are made (a "
            "solver stops by its tolerance after more or fewer iterations, say)"
        )
    return None


def _run(program: Program, inputs: list[Tensor]) -> list[Tensor] | None:
    """Replay a program; None: the host would have seen something else."""
    try:
        with _without_autocast(inputs):
            outputs = [tensor.contiguous() for tensor in program.run(*inputs)]
    except Changed:
        return None
    except HypergradError:
        raise
    except Exception as error:  # a matrix without a factorisation, say, or what the user asserts
        raise Failed(_first_line(error)) from error
    if program.seen and outputs.pop().tolist() != program.seen:
        return None
    program.calls += 1
    return outputs


def _made(
    session: Session,
    captured: Captured,
    inputs: list[Tensor],
    own: int,
    batched: Sequence[bool],
    body: Callable[[list[Any], list[Tensor]], Body],
    vmaps: Vmaps | None,
    again: Callable[[], None],
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

    again()
    try:
        graph = traced(noted, inputs, parts=session.backend != "cudagraphs")
        again()  # the trace has taught a solver that recycles
        return _assembled(session, graph, inputs, static[-1])
    except Changed as error:
        raise Failed(_OF_ROUNDING) from error
    except (NotCaptured, Failed, HypergradError):
        raise
    except StaysInside as error:
        if error.__cause__ is None:
            raise NotCaptured(_STAYS_INSIDE) from error
        raise NotCaptured(_not_traced(error.__cause__)) from error
    except Exception as error:  # what the call itself raises is raised by the call as it is
        raise NotCaptured(_not_traced(error)) from error


def _assembled(session: Session, graph: Traced, inputs: list[Tensor], static: Any) -> Program:
    """Make a program of a trace."""
    with _without_autocast(inputs):
        cleaned = Cleaned(graph.graph, inputs, graph.constants)
        Folded(cleaned.graph, cleaned.forms, cleaned.constants)
        fuse(cleaned.graph, cleaned.forms, cleaned.constants)
        cleaned.settle(inputs)
    cut_out_parts(cleaned.graph)
    run = session._assembled(cleaned, inputs)
    nodes = len(cleaned.graph.nodes)
    with _without_autocast(inputs):
        shared = _shared_memory(run(*inputs), [*inputs, *cleaned.constants.values()])
    return Program(_owning(run, shared), list(graph.seen), static, nodes)


def _shared_memory(outputs: Sequence[Tensor], others: Sequence[Tensor]) -> list[int]:
    """List the outputs that lie in the memory of a tensor that outlives the call, or of another."""
    known = {t.untyped_storage().data_ptr() for t in others}
    shared = []
    for place, output in enumerate(outputs):
        memory = output.untyped_storage().data_ptr()
        if memory in known:
            shared.append(place)
        known.add(memory)
    return shared


def _owning(
    run: Callable[..., Sequence[Tensor]], shared: Sequence[int]
) -> Callable[..., Sequence[Tensor]]:
    """Copy the outputs whose memory is not their own: the caller may change them in place."""

    def owned(*inputs: Tensor) -> list[Tensor]:
        outputs = list(run(*inputs))
        for place in shared:
            outputs[place] = outputs[place].clone()
        return outputs

    return owned if shared else run


def distance(ours: Sequence[Tensor], present: Sequence[Tensor]) -> float:
    """Measure how far answers differ, in units of what rounding may make; nan is equal to nan."""
    largest = 0.0
    for one, other in zip(ours, present, strict=True):
        a, b = one.detach().double(), other.detach().double()
        same = (a == b) | (a.isnan() & b.isnan())
        change = torch.linalg.vector_norm(torch.where(same, 0.0, a - b))
        away = float(change / torch.linalg.vector_norm(b)) if bool(change != 0) else 0.0
        largest = max(largest, (away if away == away else float("inf")) / _allowed([other]))
    return largest


def _allowed(present: Sequence[Tensor]) -> float:
    kinds = {t.dtype for t in present if t.is_floating_point()} or {torch.float64}
    kinds |= {dtype for _, dtype in _casts(present)}
    return float(min(_ALLOWED * max(torch.finfo(k).eps for k in kinds) ** 0.5, _MOST))


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "").rstrip(".")


def _not_traced(error: BaseException) -> str:
    return f"it cannot be traced ({type(error).__name__}: {_first_line(error)})"


def _not_compiled(name: str, cause: str) -> str:
    return f"{name} is not compiled: {cause}. It runs as it does without hypergrad.compile."


def _kinds(tensors: Sequence[Tensor]) -> list[str]:
    return sorted({t.device.type for t in tensors})


def _casts(tensors: Sequence[Tensor]) -> list[tuple[str, torch.dtype]]:
    """List the kinds of device that the caller's autocast is on for, with its dtypes."""
    return [
        (kind, torch.get_autocast_dtype(kind))
        for kind in _kinds(tensors)
        if torch.is_autocast_enabled(kind)
    ]


def _surroundings(tensors: Sequence[Tensor]) -> Hashable:
    """List what the caller has switched on that a trace goes by."""
    return *_casts(tensors), torch.get_default_dtype(), torch.are_deterministic_algorithms_enabled()


@contextmanager
def _without_autocast(tensors: Sequence[Tensor]) -> Iterator[None]:
    """Leave the caller's autocast: a graph holds its casts already."""
    with ExitStack() as stack:
        for kind in _kinds(tensors):
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def _code(function: Any, depth: int = 4) -> Any:
    """Tell functions apart by their code, and by the code of the functions that they close over."""
    if isinstance(function, functools.partial):
        return "partial", _code(function.func, depth)
    function = getattr(function, "__func__", function)
    code = getattr(function, "__code__", None)
    if code is None:
        return type(function)
    held = [*(function.__defaults__ or ())]
    for cell in function.__closure__ or ():
        with suppress(ValueError):  # an empty cell
            held.append(cell.cell_contents)
    called = [one for one in held if callable(one) and not isinstance(one, type)]
    inside = tuple(_code(one, depth - 1) for one in called) if depth else ()
    return (code, *inside) if inside else code


_OF_ROUNDING = "its steps depend on rounding"
_STAYS_INSIDE = (
    "a function that takes derivatives or maps by torch.func stays inside of the vmap around the "
    "call"
)
#: The roots of a rounding by which a replay may be off: a graph is computed in another order, and
#: iterations take that further. What a graph had kept of an old call was off by a part of all.
_ALLOWED = 30.0
#: In half precision too a replay may be off by no more.
_MOST = 0.3
#: By so many times what one rounding of params makes, an answer may be off.
_NUDGES = 10.0
#: ... and by so many times the residual that a solve leaves.
_UNSOLVED = 100.0
