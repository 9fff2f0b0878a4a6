"""Several outputs, aux, argnums in any order, and leaves that are constants, in every entrance."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

import hypergrad
from hypergrad import custom_argmin, custom_fixed_point, custom_root, implicit_grad
from tests.quartic import D, close, leaf

AT, A, B = (torch.tensor(v, dtype=D) for v in ([0.5, 0.25], [1.0, 1.0], [1.0, 3.0]))


def bowl(p, n, nothing, mask, a, b):
    """Minimal at u = n a / (1 + b) and v = 2 u, two outputs; `mask` picks all."""
    u, v = p["u"], p["v"][0]
    assert nothing is None
    return (((u - n * a) ** 2 + b * u**2)[mask]).sum() + ((v - 2 * n * a) ** 2 + b * v**2).sum()


def slope(p, *args):
    g = grad(bowl)(p, *args)
    return {"u": g["u"], "v": (g["v"][0],)}


def descend(p, *args):
    g = slope(p, *args)
    return {"u": p["u"] - 0.1 * g["u"], "v": (p["v"][0] - 0.1 * g["v"][0],)}


def solved(init, n, nothing, mask, a, b):
    u = n * a / (1 + b)
    return {"u": u, "v": (2 * u,)}


DECORATED = {
    "custom_argmin": (custom_argmin, bowl),
    "custom_root": (custom_root, slope),
    "custom_fixed_point": (custom_fixed_point, descend),
}
CONSTANTS = (torch.tensor(3), None, torch.tensor([True, True]))
BY_A, BY_B = 3 / (1 + B), -3 * A / (1 + B) ** 2  # of u; twice that of v


@pytest.mark.parametrize("name", DECORATED)
@pytest.mark.parametrize("argnums", [None, 4, 5, (4, 5), (5, 4)])
def test_several_outputs_aux_argnums_and_constants_in_each_decorator(name, argnums):
    decorate, condition = DECORATED[name]

    @decorate(condition, argnums=argnums, has_aux=True)
    def fit(init, *args):
        answer = solved(init, *args)
        return answer, {"steps": 7, "square": answer["u"] ** 2}

    def value(a, b):
        answer, aux = fit(None, *CONSTANTS, a, b)
        assert aux["steps"] == 7
        # aux has no gradient: what depends on it is constant
        return answer["u"].sum() + 10 * answer["v"][0].sum() + 100 * aux["square"].sum()

    chosen = (4, 5) if argnums is None else argnums if isinstance(argnums, tuple) else (argnums,)
    want = [21 * g * (k in chosen) for g, k in ((BY_A, 4), (BY_B, 5))]
    close(grad(value, argnums=(0, 1))(A, B), tuple(want))
    a, b = leaf(A), leaf(B)
    close(fit(None, *CONSTANTS, a, b)[1]["square"], (3 * A / (1 + B)) ** 2)
    value(a, b).backward()
    close([torch.zeros(2, dtype=D) if t.grad is None else t.grad for t in (a, b)], want)
    close(
        vmap(grad(value, argnums=1))(torch.stack([A, A]), torch.stack([B, B])),
        torch.stack([want[1], want[1]]),
    )


@pytest.mark.parametrize("order", [(4, 5), (5, 4), 5, None])
def test_several_outputs_argnums_and_constants_in_the_bare_rules(order):
    params = solved(None, *CONSTANTS, A, B)
    cotangent = {"u": torch.ones(2, dtype=D), "v": (10 * torch.ones(2, dtype=D),)}
    found = hypergrad.root_vjp(slope, params, (*CONSTANTS, A, B), cotangent, argnums=order)
    both = {4: 21 * BY_A, 5: 21 * BY_B}
    if order is None:
        assert found[1] is None
        assert torch.equal(found[0], torch.tensor(0))
        assert not found[2].any()
        found, order = found[3:], (4, 5)
    close(found, both[order] if isinstance(order, int) else tuple(both[k] for k in order))
    tangents = {4: A, 5: B}
    given = tangents[order] if isinstance(order, int) else tuple(tangents[k] for k in order)
    moved = hypergrad.root_jvp(slope, params, (*CONSTANTS, A, B), given, argnums=order)
    along = {4: BY_A * A, 5: BY_B * B}
    want = along[order] if isinstance(order, int) else sum(along[k] for k in order)
    close(moved, {"u": want, "v": (2 * want,)})


def test_several_outputs_aux_and_constants_in_the_one_shot_calls():
    hparams = {"n": CONSTANTS[0], "none": None, "mask": CONSTANTS[2], "a": A, "b": B, "k": 2}

    def taken(h):
        return h["n"], h["none"], h["mask"], h["a"], h["b"]

    def outer(p, h):
        return p["u"].sum() + 10 * p["v"][0].sum() + h["k"] * h["a"].sum(), {
            "u": p["u"],
            "k": h["k"],
        }

    inside = lambda p, h: bowl(p, *taken(h))
    params = solved(None, *taken(hparams))
    hypergradient, aux = implicit_grad(outer, inside, params, hparams, has_aux=True)
    steps, more = hypergrad.unrolled_grad(
        outer, lambda p, h: descend(p, *taken(h)), params, hparams, steps=200, has_aux=True
    )
    at = {**hparams, "a": leaf(A), "b": leaf(B)}
    _, last = hypergrad.implicit_backward(outer, inside, params, at, has_aux=True)
    want = {"a": 21 * BY_A + 2, "b": 21 * BY_B}
    for grads in (hypergradient, steps):
        close({k: grads[k] for k in want}, want)
        assert (grads["none"], grads["k"]) == (None, 2)
        assert torch.equal(grads["n"], torch.tensor(0))
        assert not grads["mask"].any()
    close({k: at[k].grad for k in want}, want)
    for extra in (aux, more, last):
        assert extra["k"] == 2
        close(extra["u"], params["u"])
        assert not extra["u"].requires_grad
