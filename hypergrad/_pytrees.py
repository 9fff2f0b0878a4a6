"""Pytrees at the border, flat vectors inside: taking arguments apart and putting them together."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedTensorMixin  # type: ignore[attr-defined]

from ._autograd.shards import Space, space_of
from ._autograd.torch_pytrees import pytree
from ._autograd.transforms import layers
from ._errors import StructureMismatch, UnsupportedOperation, argument_of

_DIFFERENTIABLE = frozenset({torch.float64, torch.float32, torch.float16, torch.bfloat16})


class Tree:
    """An argument taken apart: the tensors that a derivative can reach, and the rest.

    Floating-point tensors are variables. Integer and boolean tensors, None, numbers and, with
    ``skip_frozen``, leaves that are frozen beside others that are not, are constants.

    Parameters
    ----------
    name : str
        What the argument is called, for messages.
    value : pytree
        The argument.
    skip_frozen : bool
        Whether an `nn.Parameter` that is frozen beside tensors that are not is a constant.
    of_autograd : bool
        Whether the tensors are the variables that an optimiser of PyTorch moves. Then one that
        requires grad counts once under however many names it stands. With `skip_frozen` a plain
        tensor that does not require grad beside leaves that do is then a constant too.
    constants : bool
        Whether what cannot be a variable may stand there as a constant: a sparse tensor, say, or
        a module without parameters.
    """

    def __init__(
        self,
        name: str,
        value: Any,
        *,
        skip_frozen: bool = False,
        of_autograd: bool = False,
        constants: bool = False,
    ) -> None:
        _refuse_modules(name, value, constants=constants)
        keyed, self.spec = pytree.tree_flatten_with_path(value)
        self.name = name
        self._paths = [path for path, _ in keyed]
        for index, (_, leaf) in enumerate(keyed):
            if _is_variable(leaf):  # as most are; to name one takes as long as all of this
                continue
            _refuse_modules(self.path(index), leaf, constants=constants)
            refuse_odd(self.path(index), leaf, constants=constants)
        self.leaves = [_usable(leaf) for _, leaf in keyed]
        #: Where a tensor stands that is handed on as one, each variable once.
        self.places: list[int] = []
        #: Where a variable stands.
        self.where: list[int] = []
        #: The positions of the variables among `tensors`.
        self.variables_among_tensors: list[int] = []
        self._same: dict[int, int] = {}  # further places of a variable, and its first
        frozen = _frozen(self.leaves, of_autograd) if skip_frozen else lambda leaf: False
        first: dict[int, int] = {}
        for index, leaf in enumerate(self.leaves):
            if not is_ordinary(leaf):
                continue
            if leaf.is_complex():
                raise UnsupportedOperation(
                    f"{self.path(index)} is complex ({leaf.dtype}); hypergrad differentiates real "
                    "tensors only. Pass torch.view_as_real(tensor) and go back to complex inside "
                    "the function.",
                    leaf=self.path(index),
                )
            variable = _is_variable(leaf) and not frozen(leaf)
            if variable and of_autograd:
                own = layers(leaf)[-1]
                counts = own.requires_grad or isinstance(own, nn.Parameter)
                if counts and first.setdefault(id(own), index) != index:
                    self._same[index] = first[id(own)]
                    continue
            if variable:
                self.variables_among_tensors.append(len(self.places))
                self.where.append(index)
            self.places.append(index)
        #: All tensors of the argument, variables and constants, each variable once.
        self.tensors: list[Tensor] = [self.leaves[i] for i in self.places]
        #: The tensors that carry derivatives, in the order of the pytree.
        self.variables: list[Tensor] = [self.leaves[i] for i in self.where]

    def replace(self, index: int, constant: Tensor) -> None:
        """Put another constant in the place of one."""
        self.leaves[index] = constant
        if index in self.places:
            self.tensors[self.places.index(index)] = constant

    def path(self, index: int) -> str:
        """Name a leaf for a message, such as ``params['0.weight']``."""
        return self.name + str(pytree.keystr(self._paths[index]))

    def variable_path(self, position: int) -> str:
        """Name the variable at a position of `variables`."""
        return self.path(self.where[position])

    def refuse_constants(self) -> None:
        """Raise if a leaf is a tensor of a kind that can be a constant alone.

        Raises
        ------
        UnsupportedOperation
            Naming the leaf.
        """
        for index, leaf in enumerate(self.leaves):
            if isinstance(leaf, Tensor) and leaf.is_floating_point():
                refuse_odd(self.path(index), leaf)

    def refuse_opaque(self) -> None:
        """Raise if a leaf looks as if it carried a derivative and does not.

        Raises
        ------
        StructureMismatch
            Naming the leaf.
        """
        for index, leaf in enumerate(self.leaves):
            kind = type(leaf).__name__
            if kind == "ndarray":
                raise StructureMismatch(
                    f"{self.path(index)} is a NumPy array, which carries no derivative; pass "
                    "torch.as_tensor(...) of it.",
                    leaf=self.path(index),
                )
            if _hides_tensors(leaf):
                raise StructureMismatch(
                    f"{self.path(index)} is a {kind}, which torch does not know as a pytree, so "
                    "that the tensors in it would be constants; pass a dict or a tuple of them.",
                    leaf=self.path(index),
                )

    def refuse_constant(self) -> None:
        """Raise if no leaf can carry a derivative, or one that looks as if it could does not.

        Raises
        ------
        StructureMismatch
            Naming what is there in place of a tensor.
        """
        self.refuse_opaque()
        if not self.where:
            kinds = {
                str(leaf.dtype) if isinstance(leaf, Tensor) else type(leaf).__name__
                for leaf in self.leaves
            }
            raise StructureMismatch(
                f"{self.name} holds no floating-point tensor to differentiate with respect to "
                f"(it holds {', '.join(sorted(kinds)) or 'nothing'}). Pass a number as "
                "torch.tensor(2.0), integers as tensor.float().",
                argument=self.name,
            )

    @property
    def same(self) -> list[tuple[int, int]]:
        """The further places of variables, each with the first place of its variable."""
        return sorted(self._same.items())

    def replaced(self, tensors: Sequence[Tensor]) -> Tree:
        """Take the same argument apart with other tensors."""
        other = copy.copy(self)
        other.leaves = list(self.leaves)
        for index, value in zip(self.places, tensors, strict=True):
            other.leaves[index] = value
        other.tensors = list(tensors)
        other.variables = [other.leaves[i] for i in other.where]
        return other

    def rebuild(self, variables: Sequence[Any]) -> Any:
        """Put other variables into the argument, with the constants in their places."""
        leaves = list(self.leaves)
        for index, value in zip(self.where, variables, strict=True):
            leaves[index] = value
        return self._unflattened(leaves)

    def rebuild_tensors(self, tensors: Sequence[Any]) -> Any:
        """Put other tensors into the argument."""
        leaves = list(self.leaves)
        for index, value in zip(self.places, tensors, strict=True):
            leaves[index] = value
        return self._unflattened(leaves)

    def _unflattened(self, leaves: list[Any]) -> Any:
        for index, earlier in self._same.items():
            leaves[index] = leaves[earlier]
        return pytree.tree_unflatten(leaves, self.spec)

    def fill(self, variables: Sequence[Tensor], lead: Sequence[int] = ()) -> Any:
        """Shape a derivative like the argument: zeros where a tensor carries none.

        Parameters
        ----------
        variables : sequence of Tensor
            The derivatives by the variables.
        lead : sequence of int
            What all of them have in front of the variables' shapes.

        Returns
        -------
        derivative : pytree
            Shaped like the argument.
        """
        leaves = list(self.leaves)
        for index, value in zip(self.where, variables, strict=True):
            leaves[index] = value
        for index in set(range(len(leaves))).difference(self.where):
            if isinstance(leaf := leaves[index], Tensor):
                shape = (*lead, *leaf.shape)
                leaves[index] = torch.zeros(shape, dtype=leaf.dtype, device=leaf.device)
        return self._unflattened(leaves)

    def match(self, what: str, value: Any, cure: str = "") -> list[Tensor]:
        """Pick the leaves of `value` at the variables' places, after a check of the structure.

        Parameters
        ----------
        what : str
            What `value` is called, for messages.
        value : pytree
            What is checked.
        cure : str
            What to do where it does not match.

        Returns
        -------
        leaves : list of Tensor
            In the order of `variables`.

        Raises
        ------
        StructureMismatch
            If `value` has another structure, or a leaf another shape, dtype or device.
        """
        leaves, spec = pytree.tree_flatten(value)
        if spec != self.spec:
            raise StructureMismatch(
                f"{what} must have the structure of {self.name}: expected "
                f"{_shown(self.leaves, self.spec)}, got {_shown(leaves, spec)}.{cure}",
                argument=argument_of(what),
            )
        variables = []
        for index in self.where:
            want, got = self.leaves[index], leaves[index]
            path = what + str(pytree.keystr(self._paths[index]))
            if not isinstance(got, Tensor):
                raise StructureMismatch(
                    f"{path} must be a tensor of shape {tuple(want.shape)}, like "
                    f"{self.path(index)}; got {type(got).__name__}.{cure}",
                    leaf=path,
                )
            refuse_odd(path, got)
            for figure, expected, actual in (
                ("shape", tuple(want.shape), tuple(got.shape)),
                ("dtype", want.dtype, got.dtype),
                ("device", want.device, got.device),
            ):
                if expected != actual:
                    raise StructureMismatch(
                        f"{path} has {figure} {actual}, but {self.path(index)} has "
                        f"{figure} {expected}; they must agree."
                        + (cure if figure == "shape" else ""),
                        leaf=path,
                    )
            variables.append(got)
        return variables


def refuse_meta(*trees: Tree) -> None:
    """Raise where all variables of a problem are without values, which something has read.

    Raises
    ------
    UnsupportedOperation
        Naming the first of them.
    """
    named = [(tree.variable_path(i), v) for tree in trees for i, v in enumerate(tree.variables)]
    if named and all(variable.is_meta for _, variable in named):
        raise UnsupportedOperation(
            f"{named[0][0]} is on the meta device and has no values. Give it some, with "
            "module.to_empty(device=...) and load_state_dict.",
            leaf=named[0][0],
        )


class Layout:
    """How the variables of a pytree lie in one flat vector.

    Vectors have shape ``(*lead, n)``, where ``lead`` are task dimensions that the variables
    have in front of their own shape. The vector's `dtype` is the widest of the variables', and
    never narrower than float32; `precision` is the narrowest, to which products are rounded.
    `is_flat` says that there is one part and that it is the vector. Where variables are DTensors,
    `space` says how a vector lies on the processes; `sizes` are those of the whole.
    """

    def __init__(self, tree: Tree, variables: Sequence[Tensor], lead: int = 0) -> None:
        if not variables:
            tree.refuse_constant()
        self.shapes = [v.shape[lead:] for v in variables]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.n = sum(self.sizes)
        self.dtypes = [v.dtype for v in variables]
        self.device = variables[0].device
        for position, variable in enumerate(variables):
            if variable.device != self.device:
                raise StructureMismatch(
                    f"{tree.variable_path(position)} is on {variable.device} but "
                    f"{tree.variable_path(0)} is on {self.device}; move them to one device.",
                    leaf=tree.variable_path(position),
                )
        self.precision = max(self.dtypes, key=lambda dtype: torch.finfo(dtype).eps)
        self.dtype = torch.float32
        for dtype in self.dtypes:
            self.dtype = torch.promote_types(self.dtype, dtype)
        self.space: Space | None = space_of(tree, variables)
        one = len(variables) == 1 and len(self.shapes[0]) == 1 and self.space is None
        self.is_flat = one and self.dtypes[0] == self.dtype
        self._uniform = all(dtype == self.dtype for dtype in self.dtypes)

    def flatten(self, parts: Sequence[Tensor | None], lead: Sequence[int] = ()) -> Tensor:
        """Join the parts to one vector ``(*lead, n)``; None stands for zeros."""
        if self.is_flat and parts[0] is not None:
            return parts[0]
        if self.space is not None:
            return self.space.joined(parts, self.dtype)
        dims = len(lead) + 1
        flat = []
        for part, size in zip(parts, self.sizes, strict=True):
            if part is None:
                part = torch.zeros(*lead, size, dtype=self.dtype, device=self.device)
            elif part.ndim != dims:
                part = part.reshape(*lead, size)
            flat.append(part if self._uniform else part.to(self.dtype))
        return flat[0] if len(flat) == 1 else torch.cat(flat, dim=-1)

    def split(self, vector: Tensor) -> list[Tensor]:
        """Split a vector into its parts, each in its variable's shape and dtype."""
        if self.is_flat:
            return [vector]
        if self.space is not None:
            return self.space.parts(vector, self.dtypes)
        lead = vector.shape[:-1]
        pieces = (vector,) if len(self.sizes) == 1 else torch.split(vector, self.sizes, dim=-1)
        parts = []
        for piece, shape, dtype in zip(pieces, self.shapes, self.dtypes, strict=True):
            part = piece if len(shape) == 1 else piece.reshape(lead + shape)
            parts.append(part if self._uniform else part.to(dtype))
        return parts


class _Word:
    """A leaf, in a pytree that is shown in a message."""

    def __init__(self, leaf: Any) -> None:
        self._word = "tensor" if isinstance(leaf, Tensor) else type(leaf).__name__

    def __repr__(self) -> str:
        return self._word


def _shown(leaves: Sequence[Any], spec: pytree.TreeSpec, most: int = 300) -> str:
    """Write a pytree with the kinds of its leaves in their places, such as ``{'w': tensor}``."""
    text = repr(pytree.tree_unflatten([_Word(leaf) for leaf in leaves], spec))
    return text if len(text) <= most else f"{text[:most]} ..."


def _usable(leaf: Any) -> Any:
    """Copy an inference tensor, outside of inference mode, into one that autograd may keep."""
    if isinstance(leaf, Tensor) and leaf.is_inference() and not torch.is_inference_mode_enabled():
        return leaf.clone()
    return leaf


def _is_variable(leaf: Any) -> bool:
    return is_ordinary(leaf) and leaf.is_floating_point() and leaf.dtype in _DIFFERENTIABLE


def is_ordinary(leaf: Any) -> bool:
    """Say whether a leaf is a tensor with data of its own in rows and columns."""
    return isinstance(leaf, Tensor) and not _oddity(leaf)


def _oddity(tensor: Tensor) -> str:
    """Say why a tensor is no array of numbers, and name the cure; empty: it is one."""
    if isinstance(tensor, UninitializedTensorMixin):
        return "has no shape yet. Call the module once on data, which makes it"
    if tensor.is_nested:
        return "is a nested tensor. Pass tuple(tensor.unbind()), and put it together inside"
    if tensor.layout != torch.strided:
        return (
            f"is sparse ({tensor.layout}). Pass its values, tensor.values(), and build it inside "
            "the function from them, or pass tensor.to_dense()"
        )
    if tensor.is_quantized:
        return "is quantised. Pass tensor.dequantize()"
    return ""


def refuse_odd(path: str, leaf: Any, *, constants: bool = False) -> None:
    """Raise where a leaf is a tensor of a kind that has no derivative here.

    Parameters
    ----------
    path : str
        What the leaf is called.
    leaf : object
        It.
    constants : bool
        Whether it may be there as long as no derivative is asked of it.

    Raises
    ------
    UnsupportedOperation
        Naming the leaf.
    """
    if not isinstance(leaf, Tensor):
        return
    why = _oddity(leaf)
    if isinstance(leaf, UninitializedTensorMixin):
        constants = False
    elif not why and leaf.is_floating_point() and leaf.dtype not in _DIFFERENTIABLE:
        why = f"is of dtype {leaf.dtype}, which has no arithmetic. Pass tensor.float()"
    if why and not (constants and not leaf.requires_grad):
        so = ", so that it cannot be a variable" if constants else ""
        raise UnsupportedOperation(f"{path} {why}{so}.", leaf=path)


def _hides_tensors(leaf: Any) -> bool:
    """Say whether a leaf is a container of tensors that torch takes for one value."""
    if isinstance(leaf, Tensor):
        return False
    held = leaf if isinstance(leaf, set | frozenset) else getattr(leaf, "__dict__", {}).values()
    return any(isinstance(value, Tensor) for value in held)


def _refuse_modules(name: str, value: Any, *, constants: bool = False) -> None:
    if constants and isinstance(value, nn.Module) and _is_stateless(value):
        return
    if isinstance(value, nn.Module) or inspect.isgenerator(value):
        kind = "an nn.Module" if isinstance(value, nn.Module) else "a generator"
        raise StructureMismatch(
            f"{name} is {kind}; pass its tensors as dict(module.named_parameters()) and call it as "
            "torch.func.functional_call(module, params, args) in the function.",
            leaf=name,
        )


def _frozen(leaves: Sequence[Any], of_autograd: bool) -> Callable[[Tensor], bool]:
    """Make the test of whether a leaf is frozen beside others that are not."""
    plain = [layers(leaf)[-1] for leaf in leaves if _is_variable(leaf)]
    some = any(leaf.requires_grad for leaf in leaves if _is_variable(leaf))
    # The result of an operation may require grad by whatever it was computed from.
    chosen = of_autograd and any(t.requires_grad and t.is_leaf for t in plain)

    def frozen(leaf: Tensor) -> bool:
        if chosen:
            return not layers(leaf)[-1].requires_grad and not leaf.requires_grad
        return some and isinstance(leaf, nn.Parameter) and not leaf.requires_grad

    return frozen


def _is_stateless(module: nn.Module) -> bool:
    return next(module.parameters(), None) is None and next(module.buffers(), None) is None
