"""The loop for the outer problem, and the methods by which it makes a step: a file for each.

`Method` and `Levels` are for methods of one's own.
"""

from .._public import settle as _settle
from ._alternating import Alternating
from ._amigo import AmIGO
from ._bilevel import Bilevel
from ._f2sa import F2SA
from ._fsla import FSLA
from ._history import History
from ._hoag import HOAG
from ._levels import Levels
from ._method import Method
from ._saba import SABA
from ._soba import MASOBA, SOBA
from ._srba import SRBA
from ._step_info import StepInfo
from ._stocbio import StocBiO

__all__ = [
    "F2SA",
    "FSLA",
    "HOAG",
    "MASOBA",
    "SABA",
    "SOBA",
    "SRBA",
    "Alternating",
    "AmIGO",
    "Bilevel",
    "History",
    "Levels",
    "Method",
    "StepInfo",
    "StocBiO",
]

_settle(globals())
