"""What the README, the API reference and the pages promise."""

import doctest
import functools
import re
from pathlib import Path
from urllib.parse import unquote

import pytest
import torch

import hypergrad
from hypergrad import inner, projections, prox

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PUBLIC = {
    **{f"hypergrad.{name}": getattr(hypergrad, name) for name in hypergrad.__all__},
    **{
        f"{module.__name__}.{name}": getattr(module, name)
        for module in (inner, prox, projections)
        for name in module.__all__
    },
}
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md"), *ROOT.glob("examples/**/*.md")])


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
    directive = r"^\.\. auto(?:class|exception|function):: ([\w.]+)$"
    listed = re.findall(directive, (DOCS / "api.md").read_text(), re.MULTILINE)
    full = [name if name.startswith("hypergrad.") else f"hypergrad.{name}" for name in listed]
    assert sorted(full) == sorted(PUBLIC)


@pytest.mark.parametrize("name", PUBLIC)
def test_every_public_name_has_an_example(name):
    assert doctest.DocTestParser().get_examples(PUBLIC[name].__doc__ or ""), name
