"""The module of inner solvers goes by two names."""

from __future__ import annotations

import importlib
import pickle
import subprocess
import sys

import hypergrad.inner
from hypergrad import inner_solvers
from hypergrad.inner import LBFGS


def test_both_names_give_the_same_objects():
    assert hypergrad.inner.__all__ == inner_solvers.__all__
    for name in inner_solvers.__all__:
        objects = {getattr(hypergrad.inner, name), getattr(inner_solvers, name)}
        assert len(objects) == 1
    assert importlib.import_module("hypergrad.inner").LBFGS is LBFGS
    assert type(pickle.loads(pickle.dumps(LBFGS()))) is inner_solvers.LBFGS


def test_the_other_name_is_silent():
    program = "import hypergrad.inner as i; from hypergrad.inner import FISTA; i.FISTA is FISTA"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True
    )
    assert not done.stderr
