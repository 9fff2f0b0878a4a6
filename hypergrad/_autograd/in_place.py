"""First derivatives of a loss that runs a module of several processes, by its own backward().

Through `fully_shard` and DistributedDataParallel only ``.backward()`` works: it leaves the mean of
the processes' gradients in ``.grad``. So the module's own parameters are moved in place, and all of
the caller's is put back afterwards: parameters, gradients and buffers.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .._errors import NotConnected, StructureMismatch, UnsupportedOperation
from .products import Parts
from .ranks import all_reduce, together
from .refused_modules import kind_of
from .shards import agree, local_of, refuse_transforms
from .trace import graph, notes

if TYPE_CHECKING:
    from .._pytrees import Tree


class InPlace:
    """The own parameters of a module of several processes, and how a loss is differentiated there.

    Parameters
    ----------
    module : nn.Module
        What runs: a DistributedDataParallel, or a module after `fully_shard`.
    tree : Tree
        The inner variables, which must be parameters of it.

    Attributes
    ----------
    parameters : list of Tensor
        The inner variables.
    group : ProcessGroup
        Who takes part.

    Raises
    ------
    UnsupportedOperation
        If a parameter has a hook that would be called, or the module reduces gradients in another
        way than by their mean.
    StructureMismatch
        If the inner variables are no parameters of the module.
    """

    def __init__(self, module: nn.Module, tree: Tree) -> None:
        refuse_transforms()
        self.parameters, self._tree = tree.variables, tree
        self.group = _group_of(module)
        self._entered: list[nn.Module] = []
        self._buffers: list[tuple[Tensor, Tensor]] = []
        self._grads: dict[int, tuple[Tensor, Tensor | None, Tensor | None]] = {}
        _settle(module)
        own = {id(p) for p in module.parameters()}
        if not any(id(p) in own for p in self.parameters):
            raise StructureMismatch(
                f"A loss runs a {kind_of(module)}, and {tree.name} holds none of its parameters, "
                "which are moved in place. Pass dict(module.named_parameters()) as it is, and call "
                "implicit_grad.",
                argument=tree.name,
            )
        for position, parameter in enumerate(self.parameters):
            if not parameter.is_leaf or not parameter.requires_grad:
                raise StructureMismatch(
                    f"{tree.variable_path(position)} is no parameter that backward() leaves a "
                    "gradient in. Pass dict(module.named_parameters()) as it is.",
                    leaf=tree.variable_path(position),
                )
            _refuse_hooks(tree.variable_path(position), parameter)
        for name, parameter in module.named_parameters():
            _refuse_hooks(f"{type(module).__name__}.{name}", parameter)

    @contextmanager
    def at(self, targets: Iterable[Tensor]) -> Iterator[None]:
        """Move the parameters to other values, and put everything back.

        Parameters
        ----------
        targets : iterable of Tensor
            The values, placed like the parameters: each is made when its parameter is moved.

        Yields
        ------
        None
            While they are there.
        """
        # A version counter that moved would stop a backward() of the caller's own.
        here = [local_of(p).data for p in self.parameters]
        kept = [values.clone() for values in here]
        notes().in_place = self
        try:
            with together(self.group):
                for values, target in zip(here, targets, strict=True):
                    values.copy_(local_of(target))
                yield
        finally:
            notes().in_place = None
            for module in self._entered:
                _settle(module)
            for values, before in zip(here, kept, strict=True):
                values.copy_(before)
            for buffer, before in self._buffers:
                buffer.data.copy_(before)
            for parameter, grad, copy in self._grads.values():
                parameter.grad = grad
                if grad is not None and copy is not None:
                    grad.data.copy_(copy)
            self._entered, self._buffers, self._grads = [], [], {}

    def entering(self, module: nn.Module) -> None:
        """Hear that a module of several processes is about to run, before it gathers anything."""
        if any(module is other for known in self._entered for other in known.modules()):
            return
        _settle(module)
        _refuse_settings(module)
        self._entered.append(module)
        self._buffers += [(b, b.detach().clone()) for b in module.buffers()]
        self._keep(module.parameters(), shared=getattr(module, "gradient_as_bucket_view", False))

    def backward(self, value: Tensor, aliases: Sequence[Tensor]) -> tuple[Tensor, Parts, Parts]:
        """Differentiate the mean over processes of a loss.

        Parameters
        ----------
        value : Tensor
            This process's loss, a number.
        aliases : sequence of Tensor
            What further gradients are taken by: replicated, and leaves.

        Returns
        -------
        value : Tensor
            The mean.
        by_parameters, by_aliases : list of Tensor or None
            Its gradients.

        Raises
        ------
        NotConnected
            If the loss does not depend on the parameters in this process.
        """
        leaves = {id(leaf): leaf for leaf in graph(value).leaves}
        # Of a sharded module the leaves are gathered copies.
        if not self._entered or not value.requires_grad:
            raise NotConnected(
                "In this process a loss does not depend on the parameters of the module: is its "
                "batch empty? All processes run it together: add module(x).sum() * 0 of an "
                "empty x, or leave such a batch out in all of them.",
                argument=self._tree.name,
            )
        self._keep([leaf for key, leaf in leaves.items() if key not in map(id, aliases)])
        self._keep(self.parameters)
        for leaf, _, _ in self._grads.values():
            leaf.grad = None
        value.backward()
        views = any(getattr(module, "gradient_as_bucket_view", False) for module in self._entered)
        slopes = [None if p.grad is None else p.grad.detach() for p in self.parameters]
        if views:  # the next backward would overwrite them
            slopes = [_copy(slope) for slope in slopes]
        mean, by_aliases = self._means(value, aliases)
        return mean, slopes, by_aliases

    def _keep(self, leaves: Iterable[Tensor], *, shared: bool = False) -> None:
        """Keep gradients, to be put back: with their values where the memory is another's."""
        for leaf in leaves:
            copy = _copy(leaf.grad) if shared else None
            self._grads.setdefault(id(leaf), (leaf, leaf.grad, copy))

    def _means(
        self, value: Tensor, aliases: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Take the mean over processes, as the module does of its gradients."""
        count = torch.distributed.get_world_size(self.group)
        known = [alias.grad is not None for alias in aliases]
        slopes = [torch.zeros_like(a) if a.grad is None else a.grad for a in aliases]
        figures = [value.detach().reshape(1), *[s.detach().reshape(-1) for s in slopes]]
        dtype = torch.float64 if any(f.dtype == torch.float64 for f in figures) else torch.float32
        flags = torch.tensor(known, dtype=dtype, device=value.device)
        packed = torch.cat([f.to(value.device, dtype) for f in figures] + [flags])
        total = all_reduce(packed, self.group)
        *means, flags = total.split([*[f.numel() for f in figures], len(known)])
        somewhere = (flags > 0).tolist()
        parts: list[Tensor | None] = [
            (mean / count).reshape(a.shape).to(a) if some else None
            for mean, a, some in zip(means[1:], aliases, somewhere, strict=True)
        ]
        return (means[0] / count).reshape(()).to(value), parts

    def agree(self, tensors: Sequence[Tensor]) -> None:
        """Raise if replicated tensors are not the same in all processes."""
        agree("one of the arguments", tensors, self.group)


def group_of_replicas(parameters: Sequence[Tensor]) -> Any:
    """Find the processes of a DistributedDataParallel that holds some parameters.

    A loss that fails in one process may never have reached the module there.

    Parameters
    ----------
    parameters : sequence of Tensor
        The inner variables.

    Returns
    -------
    group : ProcessGroup or None
        None: there is no such module.
    """
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_initialized()):
        return None
    wanted = {id(p) for p in parameters}
    for held in gc.get_objects():
        replicas = issubclass(type(held), nn.parallel.DistributedDataParallel)
        if replicas and any(id(p) in wanted for p in held.parameters()):
            return held.process_group
    return None


def _copy(grad: Tensor | None) -> Tensor | None:
    return None if grad is None else grad.detach().clone()


def _group_of(module: Any) -> Any:
    if kind_of(module) == "DistributedDataParallel":
        return module.process_group
    for parameter in module.parameters():
        if hasattr(parameter, "device_mesh"):
            mesh = parameter.device_mesh
            return mesh.get_group() if mesh.ndim == 1 else None
    return torch.distributed.group.WORLD


def _settle(module: nn.Module) -> None:
    """Free what sharded modules have gathered, which would not see that a part was moved."""
    for part in module.modules():
        if kind_of(part) == "FSDPModule":
            part.reshard()  # type: ignore[operator]


def _refuse_hooks(what: str, parameter: Tensor) -> None:
    """Raise where backward() would call a function of the caller's."""
    for name, made_by in (
        ("_post_accumulate_grad_hooks", "register_post_accumulate_grad_hook"),
        ("_backward_hooks", "register_hook"),
    ):
        if getattr(parameter, name, None):
            raise UnsupportedOperation(
                f"{what} has a hook ({made_by}), such as an optimiser that steps in the backward "
                'pass: products="difference" calls backward() many times, at moved parameters, and '
                "so would call it. Remove the hook (handle.remove()) around the call.",
                leaf=what,
            )


def _refuse_settings(module: Any) -> None:
    """Raise where a module does not take the mean of its processes' gradients."""
    why = ""
    if kind_of(module) == "DistributedDataParallel":
        if module._comm_hooks:
            why = "has a communication hook (register_comm_hook)"
        elif not module.require_backward_grad_sync:
            why = "is inside no_sync()"
    for part in module.modules() if kind_of(module) == "FSDPModule" else ():
        if kind_of(part) != "FSDPModule":
            continue
        state = part._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            if getattr(group, "gradient_divide_factor", None) is not None:
                why = "has a factor of its own (set_gradient_divide_factor)"
            elif group is not None and not getattr(group, "reduce_grads", True):
                why = "does not reduce gradients (set_requires_gradient_sync)"
    if why:
        raise UnsupportedOperation(
            f'A loss runs a {kind_of(module)} that {why}. With products="difference" gradients '
            "are the mean over processes, which is what it does by default: leave that out."
        )
