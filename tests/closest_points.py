"""The proof that a point is the closest of its set, by a linear program."""

from __future__ import annotations

from scipy.optimize import linprog


def gap(v, x, scale, **constraints):
    """How much further than x a point of the set lies in the direction v - x: 0 for the closest."""
    away = ((v - x) / scale).reshape(-1)
    furthest = linprog(-away.numpy(), **constraints)
    assert furthest.status == 0
    return -furthest.fun - float(away @ x.reshape(-1) / scale)
