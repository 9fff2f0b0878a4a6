"""Who makes the meta-step: batched over the tasks, or in a loop over them."""

from collections.abc import Callable
from typing import Any

import higher
import torch
import torchopt
from torch import Tensor
from torch.func import functional_call, vmap

import hypergrad
from benchmarks.by_hand import conjugate_gradients
from benchmarks.imaml import CG_STEPS, MetaStep, flat_gradient
from reproduction.method.episodes import Episodes, Params
from reproduction.method.inner import GradientDescent
from reproduction.method.meta import MetaLearner

MetaGradient = Callable[[MetaStep], Tensor]


def by_hypergrad(step: MetaStep) -> Tensor:
    """As anybody calls it, with all checks on."""
    gradient = _mapped(step, return_info=False)
    return flat_gradient({name: leaf.mean(0) for name, leaf in gradient.items()})


def with_info(step: MetaStep) -> tuple[dict[str, Tensor], hypergrad.SolveInfo]:
    """The same, with the evidence of every task."""
    found: tuple[dict[str, Tensor], hypergrad.SolveInfo] = _mapped(step, return_info=True)
    return found


def _mapped(step: MetaStep, *, return_info: bool) -> Any:
    def one(params: Params, task: Episodes) -> Any:
        return hypergrad.implicit_grad(
            lambda params, meta: step.outer(params, task),
            lambda params, meta: step.inner(params, meta, task.support_x, task.support_y),
            params,
            step.meta,
            solver=hypergrad.CG(maxiter=CG_STEPS),
            inner_tol=None,  # so few steps are not meant to solve the inner problem
            return_info=return_info,
        )

    params = {name: leaf.detach() for name, leaf in step.adapted_together().items()}
    return vmap(one)(params, step.tasks)


def by_hypergrad_alone(step: MetaStep) -> Tensor:
    """The whole step as anybody writes it: inner solver and hypergradient, one task mapped."""

    def one(task: Episodes) -> Params:
        def inner(params: Params, meta: Params) -> Tensor:
            return step.inner(params, meta, task.support_x, task.support_y)

        down = hypergrad.inner_solvers.GradientDescent(step.lr, maxiter=step.steps, tol=0)
        params, _ = down(inner, step.meta, step.meta)
        found: Params = hypergrad.implicit_grad(
            lambda params, meta: step.outer(params, task),
            inner,
            params,
            step.meta,
            solver=hypergrad.CG(maxiter=CG_STEPS),
            inner_tol=None,
        )
        return found

    gradient = vmap(one)(step.tasks)
    return flat_gradient({name: leaf.mean(0) for name, leaf in gradient.items()})


#: One function, whose programs live over the rounds. A first call, which traces, returns what is
#: not compiled.
compiled: MetaGradient = hypergrad.compile(by_hypergrad_alone, on_fallback="raise")
by_inductor: MetaGradient = hypergrad.compile(
    by_hypergrad_alone, backend="inductor", on_fallback="raise"
)


def by_examples(step: MetaStep) -> Tensor:
    """As the laboratory does it: the inner loop is mapped over the tasks too."""
    gradient, _ = _learner(step).meta_gradient(step.meta, step.tasks)
    return flat_gradient(gradient)


def by_hypergrad_in_a_loop(step: MetaStep) -> Tensor:
    learner = _learner(step)
    found = [learner.task_gradient(step.meta, step.task(i))[0] for i in range(len(step))]
    return torch.stack([flat_gradient(gradient) for gradient in found]).mean(0)


def by_hand_in_a_loop(step: MetaStep) -> Tensor:
    return step.by_hand()


def by_hand_batched(step: MetaStep) -> Tensor:
    """The sum over tasks of the mapped objective, one graph, flat vectors; nothing checked."""
    count, tasks = len(step), step.tasks
    params = step.adapted_together()
    leaves = list(params.values())

    def flat(parts: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([part.reshape(count, -1) for part in parts], dim=1)

    b = flat(torch.autograd.grad(vmap(step.outer)(params, tasks).sum(), leaves))
    value = vmap(step.training_loss)(params, tasks.support_x, tasks.support_y).sum()
    slope = flat(torch.autograd.grad(value, leaves, create_graph=True))

    def product(v: Tensor) -> Tensor:
        return flat(torch.autograd.grad(slope, leaves, v, retain_graph=True)) + step.lam * v

    return step.lam * conjugate_gradients(product, b, CG_STEPS).mean(0)


def by_torchopt(step: MetaStep) -> Tensor:
    """`custom_root` around the inner steps, with its conjugate gradients."""
    names = list(step.meta)

    def slope(
        params: tuple[Tensor, ...], meta: tuple[Tensor, ...], x: Tensor, y: Tensor
    ) -> tuple[Tensor, ...]:
        def objective(params: tuple[Tensor, ...]) -> Tensor:
            named = dict(zip(names, params, strict=True))
            return step.inner(named, dict(zip(names, meta, strict=True)), x, y)

        return torch.func.grad(objective)(params)

    solve = torchopt.linear_solve.solve_cg(maxiter=CG_STEPS)

    @torchopt.diff.implicit.custom_root(slope, argnums=1, solve=solve)
    def adapt(
        params: tuple[Tensor, ...], meta: tuple[Tensor, ...], x: Tensor, y: Tensor
    ) -> tuple[Tensor, ...]:
        optimiser = torchopt.sgd(step.lr)
        params = tuple(leaf.detach().requires_grad_() for leaf in params)
        centre = {name: leaf.detach() for name, leaf in zip(names, meta, strict=True)}
        state = optimiser.init(params)
        for _ in range(step.steps):
            with torch.enable_grad():
                value = step.inner(dict(zip(names, params, strict=True)), centre, x, y)
                slopes = torch.autograd.grad(value, params)
            updates, state = optimiser.update(slopes, state, inplace=False)
            params = torchopt.apply_updates(params, updates, inplace=False)
            params = tuple(leaf.detach().requires_grad_() for leaf in params)
        return params

    found = []
    for index in range(len(step)):
        task = step.task(index)
        meta = tuple(leaf.detach().requires_grad_() for leaf in step.meta.values())
        params = adapt(tuple(step.meta.values()), meta, task.support_x, task.support_y)
        value = step.outer(dict(zip(names, params, strict=True)), task)
        gradient = torch.autograd.grad(value, meta)
        found.append(torch.cat([part.reshape(-1) for part in gradient]))
    return torch.stack(found).mean(0)


def by_higher(step: MetaStep) -> Tensor:
    """Unrolled: the derivative of the inner steps themselves, which the others do not need."""
    found = []
    for index in range(len(step)):
        task = step.task(index)
        meta = {name: leaf.detach().requires_grad_() for name, leaf in step.meta.items()}
        optimiser = torch.optim.SGD(step.network.parameters(), lr=step.lr)
        with higher.innerloop_ctx(step.network, optimiser) as (live, steps):
            start = list(meta.values())
            live.update_params(start)
            for _ in range(step.steps):
                params = list(live.parameters())
                squares = [(p - m).square().sum() for p, m in zip(params, start, strict=True)]
                value = step.loss(live(task.support_x), task.support_y)
                steps.step(value + step.lam / 2 * torch.stack(squares).sum())
            value = step.loss(live(task.query_x), task.query_y)
            gradient = torch.autograd.grad(value, start)
        found.append(torch.cat([part.reshape(-1) for part in gradient]))
    return torch.stack(found).mean(0)


BATCHED: dict[str, MetaGradient] = {
    "hypergrad": by_hypergrad,
    "hypergrad, whole step": by_hypergrad_alone,
    "hypergrad, compiled": compiled,
    "hypergrad, by reproduction": by_examples,
    "by hand, batched": by_hand_batched,
}
#: Where calls of operations take longer than their arithmetic; it takes a C++ compiler.
SMALL: dict[str, MetaGradient] = {"hypergrad, compiled by Inductor": by_inductor}
LOOPS: dict[str, MetaGradient] = {
    "hypergrad, loop": by_hypergrad_in_a_loop,
    "by hand, loop": by_hand_in_a_loop,
    "torchopt, CG": by_torchopt,
    "higher, unrolled": by_higher,
}


def _learner(step: MetaStep) -> MetaLearner:
    return MetaLearner(
        model=lambda params, x: functional_call(step.network, params, (x,)),
        loss=step.loss,
        differentiation="implicit",
        inner_solver=GradientDescent(step.steps, step.lr),
        lam=step.lam,
        linear_solver=hypergrad.CG(maxiter=CG_STEPS),
        curvature="hessian",
        clip=1e30,
    )
