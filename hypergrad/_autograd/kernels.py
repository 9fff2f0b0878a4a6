"""Kernels of PyTorch that lack a derivative, and how each is written out."""

from __future__ import annotations

import re

# In operations that have all derivatives. By a part of the kernel's name.
_WRITTEN_OUT = {
    "cdist": "(a[:, None] - b).square().sum(-1), and .sqrt() where no two points are the same",
    "pdist": "(x[i] - x[j]).square().sum(-1) with i, j = torch.triu_indices(n, n, 1), and .sqrt()",
    "embedding_bag": "functional.embedding(indices, weight), and its sum, mean or amax over a bag",
    "hardsigmoid": "(x / 6 + 0.5).clamp(0, 1)",
    "multi_margin_loss": (
        "(margin - x.gather(1, y[:, None]) + x).clamp(min=0) ** p, summed over the wrong classes "
        "and divided by the number of classes"
    ),
    "multilabel_margin_loss": (
        "(1 - x[right][:, None] + x[wrong]).clamp(min=0).sum() / x.numel(), for each sample"
    ),
    "ctc_loss": (
        "the recursion over the states of the labels with torch.logaddexp, one step of time after "
        "the other"
    ),
    "linear_cross_entropy": "functional.cross_entropy(x @ weight.T, y)",
    "segment_reduce": "torch.zeros(segments).index_add(0, segment_of_each, x), over the lengths",
}

_MISSING = re.compile(r"derivative for '?(?:aten::)?_?(\w+)[^.]*is not implemented")
_TWICE = re.compile(
    r"^(\w+)[^.]*not support[^.]*double backward"
    r"|^(\w+).*double backwards? (?:is|are) (?:not |un)supported"
    r"|^(\w+) double backward not implemented",
    re.IGNORECASE | re.DOTALL,
)
_ARGUMENT = re.compile(
    r"The function '(\w+)' is not differentiable with respect to argument '(\w+)'"
)
_FIRST_ORDER = (
    'Minimum(..., products="difference"), penalty_grad, value_function_grad, '
    "finite_difference_grad and F2SA() need first derivatives alone"
)


def cure_of(text: str) -> str | None:
    """Say what to do about a derivative that PyTorch says it lacks.

    Parameters
    ----------
    text : str
        PyTorch's message.

    Returns
    -------
    cure : str or None
        None: the message is about something else.
    """
    missing = _MISSING.search(text) or _TWICE.search(text)
    if missing is not None:
        name = next(group for group in missing.groups() if group)
        known = [part for part in _WRITTEN_OUT if part in name]
        how = f": {_WRITTEN_OUT[known[0]]}" if known else ""
        kernel = known[0] if known else re.sub(r"_backward\w*$", "", name)
        if known or "backward" in text.lower():
            return (
                f"{kernel} has no second derivative in PyTorch. Write it out in elementary "
                f"operations{how}. Or leave it as it is: {_FIRST_ORDER}."
            )
        return (
            f"{kernel} has no derivative in PyTorch by one of its arguments. Write it out in "
            "elementary operations, or detach that argument where it is a constant."
        )
    argument = _ARGUMENT.search(text)
    if argument is None:
        return None
    kernel, name = argument.groups()
    if name.endswith("weight") and ("loss" in kernel or "cross_entropy" in kernel):
        return _weights(kernel, name)
    return (
        f"PyTorch has no derivative of {kernel} by its argument {name!r}. Write that part out in "
        "elementary operations; detach the argument only where it is a constant, since its "
        "gradient is lost then."
    )


def _weights(kernel: str, name: str) -> str:
    """Say how to weight a loss by a hyperparameter."""
    each = kernel.removesuffix("_forward").removesuffix("2d").removesuffix("_nd")
    if name == "pos_weight":
        how = (
            "each = -(pos_weight * y * functional.logsigmoid(x) + (1 - y) * "
            'functional.logsigmoid(-x)), which is that of reduction="none", then each.mean()'
        )
    elif "binary" in kernel:
        how = f'each = functional.{each}(x, y, reduction="none"), then (weight * each).mean()'
    else:
        how = (
            f'each = functional.{_called(each)}(x, y, reduction="none"), then '
            "(weight[y] * each).sum() / weight[y].sum()"
        )
    return (
        f"PyTorch has no derivative of {kernel} by its argument {name!r}. Write the weighted mean "
        f"out: {how}. Without requires_grad, as PyTorch has it, the gradient would be lost."
    )


def _called(kernel: str) -> str:
    return "cross_entropy" if kernel == "nll_loss" else kernel
