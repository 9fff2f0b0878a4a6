"""The linear solve of a call that is being traced: in the graph, or as it is at each replay."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, cast

import torch
from torch import Tensor

from .._autograd.branches import traced
from .._compiled.capture import NotCaptured
from .._compiled.part import Changed, Product, as_it_is, may_stay_python
from ..solvers import CG, GMRES, MINRES, Auto, BiCGSTAB
from ..solvers._base import Solver
from ..solvers._system import LinearSystem, NewtonStep, Probe, Solution
from ..solvers._vectors import dense_by_products

#: A batch with a budget of so many steps is unrolled: in a graph its small operations are quicker.
_FEW = 32
_TENSORS = (
    "x", "status", "success", "iterations", "residual_norm", "negative_curvature", "residual",
    "linear_error", "metric",
)  # fmt: skip
_STEP = ("step", "left", "beyond")
_OF_PROBE = ("rows", "hides")


#: The solver of a call that is being replayed, with a tolerance of its own.
_now: ContextVar[Solver | None] = ContextVar("hypergrad_solver", default=None)


@contextmanager
def solving_by(solver: Solver) -> Iterator[None]:
    """Let a replay in the body solve by this solver, which differs in its `rtol` at most."""
    token = _now.set(solver)
    try:
        yield
    finally:
        _now.reset(token)


def alike(solver: Solver) -> Solver:
    """Take the solver in whose place a program is kept: of all that differ in their `rtol` one."""
    if isinstance(solver, CG | MINRES | GMRES | BiCGSTAB) and solver.rtol:
        return dataclasses.replace(solver, rtol=1.0)
    return solver


def solve(solver: Solver, system: LinearSystem, *, figures: bool) -> Solution:
    """Solve a system by `Solver.solve_flat`.

    Where the call is being traced, an iteration that ends by what it sees stays Python.

    Parameters
    ----------
    solver : Solver
        The method.
    system : LinearSystem
        What is solved.
    figures : bool
        Whether the extreme eigenvalues are asked for.

    Returns
    -------
    solution : Solution
        The solution.

    Raises
    ------
    NotCaptured
        If a solve that has to stay Python cannot.
    """
    if not traced():
        return solver.solve_flat(system)
    if not (may_stay_python() and _stays_python(solver, system)):
        tolerant = may_stay_python() and alike(solver) is not solver
        if getattr(solver, "recycle", False) or tolerant:
            raise NotCaptured(f"{type(solver).__name__} is left as it is for exact products alone")
        return solver.solve_flat(system)
    given = [system.b]
    given += [t for t in (system.x0, system.condition) if t is not None]
    has_x0, has_condition = system.x0 is not None, system.condition is not None
    symmetric, layout, looks = system.symmetric, system.layout, system.looks
    contraction, explores = system.contraction, system.explores
    transposed, steady, memory = system.transposed, system.steady, system.memory
    seen: list[_Form] = []

    def run(product: Product, tensors: Sequence[Tensor]) -> list[Tensor]:
        b, *rest = tensors
        own = LinearSystem(
            matvec=product,
            b=b,
            layout=layout,
            tree=cast("Any", None),
            x0=rest[0] if has_x0 else None,
            rmatvec=product if symmetric else None,
            symmetric=symmetric,
            looks=looks,
            contraction=contraction,
            condition=rest[-1] if has_condition else None,
            explores=explores,
            transposed=transposed,
            dense=lambda: dense_by_products(product, b),
            steady=steady,
            memory=memory,
        )
        flat, form = _taken_apart((_now.get() or solver).solve_flat(own), figures)
        if seen and form != seen[0]:
            raise Changed
        seen[:] = [form]
        return flat

    flat = as_it_is(run, system.matvec, system.b, given)
    return _put_together(flat, seen[0])


def _stays_python(solver: Solver, system: LinearSystem) -> bool:
    """Say whether an iteration is left as it is."""
    if not isinstance(solver, CG | MINRES | GMRES | BiCGSTAB | Auto) or system.noisy:
        return False
    if isinstance(solver, Auto):
        if system.b.ndim > 1 or system.b.shape[-1] <= solver.dense_below or not system.symmetric:
            return False
    elif solver.preconditioner is not None:
        return False
    budget = solver.maxiter is not None and solver.rtol is None and solver.maxiter <= _FEW
    single = system.b.ndim == 1 or getattr(solver, "recycle", False)
    return system.shared == 1 and system.looks and not (budget and not single)


@dataclasses.dataclass(frozen=True)
class _Form:
    """Which figures a solution has."""

    method: str
    tensors: tuple[str, ...]
    newton: bool
    probe: bool
    figures: bool


def _taken_apart(solution: Solution, figures: bool) -> tuple[list[Tensor], _Form]:
    """List the tensors of a solution."""
    if solution.further is not None:
        raise NotCaptured(f"the solve ends with a factorisation ({solution.method})")
    names = tuple(name for name in _TENSORS if getattr(solution, name) is not None)
    newton, probe = solution.newton, solution.probe
    flat = [getattr(solution, name) for name in names]
    flat.append(torch.full_like(solution.iterations, solution.matvecs))
    if newton is not None:
        flat += [getattr(newton, name) for name in _STEP]
    if probe is not None:
        flat += [getattr(probe, name) for name in _OF_PROBE]
    if figures:
        flat.append(solution.eigenvalues)
    form = _Form(solution.method, names, newton is not None, probe is not None, figures)
    return flat, form


def _put_together(flat: list[Tensor], form: _Form) -> Solution:
    """Make a solution of them."""
    tensors = iter(flat)
    fields: dict[str, Any] = {name: next(tensors) for name in form.tensors}
    fields["matvecs"] = next(tensors)
    if form.newton:
        step, left, beyond = (next(tensors) for _ in _STEP)
        fields["newton"] = NewtonStep(step, left, beyond)
    if form.probe:
        fields["probe"] = Probe(**{name: next(tensors) for name in _OF_PROBE})
    if form.figures:
        eigenvalues = next(tensors)
        fields["spectrum"] = lambda: eigenvalues
    return Solution(**fields, method=form.method)
