"""The stochastic methods for bilevel problems in jax: ``python -m benchmarks.bilevel_jax``.

As benchmark_bilevel runs its solvers: whole epochs of steps under jit, each a scan. The methods are
written here from their papers. It needs a process of its own, since the thread pool of XLA would
disturb the others; `benchmarks.bilevel_peers` starts it and sets ours beside it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

if __name__ == "__main__":  # one thread on one core, which jax must find when it is imported
    os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import torch
from torch import Tensor

from benchmarks import bilevel_grid as grid
from benchmarks.bilevel_problems import Problem

Array = Any
State = dict[str, Array]
Draw = Callable[[Array], Any]  # a key -> a batch
Advance = Callable[[], Array]


class Setting(NamedTuple):
    """A problem in jax, and the rates of a run.

    `draws` and `batches` are for the inner and the outer level; `rho` and `gamma` the rates.
    """

    inner: Callable[..., Array]
    outer: Callable[..., Array]
    draws: tuple[Draw, Draw]
    batches: tuple[Any, Any]
    rho: float
    gamma: float

    def counts(self) -> tuple[int, int]:
        """How many batches there are on each level."""
        inner, outer = (jax.tree.leaves(level)[0].shape[0] for level in self.batches)
        return inner, outer


class Side(NamedTuple):
    """A method: what it remembers at the start, and its step from ``(state, k, key)``."""

    start: Callable[[Setting, State], State]
    step: Callable[[Setting, State, Array, Array], State]


# --- losses ---------------------------------------------------------------------------------


def _quadratic(z: Array, h: Array, batch: Any) -> Array:
    x, y, a, b, c, d = batch
    curved = jnp.square(x @ z).mean() / 2 + jnp.square(y @ h).mean() / 2
    return curved + ((a @ h) * (b @ z)).mean() + (c @ z).mean() + (d @ h).mean()


def _binary(w: Array, batch: Any) -> Array:
    logits = batch[0] @ w
    return (jnp.logaddexp(0.0, logits) - batch[1] * logits).mean()


def _each(w: Array, batch: Any) -> Array:
    logits = batch[0] @ w
    taken = jnp.take_along_axis(logits, batch[1][:, None], axis=1)[:, 0]
    return jax.nn.logsumexp(logits, axis=1) - taken


def _cleaning(w: Array, h: Array, batch: Any) -> Array:
    weights = jax.nn.sigmoid(h[batch[2]])
    return (weights * _each(w, batch)).mean() + 0.05 * jnp.square(w).sum()


def _penalised(w: Array, h: Array, batch: Any) -> Array:
    return _binary(w, batch) + (1.5 * jax.nn.sigmoid(h) * jnp.square(w)).sum() / 2


LOSSES: dict[str, tuple[Callable[..., Array], Callable[..., Array]]] = {
    "quadratic": (_quadratic, _quadratic),
    "cleaning": (_cleaning, lambda w, h, batch: _each(w, batch).mean()),
    "penalties": (_penalised, lambda w, h, batch: _binary(w, batch)),
}


# --- derivatives ----------------------------------------------------------------------------


def _products(s: Setting, z: Array, x: Array, u: Array, batch: Any) -> tuple[Array, Array, Array]:
    """The inner gradient, the product with the Hessian, and the cross derivative."""
    slope = jax.grad(s.inner)
    gradient, pull = jax.vjp(lambda z, x: slope(z, x, batch), z, x)
    return gradient, *pull(u)


def _outer(s: Setting, z: Array, x: Array, batch: Any) -> tuple[Array, Array]:
    by_z, by_x = jax.grad(s.outer, argnums=(0, 1))(z, x, batch)
    return by_z, by_x


def _at(s: Setting, point: tuple[Array, Array, Array], i: Any, j: Any) -> tuple[Array, ...]:
    """The directions of z, u and x on one batch of each level."""
    z, x, u = point
    gradient, product, cross = _products(s, z, x, u, i)
    by_z, by_x = _outer(s, z, x, j)
    return gradient, product - by_z, by_x - cross


def _product(s: Setting, z: Array, x: Array, u: Array, batch: Any) -> Array:
    slope = jax.grad(s.inner)
    return jax.vjp(lambda z: slope(z, x, batch), z)[1](u)[0]


def _cross(s: Setting, z: Array, x: Array, u: Array, batch: Any) -> Array:
    slope = jax.grad(s.inner)
    return jax.vjp(lambda x: slope(z, x, batch), x)[1](u)[0]


def _point(state: State) -> tuple[Array, Array, Array]:
    return state["z"], state["x"], state["u"]


# --- methods --------------------------------------------------------------------------------


def _nothing(s: Setting, state: State) -> State:
    return state


def _moved(s: Setting, state: State, d: tuple[Array, ...], inner: Any, outer: Any) -> State:
    z, x, u = _point(state)
    rho, gamma = s.rho * inner, s.gamma * outer
    return {**state, "z": z - rho * d[0], "u": u - rho * d[1], "x": x - gamma * d[2]}


def _soba(decays: tuple[float, float], s: Setting, state: State, k: Array, key: Array) -> State:
    i, j = _drawn(s, key)
    after = k + 1.0
    return _moved(s, state, _at(s, _point(state), i, j), *(after**-d for d in decays))


def _masoba(theta: float, s: Setting, state: State, k: Array, key: Array) -> State:
    dz, du, dx = _at(s, _point(state), *_drawn(s, key))
    h = state["h"]
    moved = _moved(s, state, (dz, du, h), 1.0, 1.0)
    return {**moved, "h": (1 - theta) * h + theta * dx}


def _with_average(s: Setting, state: State) -> State:
    return {**state, "h": jnp.zeros_like(state["x"])}


def _saba_rows(s: Setting, state: State, i: Any, j: Any) -> tuple[tuple[Array, ...], ...]:
    inner = _products(s, *_point(state), i)
    return inner, _outer(s, state["z"], state["x"], j)


def _saba_start(s: Setting, state: State) -> State:
    def rows(batches: tuple[Any, Any]) -> tuple[Any, Any]:
        z, x, u = _point(state)
        inner = jax.lax.map(lambda i: _products(s, z, x, u, i), batches[0])
        outer = jax.lax.map(lambda j: _outer(s, z, x, j), batches[1])
        return inner, outer

    memory = jax.jit(rows)(s.batches)
    means = jax.tree.map(lambda table: table.mean(0), memory)
    return {**state, "memory": memory, "means": means}


def _saba(s: Setting, state: State, k: Array, key: Array) -> State:
    places = _places(s, key)
    i, j = (_taken(batches, at) for batches, at in zip(s.batches, places, strict=True))
    now = _saba_rows(s, state, i, j)
    memory, means, reduced = [], [], []
    for level, at in enumerate(places):
        tables, mean = state["memory"][level], state["means"][level]
        change = [new - table[at] for new, table in zip(now[level], tables, strict=True)]
        reduced.append([c + m for c, m in zip(change, mean, strict=True)])
        memory.append(
            tuple(table.at[at].set(new) for new, table in zip(now[level], tables, strict=True))
        )
        means.append(tuple(m + c / len(t) for m, c, t in zip(mean, change, tables, strict=True)))
    (dz, product, cross), (by_z, by_x) = reduced
    moved = _moved(s, state, (dz, product - by_z, by_x - cross), 1.0, 1.0)
    return {**moved, "memory": tuple(memory), "means": tuple(means)}


def _srba_start(s: Setting, state: State) -> State:
    z, x, u = _point(state)
    zeros = tuple(map(jnp.zeros_like, (z, u, x)))
    return {**state, "before": (z, x, u), "d": zeros}


def _srba(s: Setting, state: State, k: Array, key: Array) -> State:
    n, m = s.counts()

    def whole() -> tuple[Array, ...]:
        z, x, u = _point(state)
        inner = jax.lax.map(lambda i: _products(s, z, x, u, i), s.batches[0])
        outer = jax.lax.map(lambda j: _outer(s, z, x, j), s.batches[1])
        gradient, product, cross = (rows.mean(0) for rows in inner)
        by_z, by_x = (rows.mean(0) for rows in outer)
        return gradient, product - by_z, by_x - cross

    def followed() -> tuple[Array, ...]:
        batches = _drawn(s, key)
        now, then = _at(s, _point(state), *batches), _at(s, state["before"], *batches)
        return tuple(d + (a - b) for d, a, b in zip(state["d"], now, then, strict=True))

    d = jax.lax.cond(k % (n + m) == 0, whole, followed)
    return {**_moved(s, state, d, 1.0, 1.0), "before": _point(state), "d": d}


def _fsla_start(s: Setting, state: State) -> State:
    return {**state, "d": jnp.zeros_like(state["x"]), "last": state["x"]}


def _fsla(
    eta: float, decays: tuple[float, float], s: Setting, state: State, k: Array, key: Array
) -> State:
    z, x, u = _point(state)
    inner, outer = ((k + 1.0) ** -d for d in decays)
    keys = jax.random.split(key, 5)
    new_z = z - s.rho * inner * jax.grad(s.inner)(z, x, s.draws[0](keys[0]))
    by_z, _ = _outer(s, new_z, x, s.draws[1](keys[1]))
    new_u = u - s.rho * inner * (_product(s, new_z, x, u, s.draws[0](keys[2])) - by_z)
    i, j = s.draws[0](keys[3]), s.draws[1](keys[4])

    def direction(z: Array, x: Array, u: Array) -> Array:
        return jax.grad(s.outer, argnums=1)(z, x, j) - _cross(s, z, x, u, i)

    kept = jnp.where(k == 0, 0.0, 1 - eta * outer)
    d = direction(new_z, x, new_u) + kept * (state["d"] - direction(z, state["last"], u))
    moved = {"z": new_z, "u": new_u, "x": x - s.gamma * outer * d}
    return {**state, **moved, "d": d, "last": x}


def _inner_steps(s: Setting, z: Array, x: Array, count: int, key: Array) -> Array:
    def one(z: Array, key: Array) -> tuple[Array, None]:
        return z - s.rho * jax.grad(s.inner)(z, x, s.draws[0](key)), None

    return jax.lax.scan(one, z, jax.random.split(key, count))[0]


def _amigo(steps: int, s: Setting, state: State, k: Array, key: Array) -> State:
    z, x, u = _point(state)
    keys = jax.random.split(key, 4)
    z = _inner_steps(s, z, x, steps, keys[0])
    by_z, by_x = _outer(s, z, x, s.draws[1](keys[1]))

    def one(u: Array, key: Array) -> tuple[Array, None]:
        return u - s.rho * (_product(s, z, x, u, s.draws[0](key)) - by_z), None

    u = jax.lax.scan(one, u, jax.random.split(keys[2], steps))[0]
    x = x - s.gamma * (by_x - _cross(s, z, x, u, s.draws[0](keys[3])))
    return {**state, "z": z, "x": x, "u": u}


def _stocbio(steps: int, terms: int, s: Setting, state: State, k: Array, key: Array) -> State:
    z, x, _ = _point(state)
    keys = jax.random.split(key, 4)
    z = _inner_steps(s, z, x, steps, keys[0])
    by_z, by_x = _outer(s, z, x, s.draws[1](keys[1]))

    def one(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        total, term = carry
        term = term - s.rho * _product(s, z, x, term, s.draws[0](key))
        return (total + term, term), None

    (total, _), _ = jax.lax.scan(one, (by_z, by_z), jax.random.split(keys[2], terms))
    x = x - s.gamma * (by_x - _cross(s, z, x, s.rho * total, s.draws[0](keys[3])))
    return {**state, "z": z, "x": x}


def _f2sa_start(s: Setting, state: State) -> State:
    return {**state, "y": state["z"]}


def _f2sa(
    penalty: float, growth: float, steps: int, s: Setting, state: State, k: Array, key: Array
) -> State:
    x, lam, after = state["x"], penalty * (k + 1.0) ** growth, k + 1.0
    keys = jax.random.split(key, 4)
    slope = jax.grad(s.inner)

    def one(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], None]:
        z, y = carry
        first, second, third = jax.random.split(key, 3)
        z = z - s.rho * slope(z, x, s.draws[0](first))
        by_y, _ = _outer(s, y, x, s.draws[1](third))
        y = y - s.rho / 2 * (slope(y, x, s.draws[0](second)) + by_y / lam)
        return (z, y), None

    (z, y), _ = jax.lax.scan(one, (state["z"], state["y"]), jax.random.split(keys[0], steps))
    by_x = jax.grad(s.inner, argnums=1)
    penalised = by_x(y, x, s.draws[0](keys[1])) - by_x(z, x, s.draws[0](keys[2]))
    d = _outer(s, y, x, s.draws[1](keys[3]))[1] + lam * penalised
    return {**state, "z": z, "y": y, "x": x - s.gamma * after**-growth * d}


SIDES = {
    "SOBA": Side(_nothing, partial(_soba, grid.DECAYS)),
    "MASOBA": Side(_with_average, partial(_masoba, grid.THETA)),
    "SABA": Side(_saba_start, _saba),
    "SRBA": Side(_srba_start, _srba),
    "FSLA": Side(_fsla_start, partial(_fsla, grid.ETA, grid.DECAYS)),
    "AmIGO": Side(_nothing, partial(_amigo, grid.STEPS)),
    "StocBiO": Side(_nothing, partial(_stocbio, grid.STEPS, grid.TERMS)),
    "F2SA": Side(_f2sa_start, partial(_f2sa, grid.PENALTY, grid.GROWTH, grid.STEPS)),
    "SOBA, whole data": Side(_nothing, partial(_soba, (0.0, 0.0))),
    "AmIGO, whole data": Side(_nothing, partial(_amigo, grid.STEPS)),
}
assert [*SIDES] == [*grid.METHODS]


# --- batches --------------------------------------------------------------------------------


def _taken(batches: Any, place: Array) -> Any:
    return jax.tree.map(lambda t: jax.lax.dynamic_index_in_dim(t, place, keepdims=False), batches)


def _places(s: Setting, key: Array) -> list[Array]:
    keys = jax.random.split(key)
    return [jax.random.randint(k, (), 0, count) for k, count in zip(keys, s.counts(), strict=True)]


def _drawn(s: Setting, key: Array) -> tuple[Any, ...]:
    keys = jax.random.split(key)
    return tuple(draw(k) for draw, k in zip(s.draws, keys, strict=True))


def _drawing(batches: Any) -> Draw:
    count = jax.tree.leaves(batches)[0].shape[0]
    if count == 1:
        return lambda key: jax.tree.map(lambda t: t[0], batches)
    return lambda key: _taken(batches, jax.random.randint(key, (), 0, count))


def _stacked(batches: list[tuple[Tensor, ...]]) -> Any:
    return tuple(jnp.array(torch.stack(parts).numpy()) for parts in zip(*batches, strict=True))


def setting(name: str, problem: Problem, rates: grid.Rates, whole: bool) -> Setting:
    """A problem in jax, in float32, with a side's rates."""
    single = problem.to(torch.float32)
    levels = [
        _stacked([getattr(single, data)] if whole else single.batches(level))
        for level, data in (("inner", "train"), ("outer", "validation"))
    ]
    draws = _drawing(levels[0]), _drawing(levels[1])
    return Setting(*LOSSES[name], draws, (levels[0], levels[1]), rates.inner, rates.outer)


def epochs(s: Setting, side: str, problem: Problem, steps: int, seed: int = 0) -> Advance:
    """A run, compiled: each call makes an epoch of steps and returns the hyperparameters."""
    single = problem.to(torch.float32)
    method = SIDES[side]

    def step(carry: tuple[State, Array], k: Array) -> tuple[tuple[State, Array], None]:
        state, key = carry
        key, now = jax.random.split(key)
        return (method.step(s, state, k, now), key), None

    @jax.jit
    def start(z: Array, x: Array) -> State:
        return method.start(s, {"z": z, "x": x, "u": jnp.zeros_like(z)})

    @jax.jit
    def epoch(state: State, key: Array, first: Array) -> tuple[State, Array]:
        return jax.lax.scan(step, (state, key), first + jnp.arange(steps))[0]

    variables = jnp.array(single.params.numpy()), jnp.array(single.hparams.numpy())
    key, done = jax.random.PRNGKey(seed), 0
    state: State | None = None
    jax.block_until_ready(epoch(start(*variables), key, jnp.array(0)))

    def advance() -> Array:
        nonlocal state, key, done
        if state is None:
            state = start(*variables)
        state, key = epoch(state, key, jnp.array(done))
        done += steps
        return state["x"].block_until_ready()

    return advance


def tensor(hparams: Array) -> Tensor:
    """The hyperparameters for torch."""
    return torch.tensor(jax.device_get(hparams))


def main(seconds: float, names: list[str]) -> None:
    """Run every method with every rate on the problems, and print one line of JSON."""
    torch.set_num_threads(1)
    curves: dict[str, list[tuple[str, float, grid.Curve]]] = {}
    for name in names:
        problem = grid.PROBLEMS[name]()
        curves[name] = []
        for side, rates in grid.runs(name):
            whole = side in grid.WHOLE
            s = setting(name, problem, rates, whole)
            advance = epochs(s, side, problem, grid.EPOCH[whole])
            points = grid.curve(problem, advance, seconds, tensor)
            curves[name].append((side, rates.outer, points))
            jax.clear_caches()
    print(json.dumps(curves))


if __name__ == "__main__":
    main(float(sys.argv[1]), sys.argv[2:])
