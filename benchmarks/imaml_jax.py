"""The meta-step of implicit MAML by jax, jit and vmap: ``python -m benchmarks.imaml_jax``.

It needs a process of its own, since the thread pool of XLA would disturb the others. On one core;
torch's gradient is timed beside it, so that there is one unit for all, and so is the batched step
that is written by hand with torch, which both processes run. Networks, data and starting points
are those of `imaml.py`; nothing is checked.
"""

import dataclasses
import json
import os
import sys
import time

os.environ["XLA_FLAGS"] = "--xla_cpu_multi_thread_eigen=false"
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})

import jax
import jax.numpy as jnp
import torch
from jax import lax

from benchmarks.imaml import CG_STEPS, MetaStep
from benchmarks.imaml_sides import by_hand_batched
from benchmarks.timing import in_units, seconds

EPS = 1e-5  # of batch normalisation


def sinusoid_outputs(params, x):
    """`SinusoidMLP`: two hidden layers with ReLU."""
    for layer in ("0", "2"):
        x = jax.nn.relu(x @ params[f"{layer}.weight"].T + params[f"{layer}.bias"])
    return x @ params["4.weight"].T + params["4.bias"]


def omniglot_outputs(params, images):
    """`OmniglotConvNet`: four strided convolutions with batch statistics, and a linear head."""
    x = _first_block(params, images)
    for block in range(3):
        x = _strided(x, params[f"rest.{block}.0.weight"])
        scale, shift = params[f"rest.{block}.1.weight"], params[f"rest.{block}.1.bias"]
        mean, variance = x.mean((0, 2, 3)), x.var((0, 2, 3))
        scale = scale / jnp.sqrt(variance + EPS)
        x = jax.nn.relu(x * _channels(scale) + _channels(shift - scale * mean))
    return x.reshape(len(x), -1) @ params["head.weight"].T + params["head.bias"]


def _first_block(params, images):
    """`InputBlock`, whose statistics are those of the patches."""
    filters = params["first.filters"]
    patches = lax.conv_general_dilated_patches(images, (3, 3), (2, 2), ((1, 1), (1, 1)))
    patches = patches.swapaxes(0, 1).reshape(9, -1)
    mean = patches.mean(1)
    centred = patches - mean[:, None]
    flat = filters.reshape(len(filters), 9)
    variance = ((flat @ (centred @ centred.T / patches.shape[1])) * flat).sum(1)
    scale = params["first.weight"] / jnp.sqrt(variance + EPS)
    shift = params["first.bias"] - scale * (flat @ mean)
    scaled = filters * scale[:, None, None, None]
    return jax.nn.relu(_strided(images, scaled) + _channels(shift))


def _strided(x, filters):
    return lax.conv_general_dilated(x, filters, (2, 2), ((1, 1), (1, 1)))


def _channels(values):
    return values[:, None, None]


def squared_error(outputs, y):
    return ((outputs - y) ** 2).mean()


def cross_entropy(outputs, y):
    return -jnp.take_along_axis(jax.nn.log_softmax(outputs), y[:, None], 1).mean()


NETWORKS = {
    "sinusoid": (MetaStep.sinusoid, sinusoid_outputs, squared_error),
    "omniglot": (MetaStep.omniglot, omniglot_outputs, cross_entropy),
}


def meta_gradient(step, outputs, loss):
    """Make the meta-gradient of a batch of tasks as one function under jit."""

    def training_loss(params, x, y):
        return loss(outputs(params, x), y)

    def task_gradient(meta, task):
        support_x, support_y, query_x, query_y = task

        def slope(params):
            found = jax.grad(training_loss)(params, support_x, support_y)
            return jax.tree.map(lambda g, p, m: g + step.lam * (p - m), found, params, meta)

        def down(_, params):
            return jax.tree.map(lambda p, g: p - step.lr * g, params, slope(params))

        params = lax.fori_loop(0, step.steps, down, meta)
        b = jax.grad(training_loss)(params, query_x, query_y)
        _, product = jax.linearize(slope, params)
        return jax.tree.map(lambda u: step.lam * u, _conjugate_gradients(product, b))

    def average(meta, tasks):
        found = jax.vmap(task_gradient, in_axes=(None, 0))(meta, tasks)
        return jax.tree.map(lambda leaf: leaf.mean(0), found)

    return jax.jit(average), jax.jit(jax.grad(training_loss))


def _conjugate_gradients(product, b):
    def dot(a, b):
        return sum(jax.tree.leaves(jax.tree.map(jnp.vdot, a, b)))

    def along(a, s, b):
        return jax.tree.map(lambda a, b: a + s * b, a, b)

    def iterate(_, state):
        x, r, p, rr = state
        Ap = product(p)
        alpha = rr / dot(p, Ap)
        x, r = along(x, alpha, p), along(r, -alpha, Ap)
        rr_new = dot(r, r)
        return x, r, along(r, rr_new / rr, p), rr_new

    zeros = jax.tree.map(jnp.zeros_like, b)
    return lax.fori_loop(0, CG_STEPS, iterate, (zeros, b, b, dot(b, b)))[0]


def _given(step):
    """Hand the starting point and the tasks over."""
    meta = {name: jnp.array(leaf.numpy()) for name, leaf in step.meta.items()}
    return meta, tuple(jnp.array(part.numpy()) for part in step.tasks)


def _flat(gradient, names):
    leaves = jax.device_get([gradient[name] for name in names])
    return torch.cat([torch.tensor(leaf).reshape(-1) for leaf in leaves])


def main(kind: str, tasks: int, steps: int, rounds: int) -> None:
    """Measure, and print one line of JSON."""
    torch.set_num_threads(1)
    jax.config.update("jax_enable_x64", True)
    make, outputs, loss = NETWORKS[kind]
    step = make(tasks, steps)
    jitted, of_one = meta_gradient(step, outputs, loss)
    meta, given = _given(step)
    begin = time.perf_counter()
    jax.block_until_ready(jitted(meta, given))
    compilation = time.perf_counter() - begin
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in step.meta.items()}
    task, x, y = step.task(0), given[0][0], given[1][0]

    def gradient():
        value = step.training_loss(leaves, task.support_x, task.support_y)
        torch.autograd.grad(value, list(leaves.values()))

    found = seconds(
        {
            "torch": gradient,
            "jax": lambda: jax.block_until_ready(of_one(meta, x, y)),
            "by hand": lambda: by_hand_batched(step),
            "step": lambda: jax.block_until_ready(jitted(meta, given)),
        },
        rounds=rounds,
        warm_up=1,
    )
    parts = {"step": len(step), "by hand": len(step)}
    of_torch, of_jax = in_units(found, "torch", parts), in_units(found, "jax", parts)
    figures = {
        "jax under jit and vmap, own process": of_torch["step"],
        "jax under jit and vmap, in gradients of jax": of_jax["step"],
        "by hand, batched, in the process of jax": of_torch["by hand"],
    }
    # As the others: all tasks, in float64, where no unit changes sides by rounding.
    answer = _flat(jitted(*_given(step.in_float64())), step.meta)
    exact = step.exact()
    print(
        json.dumps({
            "figures": {name: dataclasses.asdict(figure) for name, figure in figures.items()},
            "error": ((answer - exact).norm() / exact.norm()).item(),
            "compilation": compilation,
        })
    )


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
