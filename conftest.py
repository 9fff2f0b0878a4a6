"""Doctests belong to the file that they are written in, whatever home an object says it has."""

import doctest

from hypergrad._public import written_in

_of_module = doctest.DocTestFinder._from_module


def _from_module(self, module, thing):
    """See whether an object's doctests are those of a module."""
    home = written_in(thing)
    return _of_module(self, module, thing) if home is None else module.__name__ == home


doctest.DocTestFinder._from_module = _from_module
