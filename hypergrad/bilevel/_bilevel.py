"""The loop for the outer problem, as an object that one steps through."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor

from .._autograd.known_graphs import KnownEvaluations
from .._autograd.refusals import never_compiled
from .._autograd.trace import being_traced
from .._autograd.transforms import transforms_active
from .._errors import StructureMismatch, UnsupportedOperation
from .._info import shown
from .._mistakes import explained
from .._warnings import OnFailure, check_on_failure, listening
from ._alternating import Alternating
from ._batches import Batch, Source
from ._estimate import Estimator
from ._history import History
from ._levels import Levels
from ._method import Method
from ._optimisers import Optimiser
from ._run import Run
from ._state import copied, restored
from ._step_info import StepInfo

_VERSION = 1
_KEYS = {
    "version",
    "method",
    "steps",
    "params",
    "hparams",
    "inner_optimizer",
    "outer_optimizer",
    "state",
    "generator",
    "batches",
}
_ABSENT: Any = object()


class Bilevel:
    """The outer problem ``min over hparams of outer(params*(hparams), hparams)``, step by step.

    It holds what has to live from one outer step to the next: the variables of both levels, the
    `torch.optim` optimisers that move them, the inner solution and the linear system's, and where
    the batches are drawn. The next step starts from both solutions. The `method` says how a step
    is made: `Alternating` (the default), `HOAG`, or one of the stochastic methods `SOBA`,
    `MASOBA`, `SABA`, `SRBA`, `FSLA`, `AmIGO`, `StocBiO` and `F2SA`.

    Parameters
    ----------
    outer : callable
        ``outer(params, hparams)``, a scalar tensor; ``outer(params, hparams, batch)`` where outer
        batches are drawn or passed.
    inner : callable or condition
        ``inner(params, hparams)``, an objective that the parameters minimise, or a condition object
        such as `GaussNewton` or `FixedPoint`; with a batch as last argument (of each of a
        condition's functions) where inner batches are drawn or passed. The inner optimiser follows
        the gradient of an objective, and the condition itself otherwise: for a `FixedPoint`,
        `torch.optim.SGD` with a rate of 1 applies the map.
    params, hparams : pytree of Tensor
        Where both levels start.
    inner_optimizer, outer_optimizer : torch.optim.Optimizer or callable
        A callable makes an optimiser of a list of tensors:
        ``lambda variables: torch.optim.SGD(variables, lr=0.1)``. It is given copies, and the
        caller's tensors stay as they are. A ready optimiser moves the tensors that it was made of,
        which must be those in `params` or `hparams`. L-BFGS inside forgets its history at every
        outer step, which changes the inner problem.
    method : Method, str or callable, optional
        How a step is made. A word or a callable ``(outer, inner, params, hparams) -> grads`` stands
        for ``Alternating(estimator=...)``.
    inner_batches, outer_batches : sequence, callable or iterable, optional
        Where batches come from. From a sequence, such as a list of batches, one is drawn at random,
        with replacement; a callable ``generator -> batch`` draws by itself; any other iterable,
        such as a `DataLoader`, is gone through again and again. None: the losses take no batch.
    seed : int
        Of the generator that batches are drawn with.
    on_failure : {"warn", "raise", "ignore"}
        What to do when a hypergradient may be wrong, as in `implicit_grad`; a kind of warning is
        issued once a run, and counted in `StepInfo.warned`. Numbers that are not finite raise in
        the first two, before the hyperparameters are moved by them.
    callback : callable, optional
        ``callback(info)``, called with the `StepInfo` of every step.
    hparams_projection : callable, optional
        ``hparams_projection(hparams) -> hparams``, one of `hypergrad.projections` perhaps: applied
        after each outer step, to the variables themselves, without any derivative. The outer
        optimiser's memory, such as a momentum, stays as it is.

    Raises
    ------
    StructureMismatch
        If an optimiser does not hold the variables of its level.
    NotConnected
        If a tensor belongs to both levels.
    UnsupportedOperation
        If the losses call a module that is wrapped for several processes.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = lambda w, lam: ((w - 1) ** 2 + lam.exp() * w**2).sum()  # w = 1 / (1 + exp(lam))
    >>> outer = lambda w, lam: ((w - 0.25) ** 2).sum()
    >>> loop = hypergrad.Bilevel(
    ...     outer,
    ...     inner,
    ...     torch.zeros(1),
    ...     torch.zeros(1),
    ...     inner_optimizer=lambda variables: torch.optim.SGD(variables, lr=0.2),
    ...     outer_optimizer=lambda variables: torch.optim.SGD(variables, lr=5.0),
    ... )
    >>> for _ in range(100):
    ...     info = loop.step()
    >>> loop.hparams.exp()  # 3: then w is 1 / 4
    tensor([3.0000])
    """

    @explained
    def __init__(
        self,
        outer: Callable[..., Any],
        inner: Any,
        params: Any,
        hparams: Any,
        *,
        inner_optimizer: Optimiser,
        outer_optimizer: Optimiser,
        method: Method | Estimator | None = None,
        inner_batches: Source = None,
        outer_batches: Source = None,
        seed: int = 0,
        on_failure: OnFailure = "warn",
        callback: Callable[[StepInfo], Any] | None = None,
        hparams_projection: Callable[[Any], Any] | None = None,
    ) -> None:
        check_on_failure(on_failure)
        if hparams_projection is not None and not callable(hparams_projection):
            raise TypeError(
                "hparams_projection must be a function of the hyperparameters, such as hypergrad."
                f"projections.non_negative; got {hparams_projection!r}."
            )
        self.method = method if isinstance(method, Method) else _by_estimator(method)
        self._callback, self._history = callback, History()
        optimizers, batches = (inner_optimizer, outer_optimizer), (inner_batches, outer_batches)
        drawing = torch.Generator().manual_seed(seed), hparams_projection
        problem = outer, inner, params, hparams
        self._levels = Levels(*problem, optimizers, batches, on_failure, *drawing)
        self._levels.state = self.method.start(self._levels)

    @property
    def params(self) -> Any:
        """The parameters as they are now, detached; later steps change them in place."""
        tree = self._levels.params
        return tree.rebuild([v.detach() for v in tree.variables])

    @property
    def hparams(self) -> Any:
        """The hyperparameters as they are now, detached; later steps change them in place."""
        tree = self._levels.hparams
        return tree.rebuild([v.detach() for v in tree.variables])

    @property
    def steps(self) -> int:
        """How many outer steps have been made."""
        return self._levels.steps

    @property
    def history(self) -> History:
        """The numbers of the steps that `run` has made, which plot themselves."""
        return self._history

    @property
    def inner_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the parameters, for a scheduler of its learning rate, say."""
        return self._levels.inner_optimizer

    @property
    def outer_optimizer(self) -> torch.optim.Optimizer:
        """The optimiser of the hyperparameters."""
        return self._levels.outer_optimizer

    def __repr__(self) -> str:
        """Write the method, the variables' shapes and the optimisers, in one line."""
        return (
            f"Bilevel(method={self.method!r}, steps={self.steps}, params={shown(self.params)}, "
            f"hparams={shown(self.hparams)}, inner_optimizer={_named(self.inner_optimizer)}, "
            f"outer_optimizer={_named(self.outer_optimizer)})"
        )

    @never_compiled
    def step(self, inner_batch: Any = _ABSENT, outer_batch: Any = _ABSENT) -> StepInfo:
        """Make one step of the outer problem.

        Parameters
        ----------
        inner_batch, outer_batch
            Batches of this step. One that is passed serves for everything that the step evaluates
            on its level, also where the method would draw several; one that is not is drawn.

        Returns
        -------
        info : StepInfo
            What the step has done.

        Raises
        ------
        NotFinite
            If a number is not finite, unless `on_failure` is "ignore".
        TypeError
            If a loss does not take what it is given.
        UnsupportedOperation
            Inside a `torch.func` transform or another problem's loss.
        """
        if transforms_active() or being_traced():
            raise UnsupportedOperation(
                "Bilevel.step moves variables in place, which has no place inside a torch.func "
                "transform or the losses of another problem. Call it outside; for a batch of "
                "problems make one of them, whose losses are the sums over the batch."
            )
        levels = self._levels
        levels.passed = (
            None if inner_batch is _ABSENT else Batch((inner_batch,)),
            None if outer_batch is _ABSENT else Batch((outer_batch,)),
        )
        try:
            with _recording(), listening(levels._hear), KnownEvaluations():
                levels._begin()
                info = self.method.step(levels)
        except TypeError as error:
            levels._refuse_signatures(error)
            raise
        finally:
            levels.passed = (None, None)
        if not isinstance(info, StepInfo):
            raise TypeError(
                f"{type(self.method).__name__}.step must return a StepInfo, as Levels.outer_step "
                f"and Levels.record make it; it returned {type(info).__name__}."
            )
        levels.steps += 1
        levels.derivatives.checked = True
        if levels.warned:
            info = dataclasses.replace(info, warned=dict(levels.warned))
        if self._callback is not None:
            self._callback(info)
        return info

    def run(self, steps: int, *, progress: bool = False, history: bool = True) -> Run:
        """Make steps one after the other: ``for step in loop.run(100, progress=True)``.

        Each is a call of `step`, made when the next one is asked for. A ``break`` leaves the loop
        where it is, and another `run` goes on from there. What iterates, such as `list` or a
        progress bar of your own, makes all of them.

        Parameters
        ----------
        steps : int
            How many more.
        progress : bool
            Whether to write to stderr how far it is, with the outer loss, the norm of the inner
            gradient, how the linear system ended, and the time left. On a terminal that is one
            line, written over; elsewhere ten lines, and more if a minute has gone without one. The
            device is waited for when a line is written.
        history : bool
            Whether the numbers of the steps go into `history`.

        Returns
        -------
        run : iterable of StepInfo
            What is to be iterated over: until then no step is made.

        Raises
        ------
        ValueError
            If there are fewer than no steps.
        TypeError
            If `steps` is no whole number.
        """
        if isinstance(steps, bool) or not isinstance(steps, int):
            raise TypeError(f"steps must be a whole number; got {steps!r}.")
        if steps < 0:
            raise ValueError(f"steps must not be negative; got {steps}.")
        return Run(self, steps, progress, history)

    def state_dict(self) -> dict[str, Any]:
        """Copy everything that a resumed run needs: tensors, numbers, text, lists and dicts.

        ``torch.load(..., weights_only=True)`` reads what ``torch.save`` has written of it. A run
        that goes on from it is bit-equal on the same machine, given the same losses, optimisers,
        method and batches. It leaves out two things that are not ours: the generators that the
        losses draw from, and the order in which an iterable gives its batches. A sequence or a
        callable is drawn from with the generator that is in it. The `history` is in it too.

        Returns
        -------
        state : dict
            To be given to `load_state_dict`.
        """
        levels = self._levels
        return {
            "version": _VERSION,
            "method": type(self.method).__name__,
            "steps": levels.steps,
            "params": copied(levels.params.variables),
            "hparams": copied(levels.hparams.variables),
            "inner_optimizer": copy.deepcopy(levels.inner_optimizer.state_dict()),
            "outer_optimizer": copy.deepcopy(levels.outer_optimizer.state_dict()),
            "state": copied(levels.state),
            "memory": levels.memory.export(),
            "generator": levels.generator.get_state(),
            "batches": [levels.inner_batches.state(), levels.outer_batches.state()],
            "warned": dict(levels.warned),
            "history": self._history.state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another run of the same problem has stopped.

        Parameters
        ----------
        state : dict
            What `state_dict` returned.

        Raises
        ------
        StructureMismatch
            If it is the state of another problem or another method. Nothing has changed then.
        """
        levels = self._levels
        known = isinstance(state, dict) and state.keys() >= _KEYS
        if not known or state["version"] != _VERSION:
            raise StructureMismatch(
                f"This is no state of Bilevel in version {_VERSION}: pass what state_dict "
                "returned.",
                argument="state",
            )
        method = type(self.method).__name__
        if state["method"] != method:
            raise StructureMismatch(
                f"This is the state of the method {state['method']}, and here it is {method}.",
                argument="state",
            )
        moved: list[tuple[Tensor, Tensor]] = []
        for tree in (levels.params, levels.hparams):
            saved = state[tree.name]
            if len(saved) != len(tree.variables):
                raise StructureMismatch(
                    f"{tree.name} was saved with {len(saved)} tensors and has "
                    f"{len(tree.variables)} here: this is the state of another problem.",
                    argument="state",
                )
            for place, variable in enumerate(tree.variables):
                value = restored(variable, saved[place], tree.variable_path(place))
                moved.append((variable, value))
        history = History.of(state.get("history", {}))
        levels.state = restored(levels.state, copied(state["state"]), "state")
        with torch.no_grad():
            for variable, value in moved:
                variable.copy_(value)
        levels.inner_optimizer.load_state_dict(copy.deepcopy(state["inner_optimizer"]))
        levels.outer_optimizer.load_state_dict(copy.deepcopy(state["outer_optimizer"]))
        levels.generator.set_state(state["generator"].cpu())
        levels.inner_batches.load(state["batches"][0])
        levels.outer_batches.load(state["batches"][1])
        levels.steps = int(state["steps"])
        levels.memory.load(state.get("memory", {}))
        levels.warned = dict(state.get("warned", {}))
        self._history = history


@contextmanager
def _with_graphs() -> Iterator[None]:
    with torch.inference_mode(False), torch.enable_grad():
        yield


def _recording() -> AbstractContextManager[None]:
    """Make the context in which graphs are recorded: none where the caller's does that."""
    known = torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
    return nullcontext() if known else _with_graphs()


def _by_estimator(method: Any) -> Method:
    """Find the method that a word or a function of the losses stands for.

    Parameters
    ----------
    method : str, callable or None
        What was passed in place of a method.

    Returns
    -------
    method : Method
        With the estimator.

    Raises
    ------
    TypeError
        If it is a class, or no function of the losses and the variables.
    """
    if method is None:
        return Alternating()
    if isinstance(method, type) and issubclass(method, Method):
        raise TypeError(f"method must be a value: {method.__name__}(), not the class.")
    estimator = isinstance(method, str) or (callable(method) and not isinstance(method, type))
    if callable(method) and estimator:
        try:
            inspect.signature(method).bind(*[None] * 4)
        except TypeError:
            estimator = False
        except ValueError:
            pass  # of a builtin nobody knows
    if not estimator:
        raise TypeError(
            f"method is {method!r}, and must be a Method, such as hypergrad.SOBA(), or an "
            "estimator, a word or a function (outer, inner, params, hparams) -> grads. A method of "
            "one's own is a frozen dataclass that inherits from hypergrad.bilevel.Method and has a "
            "function step(self, levels): the page 'Extending' of the documentation writes one in "
            "ten lines."
        )
    return Alternating(estimator=method)


def _named(optimizer: torch.optim.Optimizer) -> str:
    rates = ", ".join(f"lr={float(group['lr']):g}" for group in optimizer.param_groups)
    return f"{type(optimizer).__name__}({rates})"
