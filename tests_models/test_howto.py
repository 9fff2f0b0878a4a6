"""The how-to of Hugging Face models prints what its page says."""

import contextlib
import io
import re
import runpy
from pathlib import Path

import pytest

from tests_models.test_transformers import pytestmark

__all__ = ["pytestmark"]
PAGE = Path(__file__).parents[1] / "examples/howto/hugging_face.py"


def figures(text):
    return [float(figure) for figure in re.findall(r"\b\d+(?:\.\d+)?\b", text)]


def test_the_page_prints_what_it_says():
    said = PAGE.read_text().partition(".. code-block:: none")[2]
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        runpy.run_path(str(PAGE))
    shown = figures(printed.getvalue())
    assert len(figures(said)) == 4
    assert shown == pytest.approx(figures(said), abs=0.1)
    for accuracy, without in (shown[:2], shown[2:]):
        assert accuracy > without + 0.05
