"""The hyperparameters of `supervised` that have a word: weights of examples, and weight decay."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .._errors import StructureMismatch
from .._mistakes import refuse_signatures
from ._supervised_batch import beside, moved

Loss = Callable[..., Any]


def called(name: str, function: Callable[..., Any], **arguments: Any) -> Any:
    """Call a function of the caller's by position, and say which arguments it must take."""
    try:
        return function(*arguments.values())
    except TypeError as error:
        cure = f"It is called as {name}({', '.join(arguments)}), and need not use all of them."
        refuse_signatures(name, function, tuple(arguments), error, cure)
        raise


def weighted(of_each: tuple[Loss, str] | None, weights: Any, outputs: Any, targets: Any) -> Tensor:
    """Average the losses of the examples, each times its weight."""
    assert of_each is not None
    each, reduction = of_each
    targets = beside(outputs, targets)
    losses = called("loss_fn", each, outputs=outputs, targets=targets)
    if not isinstance(losses, Tensor) or losses.ndim == 0:
        raise StructureMismatch(
            "With example_weights loss_fn must return a loss for each example; it returned "
            f"{'one number' if isinstance(losses, Tensor) else type(losses).__name__}. Leave out "
            ".mean() and .sum(), or pass a loss that takes reduction='none'.",
            argument="loss_fn",
        )
    summed = reduction in ("sum", "batchmean")  # over the entries of an example
    if losses.ndim > 1:
        losses = losses.flatten(1).sum(1) if summed else losses.flatten(1).mean(1)
    if not isinstance(weights, Tensor) or weights.shape != losses.shape:
        got = tuple(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
        raise StructureMismatch(
            f"There must be one weight for each of the {len(losses)} losses of the batch; got "
            f"{got}.",
            argument="example_weights",
        )
    products = weights.to(losses.device) * losses
    return products.sum() if reduction == "sum" else products.mean()


def each_loss(loss_fn: Loss) -> tuple[Loss, str]:
    """Make a loss return one for each example; and how it would reduce them."""
    if isinstance(loss_fn, nn.Module):
        reduction = getattr(loss_fn, "reduction", "none")
        if reduction == "none":
            return loss_fn, reduction
        each: Any = copy.copy(loss_fn)
        each.reduction = "none"
        return each, str(reduction)
    bound = loss_fn.keywords if isinstance(loss_fn, functools.partial) else {}
    try:
        known = inspect.signature(loss_fn).parameters.get("reduction")
    except (TypeError, ValueError):  # of a builtin nobody knows
        known = None
    if known is None:
        return loss_fn, "none"
    reduction = bound.get("reduction", known.default)
    return functools.partial(loss_fn, reduction="none"), str(reduction)


def weights_of(word: str, hparams: Any, index: Any) -> Tensor:
    """Look the weights of a batch up."""
    values = entry(hparams, word)
    if not isinstance(values, Tensor) or values.ndim != 1:
        raise StructureMismatch(
            f"hparams[{word!r}] must be a tensor with one number for each training example; got "
            f"{tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__}.",
            leaf=f"hparams[{word!r}]",
        )
    whole = isinstance(index, Tensor) and not (index.is_floating_point() or index.is_complex())
    if not whole or index.dtype == torch.bool:
        raise StructureMismatch(
            "example_weights need the index of each example in the batch: (inputs, targets, index),"
            " or a dict with an 'index', as integers. With a TensorDataset that is "
            "TensorDataset(x, y, torch.arange(len(x))).",
            argument="batch",
        )
    try:
        values = values[moved(index, values.device)]
    except IndexError as error:
        raise StructureMismatch(
            f"An index in the batch is outside of hparams[{word!r}], which has {len(values)} "
            f"entries, one for each training example. ({error})",
            leaf=f"hparams[{word!r}]",
        ) from error
    return values.sigmoid() if word == "logit" else values


def decay(params: Any, rates: Any, *, log: bool) -> Tensor:
    """Form half the sum of rates times squares."""
    word = "log_decay" if log else "decay"
    path = f"hparams[{word!r}]"
    by_name = dict.fromkeys(params, rates) if isinstance(rates, Tensor) else rates
    if not isinstance(by_name, Mapping):
        raise StructureMismatch(
            f"{path} must be a tensor, or a dict of tensors by the names of parameters; got "
            f"{type(rates).__name__}.",
            leaf=path,
        )
    unknown = [name for name in by_name if name not in params]
    if unknown or not by_name:
        raise StructureMismatch(
            f"{path} has {', '.join(map(repr, unknown)) or 'no entry'}, and the parameters are "
            f"{', '.join(map(repr, params))}.",
            leaf=path,
        )
    terms = []
    for name, rate in by_name.items():
        param = params[name]
        if not isinstance(rate, Tensor) or not _fits(rate, param):
            got = tuple(rate.shape) if isinstance(rate, Tensor) else type(rate).__name__
            of_name = path if isinstance(rates, Tensor) else f"{path}[{name!r}]"
            raise StructureMismatch(
                f"{of_name} must be a number or broadcast to {name}, of shape "
                f"{tuple(param.shape)}; got {got}.",
                leaf=of_name,
            )
        rate = rate.to(param.device)
        terms.append(((rate.exp() if log else rate) * param.square()).sum())
    first = terms[0]
    return torch.stack([term.to(first) for term in terms]).sum() / 2


def _fits(rate: Tensor, param: Tensor) -> bool:
    try:
        return torch.broadcast_shapes(rate.shape, param.shape) == param.shape
    except RuntimeError:
        return False


def entry(hparams: Any, word: str) -> Any:
    if isinstance(hparams, Mapping) and word in hparams:
        return hparams[word]
    got = list(hparams) if isinstance(hparams, Mapping) else type(hparams).__name__
    raise StructureMismatch(
        f"hparams must be a dict with the entry {word!r}, which supervised was told to use; got "
        f"{got}.",
        argument="hparams",
    )
