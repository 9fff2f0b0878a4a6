"""The errors and the warning; every one of them says what was measured, where, and what to try."""

from __future__ import annotations


class HypergradError(Exception):
    """Base class of every error that this library raises on purpose.

    Examples
    --------
    >>> import hypergrad
    >>> issubclass(hypergrad.NotConverged, hypergrad.HypergradError)
    True
    """


class NotConverged(HypergradError):
    """The inner problem or the linear system was not solved to its tolerance."""


class IndefiniteHessian(HypergradError):
    """Negative curvature was met by a solver that needs a positive definite matrix."""


class SingularHessian(HypergradError):
    """The matrix of the linear system is singular and the system has no solution."""


class NotDifferentiable(HypergradError):
    """The inner solution has a kink, where it has another derivative on each side."""


class Diverged(HypergradError):
    """An iteration moved away from the solution, for example a Neumann series."""


class NotFinite(HypergradError):
    """A loss, a gradient, a product or the answer holds NaN or infinity."""


class NotConnected(HypergradError):
    """A function does not depend on an argument that it must depend on."""


class RankFailed(HypergradError):
    """Another process has failed, has ended, or has other numbers than this one."""


class StructureMismatch(HypergradError, ValueError):
    """An argument has another structure, shape, dtype or device than it must have."""


class UnsupportedOperation(HypergradError):
    """What was asked for cannot be computed rightly; the message says what to do instead."""


class ConvergenceWarning(UserWarning):
    """The answer may be inaccurate; the message says by which figure, and what to try."""
