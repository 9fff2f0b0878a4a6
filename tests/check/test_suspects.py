"""The suspects of `check_hypergrad`: a list of questions, asked in order."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import torch

import hypergrad
from hypergrad import NotConnected, check_hypergrad
from hypergrad._check import report, suspects
from hypergrad._check.suspects import SUSPECTS, Suspect, Trial, When, first

D = torch.float64
THETA = torch.tensor([1.0, 2.0], dtype=D)


def outer(w, t):
    return (w**2).sum()


def inner(w, t):
    return ((w - t) ** 2).sum()


def check(outer=outer, inner=inner, solve=torch.clone, hparams=THETA, **options):
    return check_hypergrad(outer, inner, solve, hparams, **options)


# The list


@pytest.mark.parametrize("suspect", SUSPECTS, ids=lambda suspect: suspect.question)
def test_a_suspect_has_a_name_that_is_documented_and_a_question(suspect):
    assert suspect.question.endswith("?")
    assert suspect.when
    page = Path(__file__).parents[2] / "docs" / "checking.md"
    assert f"| `{suspect.name}` |" in page.read_text()
    documented = re.sub(r"\s+", " ", hypergrad.Report.__doc__)
    assert f'``"{suspect.name}"``' in documented


def test_every_part_that_is_documented_is_a_suspect():
    documented = re.findall(r'``"([\w ]+)"``', re.sub(r"\s+", " ", hypergrad.Report.__doc__))
    assert set(documented) == {suspect.name for suspect in SUSPECTS}


def test_one_question_is_asked_once_at_each_point():
    for when in When:
        asked = [suspect.question for suspect in SUSPECTS if when in suspect.when]
        assert len(asked) == len(set(asked))


def test_they_are_asked_in_order_until_one_is_at_fault(monkeypatch):
    asked = []

    def look(name, evidence):
        return lambda trial: asked.append(name) or evidence

    listed = [
        Suspect("a", "A?", When.APART, look("a", None)),
        Suspect("b", "B?", When.FIRST, look("b", "never")),
        Suspect("c", "C?", When.FIRST | When.APART, look("c", "seen")),
        Suspect("d", "D?", When.APART, look("d", "never")),
    ]
    monkeypatch.setattr(suspects, "SUSPECTS", tuple(listed))
    finding = first(When.APART, Trial(None, None))
    assert asked == ["a", "c"]
    assert (finding.suspect.name, finding.evidence) == ("c", "seen")
    assert first(When.ALWAYS, Trial(None, None)) is None


def test_a_new_suspect_is_one_entry(monkeypatch):
    def look(trial):
        return "hparams is two." if trial.case.tree.variables[0].numel() == 2 else None

    one = Suspect("two numbers", "Is hparams another number than two?", When.ALWAYS, look)
    monkeypatch.setattr(suspects, "SUSPECTS", (*SUSPECTS, one))
    outcome = check()
    assert (outcome.ok, outcome.blame, outcome.question) == (False, one.name, one.question)
    assert outcome.reason == "hparams is two."
    assert check(hparams=THETA[:1].clone()).ok


def test_suspects_and_findings_are_values():
    for suspect in SUSPECTS:
        assert dataclasses.replace(suspect) == suspect
        with pytest.raises(dataclasses.FrozenInstanceError):
            suspect.name = "other"


# The report


def test_the_report_prints_the_question_and_the_evidence():
    outcome = check(inner=lambda w, t: ((w - THETA) ** 2).sum())
    assert outcome.blame == "hyperparameter not connected"
    assert outcome.question in [suspect.question for suspect in SUSPECTS]
    lines = str(outcome).splitlines()
    assert lines[0] == "hypergradient: WRONG, hyperparameter not connected"
    assert lines[1] == f"{outcome.question} No:"
    assert " ".join(lines[2:]).startswith(outcome.reason)


def test_a_report_without_a_fault_asks_nothing():
    outcome = check()
    assert (outcome.ok, outcome.blame, outcome.question, outcome.reason) == (True, None, None, "")
    assert "No:" not in str(outcome)


def test_a_report_is_made_as_before():
    names = [field.name for field in dataclasses.fields(report.Report)]
    assert names[-1] == "question"
    assert dataclasses.fields(report.Report)[-1].default is None


def test_a_check_that_ends_early_has_the_evidence_that_there_was():
    assert check(outer=lambda w, t: (t**2).sum()).info is None
    outcome = check(outer=lambda w, t: (w - 3).log().sum())
    assert outcome.blame == "not finite"
    assert outcome.info is not None


# It does not read the library's own text


@pytest.mark.parametrize("argument", ["hparams", "params", None])
@pytest.mark.parametrize("words", ["hparams are not used", "params are not used", ""])
def test_the_part_that_is_not_connected_is_that_of_the_error(argument, words):
    def refusing(w, t):
        if w.requires_grad:
            raise NotConnected(words, argument=argument)
        return inner(w, t)

    outcome = check(inner=hypergrad.Root(refusing))
    part = "hyperparameter" if argument == "hparams" else "params"
    assert (outcome.blame, outcome.reason) == (f"{part} not connected", words)


def test_a_leaf_that_is_reached_past_the_arguments():
    theta = THETA.clone().requires_grad_()
    outcome = check(inner=lambda w, t: ((w - theta) ** 2).sum(), hparams=theta)
    assert outcome.blame == "hyperparameter not connected"
