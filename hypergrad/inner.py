"""The other name of `hypergrad.inner_solvers`: the same objects."""

from __future__ import annotations

from .inner_solvers import *  # noqa: F403
from .inner_solvers import __all__ as __all__
