"""What all tests of models share."""

import pytest
import torch
from torch.nn import functional


@pytest.fixture(autouse=True)
def float64_throughout(monkeypatch):
    """Attention written out takes its softmax in float32 in some models, whatever it is given."""
    softmax = functional.softmax

    def kept(input, dim=None, _stacklevel=3, dtype=None):
        return softmax(input, dim, dtype=None if input.dtype == torch.float64 else dtype)

    monkeypatch.setattr(functional, "softmax", kept)
