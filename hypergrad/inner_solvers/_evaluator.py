"""The caller's function on flat vectors."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .._autograd.attention import has_fused
from .._autograd.double_backward import changed_in_place
from .._autograd.guard import Guard
from .._autograd.host import any_task
from .._autograd.products import ForwardReplay, Replay, filled, gradient_of
from .._autograd.recording import Recording, record
from .._autograd.torch_pytrees import pytree
from .._autograd.trace import detached, graph, reaches, versions
from .._autograd.transforms import alive, carries_derivative
from .._autograd.vmaps import Vmaps
from .._errors import NotConnected, StructureMismatch
from .._pytrees import Layout, Tree
from ..conditions._inner_problem import scalar
from ._numbers import dot, norm

_OBJECTIVE = "The objective"
_RESIDUALS = "The residual function"
_REACHES, _SHORTER = (
    7,
    16.0,
)  # how often a difference of gradients is tried, and by how much shorter


class Evaluator:
    """The caller's function on flat vectors, detached from all that surrounds the call.

    Outside of the caller's `vmaps` vectors are ``(*tasks, n)`` and numbers ``(*tasks, 1)``; the
    caller's functions are called inside of them, and close over their batches.
    """

    def __init__(
        self,
        fun: Callable[..., Any],
        tree: Tree,
        layout: Layout,
        args: tuple[Any, ...],
        vmaps: Vmaps | None,
    ) -> None:
        self.fun, self.tree, self.layout, self.args, self.vmaps = fun, tree, layout, args, vmaps
        self.captured: list[Tensor] = []
        self._held = [t for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        # Of each function that has been called, by whether it was for its derivative.
        self._guards: dict[tuple[str, bool], Guard] = {}

    def start(self) -> Tensor:
        """Detach the point where the iteration starts."""
        variables = [detached(self._plain(v)).clone() for v in self.tree.variables]
        return self._flat(variables)

    def step_size(self, length: float | Tensor) -> Tensor:
        """Take the caller's step, for each task where it is batched: one number, or n of them."""
        n = self.layout.n
        device, dtype = self.layout.device, self.layout.dtype
        if isinstance(length, Tensor):
            number = length.to(device)
        else:  # in their dtype: torch's default one may be narrower
            number = torch.full((), length, dtype=dtype, device=device)
        if number.shape not in ((), (1,), (n,)):
            raise ValueError(
                f"step_size must be a number, or a tensor of shape () or ({n},), a step for every "
                f"unknown; got shape {tuple(number.shape)}."
            )
        number = detached(self._plain(number)).to(self.layout.dtype)
        single = number.ndim == (0 if self.vmaps is None else len(self.vmaps.sizes))
        return number.unsqueeze(-1) if single else number

    def objective(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate the objective and its gradient."""
        value, gradient, _ = self._differentiated(x, twice=False)
        return value, gradient

    def with_hessian(self, x: Tensor) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
        """Evaluate the objective and its gradient, and record products with its Hessian."""
        value, gradient, hessian = self._differentiated(x, twice=True)
        assert hessian is not None
        replay = hessian
        return value, gradient, lambda v: self._flat_gradient(replay(self.layout.split(v)), v)

    def curved(self, x: Tensor, value: Tensor, g: Tensor, v: Tensor) -> tuple[Tensor, int]:
        """Form the Hessian along `v` by a difference of gradients.

        An objective may be so steep that the difference reaches too far: its value there is then
        not what the slopes at both ends say. The reach is shortened until it is.

        Parameters
        ----------
        x, value, g : Tensor
            Where, and the objective's value and gradient there.
        v : Tensor
            The direction.

        Returns
        -------
        product : Tensor
            ``H v / ||v||``.
        used : int
            How many gradients it took: one, where nothing is steep.
        """
        eps = torch.finfo(self.layout.precision).eps
        size = norm(v)
        unit = v / torch.where(size > 0, size, torch.ones_like(size))
        reach = eps**0.5 * norm(x).clamp(min=1.0)
        slope = dot(g, unit)
        along, open_ = torch.full_like(x, math.nan), torch.ones_like(value, dtype=torch.bool)
        for used in range(1, _REACHES + 1):
            end_value, end = self.objective(x + reach * unit)
            product, bend = (end - g) / reach, reach / 2 * dot(end - g, unit)
            missed = (end_value - value - reach * slope - bend).abs()
            noise = 10 * eps * (value.abs() + end_value.abs())
            sound = missed <= torch.maximum(bend.abs() / 2, (reach * slope).abs()) + noise
            # Where no reach is sound the first one stands.
            along = torch.where(open_ & (sound if used > 1 else open_), product, along)
            open_ = open_ & ~sound & torch.isfinite(value)
            if not any_task(open_):
                break
            reach = reach / _SHORTER
        return along, used

    def residuals(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Evaluate residuals ``(*tasks, m)`` and their Jacobian ``(*tasks, m, n)``.

        It takes as many products as there are residuals, or parameters if those are fewer.

        Parameters
        ----------
        x : Tensor
            Where.

        Returns
        -------
        r, J : Tensor
            Both detached.
        """
        lead = x.shape[:-1]

        def evaluate(recording: Recording) -> tuple[Tensor, Tensor]:
            aliases = recording.aliases
            first = (_RESIDUALS, True) not in self._guards
            leaves: list[Tensor] = self._called(
                _RESIDUALS, self._residual_leaves, aliases, differentiated=True
            )
            recording.returned(leaves)
            if first:  # find what is differentiated around the call
                recording.refuse_past_arguments("The inner solver's function")
                self.captured += recording.captured()
            r = torch.cat([leaf.reshape(*lead, -1).to(x.dtype) for leaf in leaves], dim=-1)
            m, n = r.shape[-1], x.shape[-1]
            if not r.requires_grad:
                return r, r.new_zeros(*lead, m, n)
            seed = torch.zeros((), dtype=r.dtype, device=r.device, requires_grad=True)
            if m <= n:
                pull = Replay([r], aliases)
                rows = []
                for i in range(m):
                    cotangent = torch.zeros_like(r).index_fill_(-1, torch.tensor(i), 1.0)
                    rows.append(self._flat_gradient(pull([cotangent]), x))
                return r.detach(), torch.stack(rows, dim=-2) if rows else r.new_zeros(*lead, 0, n)
            push = ForwardReplay([r], aliases, seed)
            columns = []
            for j in range(n):
                tangent = torch.zeros_like(x).index_fill_(-1, torch.tensor(j), 1.0)
                (column,) = push(self.layout.split(tangent))
                columns.append(torch.zeros_like(r) if column is None else column.detach())
            return r.detach(), torch.stack(columns, dim=-1)

        r, J = record(evaluate, self.layout.split(x), [self.tree])
        return alive(r.detach()), alive(J.detach())

    def _residual_leaves(self, leaves: Sequence[Tensor]) -> list[Tensor]:
        residuals = pytree.tree_leaves(self.fun(self.tree.rebuild(leaves), *self.args))
        for leaf in residuals:
            if not (isinstance(leaf, Tensor) and leaf.is_floating_point()):
                raise StructureMismatch(
                    "The residuals must be floating-point tensors; got a "
                    f"{leaf.dtype if isinstance(leaf, Tensor) else type(leaf).__name__}."
                )
        return [leaf.reshape(-1) for leaf in residuals]

    def value(self, x: Tensor) -> Tensor:
        """Evaluate the objective alone."""
        value: Tensor = self._called(_OBJECTIVE, self._scalar, self.layout.split(x))
        return value.detach().to(x.dtype).unsqueeze(-1)

    def uses(self, place: int, x: Tensor) -> bool:
        """Say whether the objective uses one of the further arguments, as autograd sees it.

        Numbers and tensors of integers, whose derivative nobody can take, are looked at as tensors
        of floating point; an objective that fails by these alone uses them.

        Parameters
        ----------
        place : int
            The argument's place among those after the parameters.
        x : Tensor
            Where the objective is evaluated, once.

        Returns
        -------
        uses : bool
            False where it reads the argument by `.item()` or `.detach()` alone.
        """
        leaves = self.layout.split(x)

        def evaluate(recording: Recording) -> bool:
            (seed,) = recording.aliases  # zero, so that no value changes

            def marked(leaf: Any) -> Any:
                if isinstance(leaf, Tensor):
                    as_real = leaf.is_floating_point() or leaf.is_complex()
                    leaf = leaf if as_real or leaf.dtype == torch.bool else leaf.to(x.dtype)
                    return leaf if leaf.dtype == torch.bool else leaf + seed.to(leaf)
                is_number = isinstance(leaf, int | float) and not isinstance(leaf, bool)
                return leaf + seed if is_number else leaf

            args = list(self.args)
            args[place] = pytree.tree_map(marked, args[place])

            def fun(leaves: Sequence[Tensor]) -> Tensor:
                return scalar("objective", self.fun(self.tree.rebuild(leaves), *args))

            try:
                with warnings.catch_warnings():
                    warnings.filterwarnings("ignore", "Converting a tensor with requires_grad")
                    return reaches(self._called(_OBJECTIVE, fun, leaves), seed)
            except Exception:
                self._called(_OBJECTIVE, self._scalar, leaves)  # its own error, where it has one
                return True

        return record(evaluate, [x.new_zeros(())], [self.tree])

    def mapped(self, x: Tensor) -> Tensor:
        """Evaluate a map."""
        return self.plain("T(params, ...)", lambda params: self.fun(params, *self.args), x)

    def plain(self, what: str, fun: Callable[..., Any], x: Tensor, *others: Tensor) -> Tensor:
        """Evaluate a function of ``(params, *others)`` that is not differentiated, flat."""
        first = (what, False) not in self._guards

        def evaluate(leaves: list[Tensor], *others: Tensor) -> list[Tensor]:
            value = fun(self.tree.rebuild(leaves), *others)
            if first:
                tensors = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]
                self.captured += [tensor for tensor in tensors if carries_derivative(tensor)]
            return self.tree.match(what, value)

        with torch.set_grad_enabled(first):
            returned = self._called(what, evaluate, self.layout.split(x), *others)
        return self._flat([leaf.detach() for leaf in returned])

    def _scalar(self, leaves: Sequence[Tensor]) -> Tensor:
        return scalar("objective", self.fun(self.tree.rebuild(leaves), *self.args))

    def _called(
        self,
        what: str,
        fun: Callable[..., Any],
        leaves: Sequence[Tensor],
        *others: Tensor,
        differentiated: bool = False,
    ) -> Any:
        """Call a function inside of the caller's vmaps; see that it changes nothing in place."""
        guard = self._guards.get((what, differentiated))
        first = guard is None
        held = [*self._held, *leaves] if first else []
        before = versions(held)

        def guarded(*others: Any) -> Any:
            nonlocal guard
            if guard is None:
                guard = Guard()
            with guard:
                return fun(*others)

        if self.vmaps is None:
            returned = guarded(leaves, *others)
        else:
            returned = self.vmaps.inside(
                guarded, leaves, *others, differentiated=differentiated, watched=first
            )
        if first:
            if before != versions(held):
                raise changed_in_place(what)
            assert guard is not None
            self._guards[what, differentiated] = guard
        return returned

    def _plain(self, tensor: Tensor) -> Tensor:
        return tensor if self.vmaps is None else self.vmaps.unwrapped(tensor)

    def _flat(self, leaves: Sequence[Tensor]) -> Tensor:
        return self.layout.flatten(leaves, () if self.vmaps is None else self.vmaps.sizes)

    def _differentiated(self, x: Tensor, *, twice: bool) -> tuple[Tensor, Tensor, Replay | None]:
        def evaluate(recording: Recording) -> tuple[Tensor, Any, Replay | None]:
            aliases = recording.aliases
            first = (_OBJECTIVE, True) not in self._guards
            value = self._called(_OBJECTIVE, self._scalar, aliases, differentiated=True)
            recording.returned([value])
            if first:  # find what is differentiated around the call
                recording.refuse_past_arguments("The inner solver's function")
                self.captured += recording.captured()
            if twice:
                has_fused(graph(value).nodes, again=True)
            gradient = gradient_of(value, aliases, create_graph=twice)
            for position, leaf in enumerate(gradient):
                if leaf is None:
                    raise NotConnected(
                        f"The objective does not depend on {self.tree.variable_path(position)}. "
                        "Leave that leaf out of init, or use it: a module must be called as torch."
                        "func.functional_call(module, params, args), and a .detach(), .item() or "
                        "torch.no_grad() inside cuts the connection.",
                        leaf=self.tree.variable_path(position),
                    )
            return value.detach(), gradient, Replay(gradient, aliases) if twice else None

        value, gradient, hessian = record(evaluate, self.layout.split(x), [self.tree])
        value = alive(value).to(x.dtype).unsqueeze(-1)
        return value, self._flat_gradient(gradient, x), hessian

    def _flat_gradient(self, leaves: Any, x: Tensor) -> Tensor:
        if any(leaf is None for leaf in leaves):
            leaves = filled(leaves, self.layout.split(x))
        return self._flat([alive(leaf.detach()) for leaf in leaves])
