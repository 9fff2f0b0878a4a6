"""Hypergradients of models that people train, against double backward by hand in float64.

Run by `make test-models`. Every model is a configuration of `transformers` with random weights, so
that nothing is loaded; the reference runs the same weights with attention written out ("eager").
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from tests_models import reference
from tests_models.architectures import ADAPTED, MODELS, Task, adapted, build, chosen

# peft asks transformers by a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

SOLVER = hypergrad.CG(maxiter=1000, rtol=1e-11)


def task_of(name, which, **further):
    model = build(name, **further)
    if which == "lora":
        model, params = adapted(model, name)
    else:
        params = chosen(model, name, which)
    labels = "next" if name.startswith(("gpt2", "llama")) else "class"
    return Task(model, params, labels, images=name == "vit")


def solved(task, of="{}"):
    """The inner solution, and the hypergradient by hand, under the kernel that allows it."""
    inner, outer = getattr(task, of.format("inner")), getattr(task, of.format("outer"))
    with sdpa_kernel(SDPBackend.MATH):
        params = reference.minimised(inner, task.params, task.hparams)
        return params, reference.hypergradient(outer, inner, params, task.hparams)


CASES = [
    (name, which)
    for name in MODELS
    for which in ("all", "head", "lora")
    if which != "lora" or name in ADAPTED
    if (name, which) != ("gpt2-tied", "lora")
]


@pytest.mark.parametrize("attention", [None, "eager"], ids=["default", "eager"])
@pytest.mark.parametrize(("name", "which"), CASES)
def test_the_hypergradient_is_that_by_hand(name, which, attention):
    task = task_of(name, which, attention=attention)
    params, expected = solved(task)
    found, info = hypergrad.implicit_grad(
        task.outer, task.inner, params, task.hparams, solver=SOLVER, on_failure="raise",
        return_info=True,
    )  # fmt: skip
    error = reference.relative_error(found, expected)
    print(f"{name} {which} {attention or 'default'}: {error:.1e}, {len(params)} tensors")
    assert info.success
    assert error <= 1e-8


@pytest.mark.parametrize("name", MODELS)
def test_the_hypergradient_is_that_of_differences(name):
    task = task_of(name, "all")
    params, _ = solved(task)
    found = hypergrad.implicit_grad(task.outer, task.inner, params, task.hparams, solver=SOLVER)
    generator = torch.Generator().manual_seed(5)
    along = {
        k: torch.randn(v.shape, generator=generator, dtype=v.dtype) for k, v in task.hparams.items()
    }
    step, values = 2e-4, []
    for sign in (1, -1):
        moved = {k: v + sign * step * along[k] for k, v in task.hparams.items()}
        with sdpa_kernel(SDPBackend.MATH):
            values.append(task.outer(reference.minimised(task.inner, params, moved), moved))
    difference = (values[0] - values[1]) / (2 * step)
    slope = sum((found[k] * along[k]).sum() for k in found)
    torch.testing.assert_close(slope, difference, rtol=1e-5, atol=0)
