"""A module, a loss and a penalty as a bi-level problem: what `supervised` makes."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn

from .._autograd.guard import Guard
from .._autograd.torch_pytrees import pytree
from .._errors import StructureMismatch, UnsupportedOperation
from ._gauss_newton import GaussNewton
from ._inner_problem import scalar
from ._minimum import Minimum
from ._objective import with_batch
from ._supervised_batch import ABSENT, beside, is_loader, moved, refuse_no_arguments, split, there
from ._supervised_hparams import Loss, called, decay, each_loss, entry, weighted, weights_of

#: A word for the penalty, or ``penalty(params, hparams)``.
Penalty = Literal["decay", "log_decay"] | Callable[[Any, Any], Tensor] | None
#: A word for the weights, or ``weights(hparams, batch)``.
Weights = Literal["weight", "logit"] | Callable[[Any, Any], Tensor] | None
Transform = Callable[[Any, Any], Any] | None
Curvature = Literal["gauss-newton", "hessian"]


def supervised(
    model: nn.Module,
    loss_fn: Loss | None,
    *,
    penalty: Penalty = None,
    example_weights: Weights = None,
    transform: Transform = None,
    curvature: Curvature = "gauss-newton",
) -> Supervised:
    """Make the two losses of a bi-level problem from a module and a loss function.

    The inner loss is the loss on a training batch plus the penalty, and the outer one is the loss
    on a validation batch: means over their examples, unless `loss_fn` sums. Both are functions of
    ``(params, hparams)``, as `implicit_grad` and `Bilevel` take them; `params` are the module's
    parameters.

    Parameters
    ----------
    model : nn.Module
        It is evaluated as it stands, in train or eval mode, with its own buffers and its frozen
        parameters. Batches are moved to its device. Batch-norm layers must be in eval mode.
    loss_fn : callable, optional
        ``loss_fn(outputs, targets)``, one number, or a loss for each example, of which the mean is
        taken. One number is used as it is: with ``reduction="sum"`` the loss is a sum, which grows
        with the batch while the penalty does not. Of outputs with an attribute `logits` it gets
        that. None: the model computes the loss itself, and returns it as an attribute `loss`; the
        curvature is then "hessian".
    penalty : {"decay", "log_decay"} or callable, optional
        A word is weight decay, ``sum(rate * params**2) / 2`` as in `torch.optim`. The rates are
        ``hparams["decay"]``, or the exponential of ``hparams["log_decay"]``: one number, or a dict
        with the names of parameters, and for each a number, a tensor of its shape, or one that
        broadcasts to it. What the dict leaves out has no decay. A callable is
        ``penalty(params, hparams)``, a scalar tensor, which should be convex in `params`.
    example_weights : {"weight", "logit"} or callable, optional
        A word weights the training examples: the inner loss is ``(weights * losses).mean()``, or
        ``.sum()`` where `loss_fn` has ``reduction="sum"``. The weights are
        ``hparams["weight"][index]``, or the sigmoid of ``hparams["logit"][index]``. The index of
        each example is in the batch. A callable is ``weights(hparams, batch)``, a tensor with one
        weight for each example of the batch.
    transform : callable, optional
        ``transform(batch, hparams) -> batch``, applied to training batches alone: augmentation,
        noise, or labels that are hyperparameters. It is called once for each evaluation.
    curvature : {"gauss-newton", "hessian"}
        The matrix of the inner problem. The first, a `GaussNewton`, suits a loss that is convex in
        the outputs and has no negative curvature; the second is that of a `Minimum`.

    Returns
    -------
    problem : Supervised
        With ``problem.inner(batch)``, ``problem.outer(batch)`` and ``problem.params``. `Bilevel`
        takes ``problem.outer`` and ``problem.inner`` as they are, and hands them the batches.

    Raises
    ------
    TypeError
        If an argument is of none of the kinds above.
    ValueError
        If a word is none of those above.
    StructureMismatch
        If no parameter of the model requires grad.
    UnsupportedOperation
        If Gauss-Newton or example weights are asked for of a model that computes its loss itself.

    Notes
    -----
    A batch is a tuple or list ``(inputs, targets)`` or ``(inputs, targets, index)``: inputs that
    are a tuple or a dict are the arguments of the model. Or it is a dict: the targets are its
    "labels", "label", "targets", "target" or "y", the index is its "index", and all else are
    keyword arguments of the model. With ``loss_fn=None`` all of it, but for "index", goes to the
    model.

    With example weights a loss of `torch.nn` or `torch.nn.functional` is called with
    ``reduction="none"``, and what it returns is reduced as the loss would have done; class weights
    and ignored targets then count in a mean as losses like any other. A loss function of your own
    must return one loss for each example.

    Examples
    --------
    >>> import torch, hypergrad
    >>> from torch.nn import functional as F
    >>> model = torch.nn.Linear(1, 1, bias=False)
    >>> problem = hypergrad.supervised(model, F.mse_loss, penalty="decay")
    >>> train = torch.tensor([[1.0], [2.0]]), torch.tensor([[1.0], [3.0]])
    >>> model.weight.data.fill_(7 / 6)  # the solution is 7 / (5 + decay)
    tensor([[1.1667]])
    >>> hparams = {"decay": torch.tensor(1.0)}
    >>> hypergrad.implicit_grad(problem.outer(train), problem.inner(train), problem.params, hparams)
    {'decay': tensor(0.2269)}
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    if loss_fn is not None and (isinstance(loss_fn, type) or not callable(loss_fn)):
        cure = f": {loss_fn.__name__}()" if isinstance(loss_fn, type) else ""
        raise TypeError(
            f"loss_fn must be a function of (outputs, targets){cure}, or None where the model "
            f"returns its loss; got {_kind(loss_fn)}."
        )
    _refuse_no_choice("penalty", penalty, ("decay", "log_decay"), "(params, hparams)")
    _refuse_no_choice("example_weights", example_weights, ("weight", "logit"), "(hparams, batch)")
    _refuse_no_choice("transform", transform, (), "(batch, hparams)")
    if curvature not in ("gauss-newton", "hessian"):
        raise ValueError(f"curvature must be 'gauss-newton' or 'hessian'; got {curvature!r}.")
    if loss_fn is None and (curvature == "gauss-newton" or example_weights is not None):
        asked = "Gauss-Newton needs" if curvature == "gauss-newton" else "example_weights need"
        raise UnsupportedOperation(
            f"{asked} the loss apart from the model, and loss_fn=None lets the model compute it. "
            'Pass loss_fn, a function of (outputs, targets), or curvature="hessian" and no example '
            "weights.",
            argument="loss_fn",
        )
    problem = Supervised(model, loss_fn, penalty, example_weights, transform, curvature)
    if not problem.params:
        raise StructureMismatch(
            f"No parameter of {type(model).__name__} requires grad, so there is nothing to train. "
            "Call requires_grad_() on those that are to be trained.",
            argument="model",
        )
    return problem


@dataclasses.dataclass(frozen=True, eq=False)
class Supervised:
    """The two levels of a problem of supervised learning, as `supervised` makes them.

    Attributes
    ----------
    model, loss_fn, penalty, example_weights, transform, curvature
        As they were passed to `supervised`.

    Examples
    --------
    >>> import torch, hypergrad
    >>> from torch.nn import functional as F
    >>> problem = hypergrad.supervised(torch.nn.Linear(3, 2), F.cross_entropy, penalty="log_decay")
    >>> list(problem.params)
    ['weight', 'bias']
    >>> batch = torch.zeros(4, 3), torch.tensor([0, 1, 1, 0])
    >>> hparams = {"log_decay": torch.tensor(-1.0)}
    >>> problem.outer(batch)(problem.params, hparams).shape
    torch.Size([])
    """

    model: nn.Module
    loss_fn: Loss | None
    penalty: Penalty = None
    example_weights: Weights = None
    transform: Transform = None
    curvature: Curvature = "gauss-newton"
    #: The loss of each example, and how the loss function reduces them.
    _of_each: tuple[Loss, str] | None = dataclasses.field(init=False, default=None)

    def __post_init__(self) -> None:
        """Find the loss of each example, before anything is captured."""
        if self.loss_fn is not None and self.example_weights is not None:
            object.__setattr__(self, "_of_each", each_loss(self.loss_fn))

    @property
    def params(self) -> dict[str, nn.Parameter]:
        """The parameters that require grad, by name, which are the module's own tensors."""
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    @property
    def inner(self) -> InnerLoss | InnerMinimum:
        """The inner loss of a batch.

        ``inner(batch)`` is a condition, and a function of ``(params, hparams)``. In place of one
        batch ``inner(loader)`` takes the mean over the batches of a `DataLoader` without shuffling,
        as `Minimum` does with `batches`. `Bilevel`, which draws batches itself, takes
        ``problem.inner`` as it is.
        """
        if self.curvature == "hessian":
            return InnerMinimum(self._whole)
        penalty = None if self.penalty is None else self._penalty
        return InnerLoss(self._outputs, self._loss, penalty)

    def outer(self, *arguments: Any) -> Any:
        """Bind a batch, or evaluate the outer loss at ``(params, hparams, batch)``.

        Parameters
        ----------
        *arguments
            ``(batch)``, of which comes a function of ``(params, hparams)``, or the three that
            `Bilevel` passes. In place of a batch a `DataLoader` stands for the mean over its
            batches.

        Returns
        -------
        loss or value : callable or Tensor
            The loss of the batch, or a scalar.
        """
        refuse_no_arguments("outer", arguments)
        if len(arguments) != 1:
            return self._validation(*arguments)
        (batch,) = arguments
        if is_loader(batch):
            return functools.partial(_mean_of, self._validation, batch)
        return with_batch(self._validation, batch)

    def __repr__(self) -> str:
        """Write the choices, with the names of module and loss alone."""
        loss = getattr(self.loss_fn, "__name__", type(self.loss_fn).__name__)
        return (
            f"Supervised({type(self.model).__name__}, {loss}, penalty={self.penalty!r}, "
            f"example_weights={self.example_weights!r}, transform={self.transform!r}, "
            f"curvature={self.curvature!r})"
        )

    # --- the functions of both levels ----------------------------------------------------

    def _validation(self, params: Any, hparams: Any, batch: Any = ABSENT) -> Tensor:
        batch = there("outer", batch)
        outputs = self._called(params, batch)
        return outputs if self.loss_fn is None else self._mean(outputs, split(batch).targets)

    def _whole(self, params: Any, hparams: Any, batch: Any = ABSENT) -> Tensor:
        outputs = self._outputs(params, hparams, batch)
        value = outputs if self.loss_fn is None else self._loss(outputs, hparams, batch)
        return value if self.penalty is None else value + self._penalty(params, hparams)

    def _outputs(self, params: Any, hparams: Any, batch: Any = ABSENT) -> Any:
        """Call the model; beside its outputs stand the targets that a transform has made."""
        batch = there("inner", batch)
        if self.transform is None:
            return self._called(params, batch)
        batch = called("transform", self.transform, batch=batch, hparams=hparams)
        outputs = self._called(params, batch)
        if self.loss_fn is None:
            return outputs
        made = split(batch)
        kept = {"outputs": outputs, "targets": made.targets}
        return kept if made.index is None else {**kept, "index": made.index}

    def _loss(self, outputs: Any, hparams: Any, batch: Any = ABSENT) -> Tensor:
        """Take the loss of what `_outputs` has returned."""
        if self.transform is None:
            made = split(batch)
            targets, index = made.targets, made.index
        else:
            outputs, targets, index = outputs["outputs"], outputs["targets"], outputs.get("index")
        if self.example_weights is None:
            return self._mean(outputs, targets)
        if callable(self.example_weights):
            weights = called("example_weights", self.example_weights, hparams=hparams, batch=batch)
        else:
            weights = weights_of(self.example_weights, hparams, index)
        return weighted(self._of_each, weights, outputs, targets)

    def _penalty(self, params: Any, hparams: Any, batch: Any = None) -> Tensor:
        if callable(self.penalty):
            value = called("penalty", self.penalty, params=params, hparams=hparams)
            return scalar("penalty", value)
        assert self.penalty is not None
        return decay(params, entry(hparams, self.penalty), log=self.penalty == "log_decay")

    def _called(self, params: Any, batch: Any) -> Any:
        """Call the model on a batch: its outputs, or its own loss."""
        _refuse_no_names(params)
        args, keywords = split(batch, whole=self.loss_fn is None)[:2]
        where = next(iter(params.values())).device
        args, keywords = pytree.tree_map(lambda leaf: moved(leaf, where), (args, keywords))
        outputs = torch.func.functional_call(self.model, params, args, keywords)
        return _own_loss(outputs) if self.loss_fn is None else _logits(outputs)

    def _mean(self, outputs: Any, targets: Any) -> Tensor:
        assert self.loss_fn is not None
        targets = beside(outputs, targets)
        value = called("loss_fn", self.loss_fn, outputs=outputs, targets=targets)
        if isinstance(value, Tensor) and value.ndim:
            value = value.mean()
        return scalar("loss_fn", value)


class _OnBatches:
    """The calls of a condition of batches: with a batch alone, or with its variables."""

    def __call__(self, *arguments: Any) -> Any:
        """Bind a batch, or evaluate the objective at ``(params, hparams)``.

        Parameters
        ----------
        *arguments
            ``(batch)``, or ``(params, hparams)`` once a batch is bound.

        Returns
        -------
        condition or value : condition or Tensor
            The condition of the batch, or a scalar.
        """
        refuse_no_arguments("inner", arguments)
        itself: Any = self
        if len(arguments) == 1:
            return itself._bound(arguments[0])
        with Guard():
            if itself.batches is None:
                return itself._value(*arguments)
            values = [itself.of_batch(batch)._value(*arguments) for batch in itself.batches]
            return torch.stack(values).mean()

    def _bound(self, batch: Any) -> Self:
        itself: Any = self
        if is_loader(batch):
            return dataclasses.replace(itself, batches=batch)
        names = ("f", "outputs", "loss", "regulariser")
        functions = {name: getattr(self, name, None) for name in names}
        bound = {name: with_batch(f, batch) for name, f in functions.items() if f is not None}
        return dataclasses.replace(itself, **bound)


@dataclasses.dataclass(frozen=True, repr=False)
class InnerLoss(_OnBatches, GaussNewton):
    """The inner loss of a `Supervised`, with the curvature of Gauss and Newton."""

    def of_batch(self, batch: Any) -> InnerLoss:
        """Make the condition of one batch, which the regulariser does not get."""
        if self.batches is None:
            return self
        one = with_batch(self.outputs, batch), with_batch(self.loss, batch)
        return InnerLoss(*one, self.regulariser)

    def _value(self, params: Any, hparams: Any, *batch: Any) -> Tensor:
        value = self.loss(self.outputs(params, hparams, *batch), hparams, *batch)
        return value if self.regulariser is None else value + self.regulariser(params, hparams)


@dataclasses.dataclass(frozen=True, repr=False)
class InnerMinimum(_OnBatches, Minimum):
    """The inner loss of a `Supervised`, with its Hessian."""

    def of_batch(self, batch: Any) -> InnerMinimum:
        """Make the objective of one batch."""
        return self if self.batches is None else InnerMinimum(with_batch(self.f, batch))

    def _value(self, params: Any, hparams: Any, *batch: Any) -> Tensor:
        return self.f(params, hparams, *batch)


def _mean_of(function: Callable[..., Tensor], batches: Iterable[Any], *arguments: Any) -> Tensor:
    values = [function(*arguments, batch) for batch in batches]
    if not values:
        raise StructureMismatch("The loader gives no batch.", argument="batch")
    return torch.stack(values).mean()


def _field(outputs: Any, name: str) -> Any:
    """Look a field of a model's outputs up; None: there is none."""
    if isinstance(outputs, Mapping):
        return outputs.get(name)
    return None if isinstance(outputs, Tensor) else getattr(outputs, name, None)


def _logits(outputs: Any) -> Any:
    logits = _field(outputs, "logits")
    if logits is not None:
        return logits
    if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(outputs)):
        raise StructureMismatch(
            f"The model returned a {type(outputs).__name__}, which has no attribute logits and is "
            "no pytree of tensors. Wrap the model in a module that returns the tensors that "
            "loss_fn takes.",
            argument="model",
        )
    return outputs


def _own_loss(outputs: Any) -> Tensor:
    loss = outputs if isinstance(outputs, Tensor) else _field(outputs, "loss")
    if loss is None:
        raise StructureMismatch(
            f"With loss_fn=None the model must return its loss: a scalar, or an object with a "
            f"loss; it returned a {type(outputs).__name__} without one. Are the labels in the "
            "batch? Otherwise pass loss_fn.",
            argument="model",
        )
    return scalar("the model's loss", loss)


def _refuse_no_names(params: Any) -> None:
    if not (isinstance(params, Mapping) and params):
        raise StructureMismatch(
            "params must be a dict of the module's parameters by name, such as problem.params; got "
            f"{type(params).__name__}.",
            argument="params",
        )


def _refuse_no_choice(name: str, value: Any, words: tuple[str, ...], arguments: str) -> None:
    if value is None or value in words or (callable(value) and not isinstance(value, type)):
        return
    listed = "".join(f"{word!r}, " for word in words)
    error = ValueError if isinstance(value, str) else TypeError
    raise error(f"{name} must be {listed}None or a function of {arguments}; got {_kind(value)}.")


def _kind(value: Any) -> str:
    if isinstance(value, str | int | float | bool):
        return repr(value)
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"an object of type {type(value).__name__}"
