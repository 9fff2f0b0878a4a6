"""Flat vectors that lie in pieces on several processes, and the reductions over them.

The variables are DTensors on a one-dimensional mesh. A vector is this process's part of each of
them, one behind the other, and knows that it is a part: an operation by entries works on it as it
is, a reduction over entries is reduced over the processes too, and all else is refused. So no
solver can take a part for the whole.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .._errors import RankFailed, UnsupportedOperation
from .ranks import all_reduce
from .transforms import transforms_active

if TYPE_CHECKING:
    from .._pytrees import Tree
    from .products import Parts

_NOT_HERE = (
    "Use CG(), MINRES(), GMRES() or another method that works by products and inner products alone."
)


class Space:
    """The place of a vector's entries on the processes.

    Parameters
    ----------
    mesh : DeviceMesh
        Of one dimension: the processes.
    variables : sequence of Tensor
        DTensors on it, and plain tensors, which are whole in every process.

    Attributes
    ----------
    n, size : int
        The length of the whole vector, and of this process's part.
    counted : int
        How many entries of the part, the first ones, are counted here: what is whole in all
        processes is counted in the first.
    order : list of int
        The variables in the order in which they lie in the part.
    """

    def __init__(self, mesh: Any, variables: Sequence[Tensor]) -> None:
        self.mesh, self.group = mesh, mesh.get_group()
        self._shapes = [v.shape for v in variables]
        self.placements: list[Any] = [getattr(v, "placements", None) for v in variables]
        self.strides = [v.stride() for v in variables]
        self.local_shapes = [local_of(v).shape for v in variables]
        self.sizes = [shape.numel() for shape in self.local_shapes]
        split = [p is not None and not p[0].is_replicate() for p in self.placements]
        self.order = sorted(range(len(variables)), key=lambda i: not split[i])
        self.n = sum(shape.numel() for shape in self._shapes)
        self.size = sum(self.sizes)
        first = mesh.get_local_rank() == 0
        self.counted = sum(n for n, one in zip(self.sizes, split, strict=True) if one or first)
        self._plain = [i for i, p in enumerate(self.placements) if p is None]
        self._device = local_of(variables[0]).device

    def numbers(self, of: Callable[[Tensor], Tensor] = Tensor.clone) -> Tensor:
        """Return the numbers that the part's entries have in the vector of one process.

        Parameters
        ----------
        of : callable
            A function of them, entry by entry, to be returned in their place.

        Returns
        -------
        numbers : Tensor
            One an entry.
        """
        from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

        starts, start = [], 0
        for shape in self._shapes:
            starts.append(start)
            start += shape.numel()
        parts = []
        for i in self.order:
            shape, local = self._shapes[i], self.local_shapes[i]
            offsets: Sequence[int] = [0] * len(shape)
            if self.placements[i] is not None:
                _, offsets = compute_local_shape_and_global_offset(
                    shape, self.mesh, self.placements[i]
                )
            number = torch.full((), starts[i], device=self._device)
            for dim, (length, offset) in enumerate(zip(local, offsets, strict=True)):
                here = offset + torch.arange(length, device=self._device)
                number = number[..., None] + here * shape[dim + 1 :].numel()
            parts.append(of(number.reshape(-1)))
        return torch.cat(parts)

    def joined(self, parts: Sequence[Tensor | None], dtype: torch.dtype) -> Shards:
        """Join variables, or derivatives by them, to a vector; None stands for zeros."""
        refuse_transforms()
        flat = []
        agree("a derivative by params", [parts[i] for i in self._plain], self.group)
        for i in self.order:
            part = parts[i]
            if part is None:
                flat.append(torch.zeros(self.sizes[i], dtype=dtype, device=self._device))
            else:
                flat.append(self._local(i, part).reshape(-1).to(dtype))
        return Shards(torch.cat(flat), self)

    def parts(self, vector: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
        """Split a vector into its variables, each placed as it is."""
        from torch.distributed.tensor import DTensor

        refuse_transforms()
        if not isinstance(vector, Shards) or vector.ndim != 1:
            raise refused(f"a vector of shape {tuple(vector.shape)}")
        pieces = vector.local.split([self.sizes[i] for i in self.order])
        parts: list[Tensor] = [pieces[0]] * len(self.order)
        for i, piece in zip(self.order, pieces, strict=True):
            part = piece.reshape(self.local_shapes[i]).to(dtypes[i])
            if self.placements[i] is not None:
                part = DTensor.from_local(
                    part, self.mesh, self.placements[i], run_check=False,
                    shape=self._shapes[i], stride=self.strides[i],
                )  # fmt: skip
            parts[i] = part
        return parts

    def between(self, start: int, stop: int) -> Space:
        """Make the space of some entries of each process's part, for operations by entries."""
        space = copy.copy(self)
        space.sizes, space.size = [stop - start], stop - start
        space.counted = min(max(self.counted - start, 0), stop - start)
        return space

    def total(self, figures: Tensor, kind: str = "sum") -> Tensor:
        """Reduce the figures of all processes to those of the whole."""
        refuse_transforms()
        return all_reduce(figures, self.group, kind)

    def _local(self, i: int, part: Tensor) -> Tensor:
        """Take this process's part of a derivative by a variable, reduced where it is not yet."""
        if not is_dtensor(part):
            return part
        placements: Any = self.placements[i]
        with torch.no_grad():
            if placements is None:
                return part.full_tensor()  # type: ignore[attr-defined]
            return local_of(part.redistribute(self.mesh, placements))  # type: ignore[attr-defined]


class Shards(Tensor):
    """One process's part of a flat vector ``(*rows, n)``, which has the shape of the whole.

    Parameters
    ----------
    local : Tensor
        The part, ``(*rows, size)``.
    space : Space
        Where the entries lie.
    """

    local: Tensor
    space: Space

    @staticmethod
    def __new__(cls, local: Tensor, space: Space) -> Shards:
        """Make the vector; it shares the part's memory."""
        made = Tensor._make_wrapper_subclass(
            cls, (*local.shape[:-1], space.n), dtype=local.dtype, device=local.device
        )
        made.local, made.space = local, space
        return made

    def __init__(self, local: Tensor, space: Space) -> None:
        super().__init__()

    def __repr__(self) -> str:  # type: ignore[override]
        """Show the part."""
        return f"Shards({self.local!r} of n={self.space.n})"

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Work on the part, and reduce over the processes where entries are reduced."""
        kwargs = kwargs or {}
        name = func.__name__
        if name == "__get__":
            if func.__self__.__name__ == "_version":
                return args[0].local._version
            name = func.__self__.__name__
        if name in _ASKED:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        rule = _RULES.get(name)
        if rule is not None:
            return rule(*args, **kwargs)
        if name.strip("_") in _BY_ENTRIES or (name.startswith("__") and name[3:-2] in _REVERSED):
            return _by_entries(func, args, kwargs)
        raise refused(f"torch.{name}")

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse what has come past the rules."""
        raise refused(str(func))


def space_of(tree: Tree, variables: Sequence[Tensor]) -> Space | None:
    """Find how the vectors of some variables lie on the processes; None: they are whole.

    Parameters
    ----------
    tree : Tree
        The argument, to name variables in messages.
    variables : sequence of Tensor
        Its variables.

    Returns
    -------
    space : Space or None
        Theirs.

    Raises
    ------
    UnsupportedOperation
        If a variable is placed in a way that is not known here.
    """
    placed = [(i, v) for i, v in enumerate(variables) if is_dtensor(v)]
    if not placed:
        return None
    mesh: Any = placed[0][1].device_mesh  # type: ignore[attr-defined]
    for i, variable in placed:
        of_variable: Any = variable
        kinds = {type(p).__name__ for p in of_variable.placements}
        if of_variable.device_mesh != mesh or mesh.ndim != 1 or not kinds <= {"Shard", "Replicate"}:
            raise UnsupportedOperation(
                f"{tree.variable_path(i)} is a DTensor with placements {of_variable.placements} on "
                f"{of_variable.device_mesh}. hypergrad takes Shard and Replicate on one mesh of "
                "one dimension, the same for all: redistribute(...) it, or pass full_tensor().",
                leaf=tree.variable_path(i),
            )
    return Space(mesh, variables)


def refused(what: str) -> UnsupportedOperation:
    """Word the error for an operation that has no meaning on a part of a vector."""
    return UnsupportedOperation(
        f"The inner variables lie in pieces on several processes (DTensor), and the solver asks "
        f"for {what}, which needs the whole vector. {_NOT_HERE}",
        argument="solver",
    )


def loses_derivatives() -> bool:
    """Say whether PyTorch's DTensors lose second derivatives, as before `NestedRedistribute`."""
    from torch.distributed.tensor import _redistribute

    return not hasattr(_redistribute, "NestedRedistribute")


def lost_derivatives() -> UnsupportedOperation:
    """Word the error for exact products where they do."""
    return UnsupportedOperation(
        f"PyTorch {torch.__version__} loses second derivatives through DTensors. Form products "
        'from first derivatives, Minimum(f, products="difference"), use whole tensors, '
        "tensor.full_tensor(), or take PyTorch 2.13.",
        argument="params",
    )


def refuse_transforms() -> None:
    """Raise inside a function transform, where a collective cannot run.

    Raises
    ------
    UnsupportedOperation
        There.
    """
    if transforms_active():
        raise UnsupportedOperation(
            "The inner variables lie in pieces on several processes (DTensor), and a torch.func "
            "transform (vmap, grad, jvp, ...) is active, inside which a collective cannot run. "
            "Call outside of transforms, one problem after the other."
        )


def is_dtensor(tensor: Any) -> bool:
    """Say whether a tensor is split over, or placed on, several processes."""
    if type(tensor) is Tensor or type(tensor) is torch.nn.Parameter:
        return False
    return any(
        base.__name__ == "DTensor" and base.__module__.startswith("torch.distributed")
        for base in type(tensor).__mro__
    )


def group_of(variables: Sequence[Tensor]) -> Any:
    """Find the processes that variables are placed on; None: there are none."""
    for variable in variables:
        if is_dtensor(variable):
            refuse_transforms()
            return variable.device_mesh.get_group()  # type: ignore[attr-defined]
    return None


def is_shards(vector: Tensor) -> bool:
    """Say whether a vector is a part of one."""
    return isinstance(vector, Shards)


def local_of(tensor: Tensor) -> Tensor:
    """Take this process's part of a tensor, without a derivative."""
    if not is_dtensor(tensor):
        return tensor.detach()
    local: Tensor = tensor.detach().to_local()  # type: ignore[attr-defined]
    return local.wait() if hasattr(local, "wait") else local


def refuse_split(what: str, tensor: Tensor) -> None:
    """Raise for an outer variable that is not whole in every process.

    Raises
    ------
    UnsupportedOperation
        Naming it.
    """
    if is_dtensor(tensor) and not all(p.is_replicate() for p in tensor.placements):  # type: ignore
        raise UnsupportedOperation(
            f"{what} is a DTensor with placements {tensor.placements}; "  # type: ignore[attr-defined]
            "hyperparameters are replicated: distribute_tensor(..., [Replicate()]), or plain "
            "tensors that are the same in every process.",
            leaf=what,
        )


def whole_ones(tensors: Sequence[Tensor]) -> list[Tensor]:
    """List the tensors that are whole in every process, as plain ones."""
    return [
        local_of(t)
        for t in tensors
        if not is_dtensor(t) or all(p.is_replicate() for p in t.placements)  # type: ignore
    ]


def agree(what: str, figures: Parts, group: Any) -> None:
    """Raise if plain tensors that must be the same in all processes are not.

    Parameters
    ----------
    what : str
        What they are, for the message.
    figures : sequence of Tensor or None
        They; DTensors among them are left to PyTorch.
    group : ProcessGroup
        Who holds them.

    Raises
    ------
    RankFailed
        If the norm of one differs by more than rounding.
    """
    plain = [f.detach() for f in figures if f is not None and not is_dtensor(f)]
    if not plain:
        return
    own = torch.stack([f.to(torch.float64).norm() for f in plain])
    rank, count = torch.distributed.get_rank(group), torch.distributed.get_world_size(group)
    table = own.new_zeros(count, len(plain))
    table[rank] = own
    table = all_reduce(table, group)
    eps = max(torch.finfo(f.dtype).eps for f in plain)
    apart = (table - table[0]).abs() > 1e4 * eps * table.abs().amax(dim=0)
    if bool(apart.any()):
        other, one = apart.nonzero()[0].tolist()
        raise RankFailed(
            f"Process {other} has other numbers than process 0: {what} has the norm "
            f"{float(table[other, one]):.6g} there and {float(table[0, one]):.6g} here. Where "
            "params are DTensors every process has the same hyperparameters and replicated "
            "variables, and returns the whole loss: take full_tensor() of a DTensor before it is "
            "reduced by to_local()."
        )


def placed_like(
    parts: Parts, variables: Sequence[Tensor], inner: Sequence[Tensor]
) -> list[Tensor | None]:
    """Place derivatives as their variables are: whole, or in pieces, and summed where due.

    Parameters
    ----------
    parts, variables : sequence of Tensor
        The derivatives, and by what.
    inner : sequence of Tensor
        The inner variables, which say who must agree.

    Returns
    -------
    placed : list of Tensor or None
        Those that need nothing are as they were.
    """
    group = group_of(inner)
    if group is None:
        return list(parts)
    agree("a derivative by hparams", parts, group)
    return [
        part if part is None or not is_dtensor(part) else _placed(part.detach(), like)
        for part, like in zip(parts, variables, strict=True)
    ]


def _placed(part: Any, like: Any) -> Tensor:
    with torch.no_grad():
        placed: Tensor = (
            part.redistribute(like.device_mesh, like.placements)
            if is_dtensor(like)
            else part.full_tensor()
        )
        return placed


def whole(value: Tensor) -> Tensor:
    """Take a number of a DTensor as a plain one; it can be differentiated."""
    return value.full_tensor() if is_dtensor(value) else value  # type: ignore[attr-defined]


# What is asked of a vector and not of its entries.
_ASKED = frozenset({
    "shape", "dtype", "device", "ndim", "layout", "requires_grad", "grad_fn", "is_leaf", "is_cuda",
    "is_sparse", "is_quantized", "is_nested", "is_meta", "output_nr", "size", "dim", "numel",
    "element_size", "is_floating_point", "is_complex", "is_inference", "grad", "itemsize",
})  # fmt: skip
_BY_ENTRIES = frozenset({
    "abs", "add", "addcdiv", "addcmul", "and", "bitwise_and", "bitwise_not", "bitwise_or",
    "clamp", "clone", "contiguous", "copy", "detach", "div", "double", "empty_like", "eq", "exp",
    "expand_as", "fill", "float", "fmax", "fmin", "full_like", "ge", "gt", "iadd", "imul", "invert",
    "isfinite", "isinf", "isnan", "isub", "itruediv", "le", "lerp", "log", "logical_and",
    "logical_not", "logical_or", "lt", "masked_fill", "maximum", "minimum", "mul", "nan_to_num",
    "ne", "neg", "ones_like", "or", "pow", "reciprocal", "remainder", "rshift", "sign",
    "sqrt", "square", "sub", "to", "true_divide", "truediv", "type_as", "where", "xor", "zero",
    "zeros_like",
})  # fmt: skip
_REVERSED = frozenset({"add", "sub", "mul", "truediv", "div", "pow", "and", "or", "xor"})


def _by_entries(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Call a function of entries on the parts."""
    given = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
    known = [v for v in given if isinstance(v, Shards)]
    space = known[0].space

    def part(value: Any) -> Any:
        if isinstance(value, Shards):
            if value.space is not space and value.space.sizes != space.sizes:
                raise refused("vectors of two layouts in one operation")
            return value.local
        if isinstance(value, Tensor) and value.ndim and value.shape[-1] != 1:
            raise refused(f"an operation beside a whole tensor of shape {tuple(value.shape)}")
        return value

    result = func(*map(part, args), **{k: part(v) for k, v in kwargs.items()})
    if not isinstance(result, Tensor):
        raise refused(f"torch.{func.__name__}")
    for vector in known:  # changed in place
        if vector.local is result:
            return vector
    return Shards(result, space)


def _counted(vector: Tensor) -> Tensor:
    assert isinstance(vector, Shards)
    return vector.local[..., : vector.space.counted]


def _space(*vectors: Tensor) -> Space:
    """Find the space that vectors have in common; a plain one among them is an error."""
    for vector in vectors:
        if not isinstance(vector, Shards):
            raise refused(f"a whole tensor of shape {tuple(vector.shape)} beside parts")
    assert isinstance(vectors[0], Shards)
    return vectors[0].space


def _last(vector: Tensor, dim: Any) -> None:
    if dim is None and vector.ndim == 1:
        return
    if dim not in (-1, vector.ndim - 1, (-1,), [-1]):
        raise refused(f"a reduction over dim={dim}")


def _dot(a: Tensor, b: Tensor, *, dim: int = -1) -> Tensor:
    space = _space(a, b)
    _last(a, dim)
    return space.total(torch.linalg.vecdot(_counted(a), _counted(b)))


def _vector_norm(
    v: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> Tensor:
    space = _space(v)
    _last(v, dim)
    if ord not in (2, torch.inf):
        raise refused(f"a norm of order {ord}")
    local = torch.linalg.vector_norm(_counted(v), ord, dim=-1, keepdim=keepdim, dtype=torch.float64)
    squares = ord == 2
    total = space.total(local.square()).sqrt() if squares else _extreme(space, local, "max")
    return total.to(v.dtype if dtype is None else dtype)


def _extreme(space: Space, local: Tensor, kind: str) -> Tensor:
    """Reduce the largest, or smallest, entries; NaN where there is one."""
    wrong = torch.isnan(local)
    sign = 1.0 if kind == "max" else -1.0
    both = torch.stack([torch.where(wrong, -torch.inf, sign * local), wrong.to(local.dtype)])
    largest, unknown = space.total(both, "max")
    return torch.where(unknown > 0, torch.nan, sign * largest)


def _amax(v: Tensor, dim: Any = -1, keepdim: bool = False, *, kind: str = "max") -> Tensor:
    space = _space(v)
    _last(v, dim)
    least = -torch.inf if kind == "max" else torch.inf
    local = torch.nn.functional.pad(_counted(v), (0, 1), value=least)  # there may be none
    reduced = local.amax(-1, keepdim) if kind == "max" else local.amin(-1, keepdim)
    return _extreme(space, reduced, kind)


def _amin(v: Tensor, dim: Any = -1, keepdim: bool = False) -> Tensor:
    return _amax(v, dim, keepdim, kind="min")


def _sum(v: Tensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    space = _space(v)
    _last(v, dim)
    return space.total(_counted(v).sum(dim=-1, keepdim=keepdim, dtype=dtype))


def _any(v: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    space = _space(v)
    _last(v, dim)
    return space.total((_counted(v) != 0).sum(dim=-1, keepdim=keepdim)) > 0


def _all(v: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return ~_any(~v.to(torch.bool), dim, keepdim)


class _Values:
    """A result that has a field `values`, as `torch.median` returns."""

    def __init__(self, values: Tensor) -> None:
        self.values = values


def _median(v: Tensor, dim: Any = None, keepdim: bool = False) -> _Values:
    """Find the lower median by halving an interval of bit patterns, which are ordered as floats."""
    space = _space(v)
    _last(v, dim)
    whole = {torch.float64: torch.int64, torch.float32: torch.int32}[v.dtype]
    bits = torch.finfo(v.dtype).bits
    plain, most = _counted(v).contiguous().view(whole), 2 ** (bits - 1) - 1
    # Below zero they run backwards.
    patterns = (plain >> (bits - 1)).bitwise_and_(most).bitwise_xor_(plain)
    low = torch.full((*v.shape[:-1], 1), -most - 1, device=patterns.device)
    high = torch.full_like(low, most)
    wanted = (space.n - 1) // 2 + 1
    for _ in range(bits):
        middle = (low >> 1) + (high >> 1) + (low & high & 1)
        enough = space.total((patterns <= middle.to(whole)).sum(dim=-1, keepdim=True)) >= wanted
        low, high = torch.where(enough, low, middle + 1), torch.where(enough, middle, high)
    pattern = torch.where(high < 0, high ^ most, high).to(whole)
    value = pattern.view(v.dtype)
    return _Values(value if keepdim else value[..., 0])


def _stack(vectors: Sequence[Tensor], dim: int = 0) -> Tensor:
    space = _space(*vectors)
    if dim in (-1, vectors[0].ndim):
        raise refused("vectors stacked along their entries")
    locals_ = [v.local for v in vectors if isinstance(v, Shards)]
    return Shards(torch.stack(locals_, dim=dim), space)


def _item(v: Tensor, index: Any) -> Tensor:
    """Take the first entry of the whole vector, or put an axis in front of the entries."""
    space = _space(v)
    assert isinstance(v, Shards)
    index = index if isinstance(index, tuple) else (index,)
    if index == ():
        return v
    if index == (Ellipsis, None, slice(None)):
        return Shards(v.local[index], space)
    if len(index) == 2 and index[0] is Ellipsis and index[1] in (0, slice(None, 1)):
        mine = _counted(v)
        here = space.numbers()[: space.counted] == 0
        entry = space.total(torch.where(here, mine, torch.zeros_like(mine)).sum(dim=-1))
        return entry if index[1] == 0 else entry[..., None]
    raise refused(f"entries {index}")


def _reshape(v: Tensor, *shape: Any) -> Tensor:
    _space(v)
    flat = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if v.ndim != 1 or len(flat) != 1 or flat[0] not in (-1, v.shape[-1]):
        raise refused(f"a vector reshaped to {flat}")
    return v


def _expand(v: Tensor, *shape: Any) -> Tensor:
    space = _space(v)
    assert isinstance(v, Shards)
    flat = tuple(shape[0]) if len(shape) == 1 and not isinstance(shape[0], int) else shape
    if flat[-1] not in (-1, v.shape[-1]):
        raise refused(f"a vector expanded to {flat}")
    return Shards(v.local.expand(*flat[:-1], -1), space)


def _permute(v: Tensor, *dims: Any) -> Tensor:
    _space(v)
    if v.ndim != 1:
        raise refused("a vector with task dimensions")
    return v


def _new(name: str) -> Callable[..., Tensor]:
    def make(v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        assert isinstance(v, Shards)
        made: Tensor = getattr(v.local, name)(*args, **kwargs)
        return made

    return make


_RULES: dict[str, Callable[..., Any]] = {
    "vecdot": _dot, "linalg_vecdot": _dot, "dot": _dot, "vdot": _dot, "inner": _dot,
    "vector_norm": _vector_norm, "linalg_vector_norm": _vector_norm,
    "sum": _sum, "amax": _amax, "amin": _amin, "any": _any, "all": _all, "median": _median,
    "stack": _stack, "__getitem__": _item, "reshape": _reshape, "view": _reshape,
    "expand": _expand, "permute": _permute,
    "new_empty": _new("new_empty"), "new_zeros": _new("new_zeros"),
    "new_ones": _new("new_ones"), "new_full": _new("new_full"), "new_tensor": _new("new_tensor"),
}  # fmt: skip


def unknown_like(vector: Tensor) -> Tensor:
    """Make a vector of NaN that takes no memory."""
    local = vector.local if isinstance(vector, Shards) else vector
    unknown = local.new_full((), torch.nan).expand_as(local)
    return Shards(unknown, vector.space) if isinstance(vector, Shards) else unknown


def cut(vector: Tensor, number: int, count: int) -> Tensor:
    """Take one of so many pieces of each process's part, as a vector of those entries alone."""
    if not isinstance(vector, Shards):
        return vector
    size = vector.local.shape[-1]
    start, stop = size * number // count, size * (number + 1) // count
    return Shards(vector.local[..., start:stop], vector.space.between(start, stop))


def numbers_of(like: Tensor, of: Callable[[Tensor], Tensor] = Tensor.clone) -> Tensor:
    """Return a function of the numbers of a vector's entries from zero, also of a part's."""
    if isinstance(like, Shards):
        return Shards(like.space.numbers(of), like.space)
    return of(torch.arange(like.shape[-1], device=like.device))
