"""Tiny models of `transformers` with random weights, and problems on them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import peft
import torch
import transformers
from torch import Tensor
from torch.nn import functional
from transformers.models.llama.modeling_llama import LlamaRMSNorm

VOCABULARY, LENGTH, EXAMPLES, CLASSES = 20, 6, 3, 4
_SIZES = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}


def gpt2(**further: Any) -> Any:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=32, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0, **further,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def llama(**further: Any) -> Any:
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_key_value_heads=1,
        bos_token_id=0, eos_token_id=0, **_SIZES, **further,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config)


def bert(**further: Any) -> Any:
    config = transformers.BertConfig(
        vocab_size=VOCABULARY, max_position_embeddings=LENGTH, num_labels=CLASSES, **_SIZES,
        **further,
    )  # fmt: skip
    return transformers.BertForSequenceClassification(config)


def vit(**further: Any) -> Any:
    config = transformers.ViTConfig(
        image_size=8, patch_size=4, num_labels=CLASSES, **_SIZES, **further
    )
    return transformers.ViTForImageClassification(config)


#: What makes a model, and the names that the parameters of its head begin with.
MODELS: dict[str, tuple[Callable[..., Any], str]] = {
    "gpt2": (lambda **f: gpt2(tie_word_embeddings=False, **f), "lm_head"),
    "gpt2-tied": (gpt2, "transformer.wte"),
    "llama": (llama, "lm_head"),
    "bert": (bert, "classifier"),
    "vit": (vit, "classifier"),
}
#: Where the adapters of LoRA go.
ADAPTED = {
    "gpt2": ["c_attn"],
    "gpt2-tied": ["c_attn"],
    "llama": ["q_proj", "v_proj"],
    "bert": ["query", "value"],
}


def build(name: str, *, attention: str | None = None, seed: int = 0, **further: Any) -> Any:
    """A model in float64, in eval mode; `attention` None: as `transformers` chooses."""
    torch.manual_seed(seed)
    chosen = {} if attention is None else {"attn_implementation": attention}
    model = MODELS[name][0](**chosen, **further)
    with torch.no_grad():
        for value in model.parameters():  # larger than the usual start, so that there is curvature
            value.add_(0.2 * torch.randn_like(value))
    for module in list(model.modules()):
        for key, child in module.named_children():
            if isinstance(child, LlamaRMSNorm):  # which computes in float32, whatever it is given
                norm = torch.nn.RMSNorm(child.weight.shape, eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, key, norm)
    return model.double().eval()


def chosen(model: Any, name: str, which: str) -> dict[str, Tensor]:
    """The parameters that the inner problem is about: "all", "head" or "lora"."""
    model.requires_grad_(which == "all")
    if which == "head":
        for key, value in model.named_parameters():
            value.requires_grad_(key.startswith(MODELS[name][1]))
    return {
        key: value.detach().clone()
        for key, value in model.named_parameters()
        if value.requires_grad
    }


def adapted(model: Any, name: str) -> tuple[Any, dict[str, Tensor]]:
    """The model with adapters, and their weights."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        r=2, lora_alpha=4, target_modules=ADAPTED[name], fan_in_fan_out=name.startswith("gpt2")
    )
    model = peft.get_peft_model(model, config).double().eval()
    params = {
        key: 0.2 * torch.randn_like(value)
        for key, value in model.named_parameters()
        if value.requires_grad
    }
    assert params
    assert all("lora_" in key for key in params)
    return model, params


@dataclasses.dataclass
class Task:
    """Training with a weight for each example and weight decay around the start.

    Attributes
    ----------
    model : module
        It is called by `torch.func.functional_call`.
    params, hparams : dict of Tensor
        Where the inner problem starts, and the hyperparameters.
    labels : str
        "next": the next token; "class": one of the classes.
    """

    model: Any
    params: dict[str, Tensor]
    labels: str
    images: bool = False
    dtype: torch.dtype = torch.float64

    def __post_init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        self.batches = [self._batch(generator) for _ in range(2)]
        weights = torch.rand(EXAMPLES, generator=generator, dtype=self.dtype) + 0.5
        decay = torch.tensor(4.5, dtype=self.dtype)
        self.hparams = {"weights": weights, "log_decay": decay}

    def _batch(self, generator: torch.Generator) -> dict[str, Tensor]:
        if self.images:
            pixels = torch.randn(EXAMPLES, 3, 8, 8, generator=generator, dtype=self.dtype)
            batch = {"pixel_values": pixels}
        else:
            ids = torch.randint(VOCABULARY, (EXAMPLES, LENGTH), generator=generator)
            mask = torch.ones_like(ids)
            mask[0, LENGTH - 2 :] = 0  # a text that is shorter than the others
            batch = {"input_ids": ids, "attention_mask": mask}
        if self.labels == "next":
            return {**batch, "labels": batch["input_ids"]}
        return {**batch, "labels": torch.randint(CLASSES, (EXAMPLES,), generator=generator)}

    def outputs(self, params: dict[str, Tensor], batch: dict[str, Tensor]) -> Any:
        return torch.func.functional_call(self.model, params, (), batch)

    def losses(self, params: dict[str, Tensor], batch: dict[str, Tensor]) -> Tensor:
        """The loss of each example, from the logits."""
        logits, labels = self.outputs(params, batch).logits, batch["labels"]
        if self.labels == "class":
            return functional.cross_entropy(logits, labels, reduction="none")
        logits = logits[:, :-1].transpose(1, 2)
        return functional.cross_entropy(logits, labels[:, 1:], reduction="none").mean(dim=1)

    def penalty(self, params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        """Strong enough that the curvature is positive."""
        distance = sum(((v - self.params[k]) ** 2).sum() for k, v in params.items())
        return hparams["log_decay"].exp() * distance

    def inner(self, params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        each = self.losses(params, self.batches[0])
        return (hparams["weights"] * each).mean() + self.penalty(params, hparams)

    def outer(self, params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        return self.losses(params, self.batches[1]).mean()

    def inner_of_loss(self, params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        """The inner problem by the loss that the model computes itself."""
        loss = self.outputs(params, self.batches[0]).loss
        return hparams["scale"] * loss + self.penalty(params, hparams)

    def outer_of_loss(self, params: dict[str, Tensor], hparams: dict[str, Tensor]) -> Tensor:
        return self.outputs(params, self.batches[1]).loss
