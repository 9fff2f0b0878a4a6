"""What an inner solver says about its answer."""

from __future__ import annotations

import pytest
import torch
from torch.func import vmap
from torch.utils import _pytree as pytree

from hypergrad import inner_solvers
from hypergrad.inner_solvers import LBFGS
from tests.problems import F64, bowl

# torch.func.jvp compiles its formulas with torch.jit when it is first used.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated")


def test_the_info_is_a_pytree_and_reads_well():
    _, info = LBFGS()(bowl, torch.zeros(12, dtype=F64), 1.0)
    assert all(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(info))
    assert str(info).startswith("LBFGS: CONVERGED after")
    _, info = vmap(lambda c: LBFGS()(bowl, torch.zeros(12, dtype=F64), c))(torch.arange(3.0))
    assert str(info).startswith("LBFGS, 3 tasks: 3 CONVERGED; at most")
    assert isinstance(info, inner_solvers.InnerInfo)
