"""Hooks on modules are there while a function is evaluated, and gone afterwards."""

from __future__ import annotations

from torch import nn

from tests.stateful_modules import Counts, answer


def test_the_hooks_on_modules_are_there_for_an_evaluation_alone():
    hooks = nn.modules.module._global_forward_pre_hooks
    asked = nn.modules.module._has_any_global_hook
    there = []
    answer(Counts(), lambda p, x: there.append(len(hooks)) or (x @ p["linear.weight"].T))
    assert max(there) == 1
    assert not hooks
    assert nn.modules.module._has_any_global_hook is asked
