"""Estimators from first derivatives of two losses: how they begin, and how they end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from .._errors import HypergradError, NotConnected, NotConverged
from .._warnings import OnFailure, check_on_failure, warn_of_unused
from ..conditions._base import plus
from ._answer import Estimate, handed_out, hypergradient, judge_figure
from ._loss import Arguments, Leaves, Loss, Slopes

_CURE = "The gradient steps may diverge: make lr smaller, or look at the data."
#: A figure, its limit, and what is said above it.
Figure = tuple[Tensor, float | None, str]


class FirstOrder:
    """A call of such an estimator.

    Parameters
    ----------
    name : str
        The public function.
    outer, inner, params, hparams, has_aux, on_failure
        The caller's.

    Attributes
    ----------
    at : Arguments
        The two arguments.
    outer, inner : Loss
        The two losses.
    """

    def __init__(
        self,
        name: str,
        outer: Callable[[Any, Any], Any],
        inner: Callable[[Any, Any], Any],
        params: Any,
        hparams: Any,
        has_aux: bool,
        on_failure: OnFailure,
    ) -> None:
        check_on_failure(on_failure)
        self._name, self._has_aux, self._on_failure = name, has_aux, on_failure
        self.at = Arguments.of(params, hparams)
        self.outer = Loss("outer", outer, self.at, has_aux=has_aux)
        self.inner = Loss("inner", inner, self.at)

    def outer_slopes(self, params: Sequence[Tensor]) -> Slopes:
        """Evaluate the outer loss and its gradients.

        Parameters
        ----------
        params : list of Tensor
            Where.

        Returns
        -------
        slopes : Slopes
            Some of them by `params`.

        Raises
        ------
        NotConnected
            If it does not depend on `params`, with what to look for.
        """
        slopes = self.outer(params)
        if all(slope is None for slope in slopes.by_params):
            raise NotConnected(
                "outer does not depend on params, so the inner problem plays no part in its "
                "gradient. Use params in outer: a module must be called as "
                "torch.func.functional_call(module, params, args), and a .detach(), .item() or "
                "torch.no_grad() inside outer cuts the connection.",
                argument="params",
            )
        return slopes

    def finish(
        self,
        grads: Leaves,
        slopes: Sequence[Slopes],
        figures: Sequence[Figure],
        params: Any = None,
        return_params: bool = False,
        info: Any = None,
        error: type[HypergradError] = NotConverged,
    ) -> Any:
        """Check a hypergradient and hand it out.

        Parameters
        ----------
        grads : list of Tensor or None
            The hypergradient.
        slopes : sequence of Slopes
            What it is made of: of the outer loss, and then of the inner one.
        figures : sequence of Figure
            What is to be judged.
        params : pytree, optional
            The inner variables that it belongs to.
        return_params, info
            As in `handed_out`.
        error : type
            What is raised by a figure.

        Returns
        -------
        grads, or a tuple
            Of the hypergradient and what else was asked for.
        """
        H, (outer, inner, *_) = self.at.H, slopes
        captured = [t for of in slopes for t in of.captured]
        estimate = Estimate(grads, outer.value, params, outer.aux, captured)
        filled = hypergradient(self._name, H, estimate, self._on_failure, _CURE)
        for figure, limit, text in figures:
            judge_figure(figure, limit, self._on_failure, error, text)
        if self._on_failure != "ignore":
            warn_of_unused(H, "Neither outer nor inner", outer.by_hparams, inner.by_hparams)
        return handed_out(filled, estimate, self._has_aux, return_params, info)


def difference(a: Leaves, b: Leaves) -> Leaves:
    """Form the difference of two gradients; None where one of them is."""
    return [None if x is None or y is None else x - y for x, y in zip(a, b, strict=True)]


def added(direct: Leaves, weight: Tensor | float, leaves: Leaves) -> Leaves:
    """Form ``direct + weight * leaves``, where None stands for zero."""
    factors = [
        weight.to(x.dtype) if isinstance(weight, Tensor) and x is not None else weight
        for x in leaves
    ]
    return [
        plus(d, None if x is None else f * x)
        for d, f, x in zip(direct, factors, leaves, strict=True)
    ]
