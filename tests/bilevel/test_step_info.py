"""What one step leaves behind, as one line."""

from __future__ import annotations

import pytest

import hypergrad
from hypergrad import HOAG
from tests.bilevel_quadratic import Quadratic, loop


def test_a_record_says_its_figures_in_one_line():
    record = loop(Quadratic(), HOAG()).step()
    text = str(record)
    assert text.startswith("step 1: outer value ")
    assert f"after {record.inner_steps} inner steps, tolerance {record.tolerance:.1e}; " in text
    assert text.endswith(str(record.info))
    assert "\n" not in text
    assert "grads=float64[3]" in repr(record)


def test_a_record_counts_the_warnings_of_the_run():
    bilevel = loop(Quadratic(), HOAG(max_inner_steps=1))
    with pytest.warns(hypergrad.ConvergenceWarning):
        bilevel.step()
    record = bilevel.step()
    ((kind, count),) = record.warned.items()
    assert count == 2
    assert str(record).endswith(f"; warned of: {kind} (2)")
