"""The errors and the warnings: what was measured, where, what to try, and where it is explained."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._info import SolveInfo


class HypergradError(Exception):
    """Base class of every error that this library raises on purpose.

    Its text is for people and may change. A program reads these attributes, each of which is None
    where there is no such thing; they are kept when an error is pickled or copied.

    Attributes
    ----------
    info : SolveInfo or None
        The evidence of the answer that was refused, without `solution`, `outer_value` and `aux`.
        Of a batch each figure has the tasks in front.
    leaf : str or None
        The path of the leaf at fault, such as ``params['0.weight']``.
    argument : str or None
        The name of the argument at fault, such as ``hparams``; of a leaf, the one it belongs to.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner, one = lambda w, t: ((w["a"] - t) ** 2).sum(), torch.ones(2)
    >>> try:
    ...     hypergrad.implicit_grad(lambda w, t: w["a"].sum(), inner, {"a": one, "b": one}, one)
    ... except hypergrad.HypergradError as error:
    ...     type(error).__name__, error.leaf, error.argument, error.info
    ('NotConnected', "params['b']", 'params', None)
    """

    info: SolveInfo | None
    leaf: str | None
    argument: str | None

    def __init__(
        self,
        *args: object,
        info: SolveInfo | None = None,
        leaf: str | None = None,
        argument: str | None = None,
    ) -> None:
        self.args = args  # as Exception.__init__ does, which torch.export cannot trace
        self.info, self.leaf = info, leaf
        self.argument = argument if argument is not None or leaf is None else argument_of(leaf)

    def __str__(self) -> str:
        """Write the text, and the place of the documentation that shows the cure."""
        text = super().__str__()
        named = [
            kind for kind in type(self).__mro__ if kind.__module__ == HypergradError.__module__
        ]
        return text if named[0] is HypergradError or not text else with_place(text, named[0])


def with_place(text: str, kind: type[Exception]) -> str:
    """End a text with the place of the documentation that shows what cures such an error."""
    return f"{text} See docs/errors.md#{kind.__name__.lower()}."


def argument_of(leaf: str) -> str | None:
    """Read the name that a path begins with; None where it begins with words."""
    name = re.match(r"[A-Za-z_]\w*(?=$|[\[.(]| for )", leaf)
    return name and name[0]


class NotCompiled(HypergradError):
    """A call cannot be compiled, which `hypergrad.compile` was told to raise for.

    The message names the cause. It has no `info`, no `leaf` and no `argument`.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner = lambda w, t: ((w - t) ** 2).sum() if t.sum().item() > 0 else w.sum()
    >>> step = hypergrad.compile(hypergrad.implicit_grad, on_fallback="raise")
    >>> one = torch.ones(2)
    >>> step(lambda w, t: w.sum(), inner, one, one)
    Traceback (most recent call last):
    hypergrad.NotCompiled: implicit_grad is not compiled: ...
    """


class CompileMismatch(HypergradError):
    """A compiled call is not what the same call is without `hypergrad.compile`.

    It is raised once. Later calls of the same functions run as without `hypergrad.compile`. A
    function that finds out whether it is compiled, and then does something else, is such a case.
    It has no `info`, no `leaf` and no `argument`.

    Examples
    --------
    >>> import torch, hypergrad
    >>> def inner(w, t, compiled=torch.compiler.is_compiling):
    ...     return ((w - t) ** 2).sum() + (w**2).sum() * compiled()
    >>> step, one = hypergrad.compile(hypergrad.implicit_grad), torch.ones(2)
    >>> step(lambda w, t: w.sum(), inner, one, one)
    Traceback (most recent call last):
    hypergrad.CompileMismatch: A compiled call is off by 0.5 ...
    """


class CompileWarning(UserWarning):
    """A call is not compiled, and runs as it does without `hypergrad.compile`.

    The message names the cause. It comes once for each cause.

    Examples
    --------
    >>> import warnings, torch, hypergrad
    >>> inner = lambda w, t: ((w - t) ** 2).sum() if t.sum().item() > 0 else w.sum()
    >>> step, one = hypergrad.compile(hypergrad.implicit_grad), torch.ones(2)
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     grads = step(lambda w, t: w.sum(), inner, one, one)
    >>> caught[0].category.__name__
    'CompileWarning'
    """


class NotConverged(HypergradError):
    """The inner problem or the linear system was not solved to its tolerance.

    Or so it counts: params has run away, `GaussNewton` leaves out what changes the answer, or a
    residual is small only in units that hide an error. `info` holds the evidence.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner, outer = lambda w, t: ((w - t) ** 2).sum(), lambda w, t: (w**2).sum()
    >>> t = torch.ones(2)  # which is the minimiser
    >>> hypergrad.implicit_grad(outer, inner, t + 1, t, on_failure="raise")
    Traceback (most recent call last):
    hypergrad.NotConverged: params does not solve the inner problem: ...
    """


class IndefiniteHessian(HypergradError):
    """Negative curvature was met where there is to be a minimum, by whatever solver.

    Also by a solver that needs a positive definite matrix, in another condition. `info` holds the
    evidence.

    Examples
    --------
    >>> import torch, hypergrad
    >>> signs, one = torch.tensor([1.0, -1.0]), torch.ones(2)
    >>> saddle = lambda w, t: (signs * (w - t) ** 2).sum()
    >>> hypergrad.implicit_grad(
    ...     lambda w, t: (w**2).sum(), saddle, one, one, solver=hypergrad.CG(), on_failure="raise"
    ... )
    Traceback (most recent call last):
    hypergrad.IndefiniteHessian: CG met negative curvature (p.Ap <= 0) ...
    """


class SingularHessian(HypergradError):
    """The matrix of the linear system is singular, and the derivative is not determined.

    The system has no solution, or it has one here and none a little further on. In forward mode
    a lack of rank is enough. `info` holds the evidence.

    Examples
    --------
    >>> import torch, hypergrad
    >>> flat = lambda w, t: (w.sum() - t) ** 2  # a line of minimisers
    >>> w, t = torch.tensor([2.0, 0.0]), torch.tensor(2.0)
    >>> hypergrad.implicit_grad(lambda w, t: (w**2).sum(), flat, w, t, on_failure="raise")
    Traceback (most recent call last):
    hypergrad.SingularHessian: The matrix is singular and the system has no solution ...
    """


class NotDifferentiable(HypergradError):
    """The inner solution has a kink, where it has another derivative on each side.

    `info` holds the evidence.

    Examples
    --------
    >>> import torch, hypergrad
    >>> lasso = hypergrad.ProximalGradient(
    ...     lambda w, t: (w - t) ** 2 / 2, lambda v, step, t: hypergrad.prox.l1(v, step), 0.5
    ... )
    >>> zero, one = torch.tensor(0.0), torch.tensor(1.0)  # the minimiser is max(t - 1, 0)
    >>> hypergrad.implicit_grad(lambda w, t: w, lasso, zero, one, on_failure="raise")
    Traceback (most recent call last):
    hypergrad.NotDifferentiable: params sits at a kink of the inner problem, ...
    """


class Diverged(HypergradError):
    """An iteration moved away from the solution, for example a Neumann series.

    `info` holds the evidence, where the iteration was that of a linear solver.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner, one = lambda w, t: ((w - t) ** 2).sum(), torch.ones(2)
    >>> series = hypergrad.Neumann(step_size=2.0)  # the curvature is 2
    >>> hypergrad.implicit_grad(
    ...     lambda w, t: (w**2).sum(), inner, one, one, solver=series, on_failure="raise"
    ... )
    Traceback (most recent call last):
    hypergrad.Diverged: Neumann diverged: its terms grew...
    """


class NotFinite(HypergradError):
    """A loss, a gradient, a product or the answer holds NaN or infinity.

    `leaf` and `argument` say where the first of them was met, `info` holds the evidence of the
    linear solve where it came so far.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner, one = lambda w, t: ((w - t) ** 2).sum(), torch.ones(2)
    >>> hypergrad.implicit_grad(lambda w, t: (w - 2).log().sum(), inner, one, one)
    Traceback (most recent call last):
    hypergrad.NotFinite: the outer loss holds NaN or infinity. ...
    """


class NotConnected(HypergradError):
    """A function does not depend on an argument that it must depend on.

    `argument` names the latter, and `leaf` the leaf of it where others are connected.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner, one = lambda w, t: ((w - t) ** 2).sum(), torch.ones(2)
    >>> hypergrad.implicit_grad(lambda w, t: (t**2).sum(), inner, one, one)
    Traceback (most recent call last):
    hypergrad.NotConnected: outer does not depend on params, ...
    """


class RankFailed(HypergradError):
    """Another process has failed, has ended, or has other numbers than this one.

    Every process raises it, so that none waits for ever; the message names the process whose own
    error is the one to look for. It has no `info`, no `leaf` and no `argument`.

    Examples
    --------
    >>> import hypergrad
    >>> issubclass(hypergrad.RankFailed, hypergrad.HypergradError)
    True
    """


class StructureMismatch(HypergradError, ValueError):
    """An argument has another structure, shape, dtype or device than it must have.

    `argument` names it, and `leaf` the leaf of it where that is known.

    Examples
    --------
    >>> import torch, hypergrad
    >>> inner, one = lambda w, t: ((w - t) ** 2).sum(), torch.ones(2)
    >>> hypergrad.implicit_grad(lambda w, t: w, inner, one, one)
    Traceback (most recent call last):
    hypergrad.StructureMismatch: outer must return a scalar tensor; ...
    """


class UnsupportedOperation(HypergradError):
    """A request that cannot be computed rightly; the message says what to do instead.

    `leaf` and `argument` name the leaf that it is about, where there is one.

    Examples
    --------
    >>> import torch, hypergrad
    >>> root, one = hypergrad.Root(lambda w, t: w - t), torch.ones(2)
    >>> hypergrad.implicit_grad(lambda w, t: (w**2).sum(), root, one, one, solver=hypergrad.CG())
    Traceback (most recent call last):
    hypergrad.UnsupportedOperation: CG needs a symmetric matrix, ...
    """


class ConvergenceWarning(UserWarning):
    """The answer may be inaccurate; the message says by which figure, and what to try.

    Examples
    --------
    >>> import warnings, torch, hypergrad
    >>> inner, outer = lambda w, t: ((w - t) ** 2).sum(), lambda w, t: (w**2).sum()
    >>> with warnings.catch_warnings(record=True) as caught:
    ...     warnings.simplefilter("always")
    ...     grads = hypergrad.implicit_grad(outer, inner, torch.full((2,), 2.0), torch.ones(2))
    >>> caught[0].category.__name__
    'ConvergenceWarning'
    """
