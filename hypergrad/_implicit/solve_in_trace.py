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
from .._autograd.host import any_task
from .._compiled.capture import NotCaptured
from .._compiled.part import Changed, Product, as_it_is, may_stay_python
from ..solvers import CG, GMRES, MINRES, Auto, BiCGSTAB
from ..solvers._base import Solver
from ..solvers._probe import claimed, probed
from ..solvers._system import LinearSystem, NewtonStep, Probe, Solution
from ..solvers._vectors import dense_by_products
from .choices import Choices

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


def solve(choices: Choices, system: LinearSystem) -> Solution:
    """Solve a system by `Solver.solve_flat`.

    Where the call is being traced, an iteration that ends by what it sees stays Python.

    Parameters
    ----------
    choices : Choices
        The caller's, the method among them.
    system : LinearSystem
        What is solved.

    Returns
    -------
    solution : Solution
        The solution.

    Raises
    ------
    NotCaptured
        If a solve that has to stay Python cannot.
    """
    solver, figures = choices.solver, choices.figures
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
    spends = choices.looks and choices.spends and choices.judged
    # The evidence looks at the spectrum.
    by_spectrum = system.memory is not None or isinstance(solver, GMRES)
    symmetric, layout, looks = system.symmetric, system.layout, system.looks
    contraction, explores = system.contraction, system.explores
    transposed, steady, memory = system.transposed, system.steady, system.memory
    shared = system.shared
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
            shared=shared,
            dense=lambda: _dense(product, b, shared),
            steady=steady,
            memory=memory,
        )
        method = _now.get() or solver
        solution = method.solve_flat(own)
        if spends and memory is None and solution.further is None:
            _probe(method, own, solution)
        flat, form = _taken_apart(solution, figures or (spends and by_spectrum))
        if seen and form != seen[0]:
            raise Changed
        seen[:] = [form]
        return flat

    vectors = [system.b] if shared == 1 else [system.b, system.b[0]]
    flat = as_it_is(run, system.matvec, vectors, given)
    return _put_together(flat, seen[0])


def _dense(product: Product, b: Tensor, shared: int) -> Tensor:
    """Form the matrix of a product, by blocks of its columns where it is formed of blocks."""
    if shared == 1:
        return dense_by_products(product, b)
    return product(torch.eye(b.shape[-1], dtype=b.dtype, device=b.device)).mT


def _probe(solver: Solver, system: LinearSystem, solution: Solution) -> None:
    """Form the probe of the evidence here, where the spectrum can be asked for that it may need."""
    iterates = claimed(solver, solution) & (solution.iterations > 0)
    if solution.probe is None and any_task(iterates):
        solution.probe = probed(system, solution, getattr(solver, "damping", 0.0))
        solution.matvecs += solution.probe is not None


def _stays_python(solver: Solver, system: LinearSystem) -> bool:
    """Say whether an iteration is left as it is."""
    if not isinstance(solver, CG | MINRES | GMRES | BiCGSTAB | Auto) or system.noisy:
        return False
    if isinstance(solver, Auto):
        if not system.symmetric or solver.factorises(system):
            return False
        if system.b.ndim > 1 and system.shared == 1:
            return False
    elif solver.preconditioner is not None:
        return False
    budget = solver.maxiter is not None and solver.rtol is None and solver.maxiter <= _FEW
    several = system.b.ndim > 1 and system.shared == 1 and not getattr(solver, "recycle", False)
    return system.looks and not (budget and several)


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
