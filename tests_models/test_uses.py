"""The same models as people use them: other outputs, dtypes, modes and loops."""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from tests_models import reference
from tests_models.test_transformers import SOLVER, pytestmark, solved, task_of

__all__ = ["pytestmark"]


# The loss of a causal model is computed in float32, whatever its logits are in.
@pytest.mark.parametrize(("name", "rtol"), [("gpt2-tied", 1e-6), ("bert", 1e-8)])
def test_the_loss_that_a_model_computes_itself(name, rtol):
    task = task_of(name, "all")
    scale = torch.tensor(1.5, dtype=torch.float64)
    task.hparams = {"scale": scale, "log_decay": task.hparams["log_decay"]}
    params, expected = solved(task, "{}_of_loss")
    found = hypergrad.implicit_grad(
        task.outer_of_loss, task.inner_of_loss, params, task.hparams,
        solver=hypergrad.CG(maxiter=1000, rtol=rtol / 100), on_failure="raise",
    )  # fmt: skip
    error = reference.relative_error(found, expected)
    print(f"{name} by its own loss: {error:.1e}")
    assert error <= rtol


def test_float32_is_right_to_its_own_rounding():
    task = task_of("gpt2", "all")
    params, expected = solved(task)

    def low(leaves):
        return {k: v.float() for k, v in leaves.items()}

    task.model.float()
    task.params, task.hparams = low(task.params), low(task.hparams)
    found = hypergrad.implicit_grad(task.outer, task.inner, low(params), task.hparams)
    error = reference.relative_error(found, expected)
    print(f"float32: {error:.1e}")
    assert error <= 1e-3


@pytest.mark.parametrize("in_attention", [0.0, 0.1], ids=["beside attention", "in attention too"])
def test_train_mode_with_dropout(in_attention):
    task = task_of("gpt2", "all", attn_pdrop=in_attention)
    task.model.train()
    torch.manual_seed(7)
    with sdpa_kernel(SDPBackend.MATH):
        expected = reference.hypergradient(task.outer, task.inner, task.params, task.hparams)
    after = torch.get_rng_state()
    torch.manual_seed(7)
    found = hypergrad.implicit_grad(
        task.outer, task.inner, task.params, task.hparams, solver=SOLVER, inner_tol=None
    )
    assert torch.equal(torch.get_rng_state(), after)
    assert reference.relative_error(found, expected) <= 1e-8


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")
@pytest.mark.parametrize("name", ["gpt2", "bert"])
def test_gradient_checkpointing(name):
    # The parameters are those of the module: see docs/reliability.md.
    task = task_of(name, "all", **_without_dropout(name))
    params, expected = solved(task)
    task.model.load_state_dict(params, strict=False)
    task.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    task.model.train()
    found = hypergrad.implicit_grad(
        task.outer, task.inner, params, task.hparams, solver=SOLVER, on_failure="raise"
    )
    assert reference.relative_error(found, expected) <= 1e-8


def _without_dropout(name):
    if name == "bert":
        return {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}


@pytest.mark.parametrize(("name", "which"), [("bert", "head"), ("gpt2", "lora")])
def test_three_steps_of_the_loop_lower_the_outer_loss(name, which):
    task = task_of(name, which)
    loop = hypergrad.Bilevel(
        task.outer,
        task.inner,
        task.params,
        task.hparams,
        inner_optimizer=lambda variables: torch.optim.SGD(variables, lr=2e-3),
        outer_optimizer=lambda variables: torch.optim.SGD(variables, lr=0.5),
        method=hypergrad.Alternating(
            inner_steps=30, solver=hypergrad.CG(maxiter=50), inner_tol=None
        ),
    )
    values = [float(loop.step().outer_value) for _ in range(3)]
    with torch.no_grad():
        values.append(float(task.outer(loop.params, loop.hparams)))
    assert values[-1] < values[0]
