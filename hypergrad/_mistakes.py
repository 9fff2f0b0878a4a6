"""Mistakes in a call, and their cures: a misspelt keyword, exchanged arguments, a missing one."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Self, TypeVar, cast

import torch
from torch import Tensor

from ._autograd.guard import Guard
from ._autograd.random_numbers import unnoticed
from ._autograd.torch_pytrees import pytree
from ._errors import HypergradError, StructureMismatch
from ._pytrees import Tree, refuse_meta

Fun = TypeVar("Fun", bound=Callable[..., Any])

# Words that stand for one thing in one library or another, without underscores.
_SAME = tuple(
    frozenset(words.split())
    for words in (
        "maxiter maxiters maxiterations iterations niter niters numiters numiterations maxsteps "
        "nsteps numsteps steps innersteps terms",
        "rtol tol tolerance eps epsilon reltol threshold innertol",
        "lr learningrate stepsize step rate linearlr",
        "solver linearsolver linsolve linearsolve",
        "damping ridge reg regularisation regularization lam shift tikhonov",
        "preconditioner precond precon preconditioning m",
        "x0 initial start warmstart",
        "returninfo fulloutput returnstate info",
        "argnums argnum wrt",
        "inneroptimizer inneroptimiser inneropt optimizer optimiser",
        "outeroptimizer outeroptimiser outeropt",
        "onfailure onerror",
    )
)
_OF_SOLVERS = ("maxiter", "rtol", "atol", "damping", "preconditioner")
_OF_METHODS = ("solver", "inner_steps", "inner_tol", "estimator")
# The functions that are given one argument, and that.
_OF_ONE = {
    "outer_each": "params",
    "inner_each": "params",
    "regulariser": "params",
    "solve": "hparams",
}


def refuse_unknown(name: str, known: Collection[str], keywords: Collection[str]) -> None:
    """Raise where a keyword is none that a function or a class takes.

    Parameters
    ----------
    name : str
        What is called.
    known, keywords : collection of str
        The keywords that it takes, and those that it was called with.

    Raises
    ------
    TypeError
        With the keyword that was meant.
    """
    for word in keywords:
        if word in known:
            continue
        meant = _meant(word, known)
        text = f"{name} has no argument {word!r}. "
        if meant is not None:
            text += f"Did you mean {meant!r}? "
        exact = meant is not None and meant.replace("_", "") == word.replace("_", "")
        linear = "linear_solver" in known
        if linear and not exact and (field := _meant(word, ("maxiter", "tol"))) is not None:
            solver = f"solver=hypergrad.inner_solvers.LBFGS({field}=...)"
            text += f"The inner solver has it as a field: {solver}. "
        if "solver" in known and not exact and (field := _meant(word, _OF_SOLVERS)) is not None:
            solver = f"{'linear_' * linear}solver=hypergrad.CG({field}=...)"
            text += f"The linear solver has it as a field: {solver}. "
        if "method" in known and not exact and (field := _meant(word, _OF_METHODS)) is not None:
            text += f"A method has it as a field: method=hypergrad.Alternating({field}=...). "
        elif "inner_optimizer" in known and meant is None:
            text += "A learning rate is the optimiser's: torch.optim.SGD(variables, lr=...). "
        raise TypeError(f"{text}There are {', '.join(known)}.")


def _meant(word: str, known: Collection[str]) -> str | None:
    """Find the known word that a word stands for, or that it is a misspelling of."""
    bare = {other.replace("_", "").lower(): other for other in known}
    plain = word.replace("_", "").lower()
    if plain in bare:
        return bare[plain]
    for group in _SAME:
        if plain in group and (meant := group & bare.keys()):
            return bare[difflib.get_close_matches(plain, sorted(meant), n=1, cutoff=0.0)[0]]
    close = difflib.get_close_matches(plain, bare, n=1, cutoff=0.75)
    return bare[close[0]] if close else None


class Fields:
    """A value whose class says which field was meant where a keyword is none of them."""

    def __new__(cls, *args: Any, **keywords: Any) -> Self:
        """Look at the keywords before the fields are set."""
        if keywords and dataclasses.is_dataclass(cls):
            known = [field.name for field in dataclasses.fields(cls) if field.init]
            refuse_unknown(cls.__name__, known, keywords)
        return super().__new__(cls)


def explained(entrance: Fun) -> Fun:
    """Make a public function of losses say what is wrong with a call of it.

    Parameters
    ----------
    entrance : callable
        Its first arguments are two functions, the inner variables and the outer ones.

    Returns
    -------
    entrance : callable
        The same, with better errors.
    """
    signature = inspect.signature(entrance)
    known = [name for name in signature.parameters if name != "self"]
    name = f"{entrance.__qualname__}()".replace(".__init__", "")

    @functools.wraps(entrance)
    def call(*args: Any, **keywords: Any) -> Any:
        if keywords.keys() - signature.parameters.keys():
            refuse_unknown(name, known, keywords)
        try:
            return entrance(*args, **keywords)
        except (HypergradError, *_USERS) as error:
            if isinstance(error, HypergradError) and not isinstance(error, StructureMismatch):
                raise
            arguments = {**dict(zip(signature.parameters, args, strict=False)), **keywords}
            if isinstance(error, RuntimeError):
                of_values = ("params", "init", "hparams", "args")
                refuse_meta(*(Tree(k, arguments[k]) for k in of_values if k in arguments))
            _explain(entrance.__name__, known, arguments, error)
            raise

    return cast("Fun", call)


# The errors of a caller's function where it is given something else than it expects.
_USERS = (TypeError, RuntimeError, ValueError, AttributeError, LookupError)


def _explain(
    entrance: str, known: Sequence[str], arguments: Mapping[str, Any], error: Exception
) -> None:
    """Raise a better error where one can be had."""
    if isinstance(error, TypeError):
        for name, one in _OF_ONE.items():
            if name in known and arguments.get(name) is not None:
                refuse_signatures(name, arguments[name], (one,), error)
    if known[0] != "F" and known[3] != "hparams":  # a decorator, which calls no function yet
        return
    if any(name not in arguments for name in known[:4]) or "self" in arguments:
        return
    if known[0] == "F":
        if isinstance(error, TypeError):
            args = [f"args[{i}]" for i in range(len(arguments["args"]))]
            refuse_signatures("F", arguments["F"], ("params", *args), error)
        return
    params, hparams = arguments[known[2]], arguments[known[3]]
    functions = [(name, f) for k in known[:2] for name, f in _functions(k, arguments[k])]
    if isinstance(error, TypeError):
        for name in known[:2]:
            refuse_signatures(name, arguments[name], ("params", "hparams"), error)
    if any(callable(value) for value in (params, hparams)):
        return
    calls = [function for _, function in functions]
    if _work(calls, params, hparams) or not _work(calls, hparams, params):
        return
    raise StructureMismatch(
        f"{known[2]} and {known[3]} look exchanged: the functions fail on them in this order, and "
        f"work in the other. Call {entrance}({', '.join(known[:4])}), and write them as functions "
        f"of (params, hparams). ({error})",
        argument=known[2],
    ) from error


def refuse_signatures(
    name: str,
    value: Any,
    expected: Sequence[str],
    error: BaseException,
    cure: str | None = None,
) -> None:
    """Raise where a function, or one of a condition's, cannot be called with its arguments.

    Parameters
    ----------
    name : str
        What the argument is called.
    value : callable or Condition
        The argument.
    expected : sequence of str
        What its functions are given.
    error : Exception
        What the call has raised.
    cure : str, optional
        What to do about it, in a sentence; None: what most functions need.

    Raises
    ------
    TypeError
        With the arguments that the function must take.
    """
    while isinstance(error.__cause__, TypeError):  # said by an entrance that the call went through
        error = error.__cause__
    cure = cure or "What it needs beside them it closes over, or is passed in the call."
    batched = getattr(value, "batches", None) is not None
    for called, function in _functions(name, value):
        given = (*expected, "batch") if batched and "regulariser" not in called else expected
        try:
            signature = inspect.signature(function)
        except (TypeError, ValueError):
            continue
        numbered = (*given, "number") if name == "step" else given
        if not (_binds(signature, given) or _binds(signature, numbered)):
            raise TypeError(
                f"{called} must take ({', '.join(given)}), and takes {signature}. {cure} ({error})"
            ) from error


def takes(name: str, value: Any, arguments: Sequence[str]) -> bool:
    """Say whether a function, or all of a condition's, can be called with so many arguments."""
    try:
        signatures = [inspect.signature(function) for _, function in _functions(name, value)]
    except (TypeError, ValueError):  # of a builtin nobody knows
        return False
    return all(_binds(signature, arguments) for signature in signatures)


def _binds(signature: inspect.Signature, arguments: Sequence[str]) -> bool:
    try:
        signature.bind(*arguments)
    except TypeError:
        return False
    return True


def _functions(name: str, value: Any) -> list[tuple[str, Callable[..., Any]]]:
    """List the functions of ``(params, hparams)`` in an argument, with their names."""
    if getattr(type(value), "functions", None) is None:
        return [(name, value)] if callable(value) else []
    # Of a condition, those that are given these two.
    fields = ("f", "F", "T", "outputs", "regulariser")
    return [
        (f"{type(value).__name__}.{field}", getattr(value, field))
        for field in fields
        if callable(getattr(value, field, None)) and type(value).__name__ != "KKT"
    ]


def _work(functions: Sequence[Callable[..., Any]], first: Any, second: Any) -> bool:
    """See whether all functions return something usual of these arguments."""
    first, second = (
        pytree.tree_map(lambda t: t.detach().clone() if isinstance(t, Tensor) else t, value)
        for value in (first, second)
    )
    try:
        with unnoticed(), torch.no_grad(), Guard():
            for function in functions:
                value = function(first, second)
                value = value[0] if isinstance(value, tuple) and len(value) == 2 else value
                if isinstance(value, Tensor) and value.numel() != 1 and functions[0] is function:
                    return False
    except Exception:  # of the caller's function
        return False
    return bool(functions)
