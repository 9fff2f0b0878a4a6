"""What all tests share: where doctests belong, and that those for a GPU are skipped without one."""

import doctest

import pytest
import torch

from hypergrad._public import written_in

_of_module = doctest.DocTestFinder._from_module


def _from_module(self, module, thing):
    """See whether an object's doctests are those of a module, whatever home it says it has."""
    home = written_in(thing)
    return _of_module(self, module, thing) if home is None else module.__name__ == home


doctest.DocTestFinder._from_module = _from_module


def pytest_runtest_setup(item):
    """Skip what needs a GPU, with the reason, where there is none."""
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
