"""Products by differences on transformers in float32, against exact ones and by hand in float64.

Run by `make test-models`.
"""

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import hypergrad
from tests_models import reference
from tests_models.architectures import Task, build, chosen

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

BUDGET = hypergrad.CG(maxiter=10)


def narrow(name, which="all"):
    """The task in float32, its inner solution, and the hypergradient in float64."""
    model = build(name)
    params = chosen(model, name, which)
    task = Task(model, params, "next" if name == "gpt2" else "class", images=name == "vit")
    with sdpa_kernel(SDPBackend.MATH):
        solution = reference.minimised(task.inner, params, task.hparams)
        truth = reference.hypergradient(task.outer, task.inner, solution, task.hparams)
    task.model.float()
    task.params = {k: v.float() for k, v in params.items()}
    task.hparams = {k: v.float() for k, v in task.hparams.items()}
    for batch in task.batches:
        batch.update({k: v.float() for k, v in batch.items() if v.is_floating_point()})
    return task, {k: v.float() for k, v in solution.items()}, truth


def by_differences(task, params, inner=None, **options):
    inner = hypergrad.Minimum(inner or task.inner, products="difference")
    return hypergrad.implicit_grad(
        task.outer, inner, params, task.hparams, solver=BUDGET, return_info=True, **options
    )


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_differences_in_float32_have_the_error_that_they_say(name):
    task, params, truth = narrow(name)
    with sdpa_kernel(SDPBackend.MATH):
        exact = hypergrad.implicit_grad(
            task.outer, task.inner, params, task.hparams, solver=BUDGET, on_failure="ignore"
        )
        answer, info = by_differences(task, params, on_failure="raise")
    apart = reference.relative_error(answer, {k: v.double() for k, v in exact.items()})
    error = reference.relative_error(answer, truth)
    print(
        f"{name}: {apart:.1e} from exact products, {error:.1e} from the truth; "
        f"estimate {info.error_estimate:.1e}, of products {info.product_error:.1e}"
    )
    assert info.success
    assert apart <= 1e-2
    assert max(apart, error) <= info.error_estimate <= 0.5


@pytest.mark.parametrize("name", ["gpt2", "bert", "vit"])
def test_a_fused_kernel_by_the_callers_choice_is_differenced(name):
    task, params, _ = narrow(name)
    for batch in task.batches:
        batch.pop("attention_mask", None)  # with which the flash kernel is not chosen
    with sdpa_kernel(SDPBackend.MATH):
        exact = hypergrad.implicit_grad(
            task.outer, task.inner, params, task.hparams, solver=BUDGET, on_failure="ignore"
        )
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        with pytest.raises(hypergrad.UnsupportedOperation, match='products="difference"'):
            hypergrad.implicit_grad(task.outer, task.inner, params, task.hparams)
        answer, info = by_differences(task, params, on_failure="ignore")
    apart = reference.relative_error(answer, {k: v.double() for k, v in exact.items()})
    assert apart <= min(1e-2, info.error_estimate)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # of dynamo's own
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_a_compiled_transformer_with_fused_attention_is_differenced(backend):
    task, params, truth = narrow("gpt2", "head")
    compiled = torch.compile(task.losses, backend=backend)

    def inner(p, h):
        return (h["weights"] * compiled(p, task.batches[0])).mean() + task.penalty(p, h)

    answer, info = by_differences(task, params, inner, on_failure="raise")
    assert reference.relative_error(answer, truth) <= min(1e-2, info.error_estimate)
