"""What the README and the API reference promise."""

import re
from pathlib import Path

import torch

import hypergrad

ROOT = Path(__file__).parent.parent


def test_the_readme_example_gives_the_hypergradient():
    torch.manual_seed(0)
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    names = {}
    exec(program, names)

    def value(log_decay):
        x, y = names["x"].double(), names["y"].double()
        matrix = x.T @ x / 80 + log_decay.double().exp() * torch.eye(30)
        w = torch.linalg.solve(matrix, x.T @ y / 80)
        return names["outer"](w.float(), log_decay)

    expected = torch.func.grad(value)(names["log_decay"])
    torch.testing.assert_close(names["gradient"], expected, rtol=1e-3, atol=0)


def test_the_reference_lists_every_public_name():
    directive = r"^\.\. auto(?:class|exception|function):: (\w+)$"
    listed = re.findall(directive, (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    public = [name for name in hypergrad.__all__ if not name.startswith("_")]
    assert sorted(listed) == sorted(public)
