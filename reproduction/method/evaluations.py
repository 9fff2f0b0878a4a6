"""How many evaluations a meta-gradient takes: a count that does not depend on the machine.

The convention is that of `theory`: an evaluation passes backward through the network once, be it
for a gradient, for a row of a Jacobian, for a curvature product, or for the derivative of an
unrolled step. What passes forward alone, a trial of a line search, counts as one as well.
"""

from reproduction.method.inner import STEP_SIZES
from reproduction.method.systems import Recipe, System

HESSIAN_FREE_PRODUCTS = 6  # five conjugate gradients, and the residual they end with
POWER_STEPS = 8  # by which a Neumann series finds its step size


def expected_products(system: System, budget: int) -> float:
    """Return the products of an implicit gradient's solve that uses its whole budget.

    Parameters
    ----------
    system
        Which linear solver.
    budget
        Steps or terms.

    Returns
    -------
    float
        With that for the last residual, which conjugate gradients know without, and those for the
        step size of a Neumann series.
    """
    if system.linear_solver in {"identity", "cg"}:
        return float(budget * (system.linear_solver == "cg"))
    return float(budget + 1 + (POWER_STEPS if system.linear_solver == "neumann" else 0))


def evaluations_a_task(
    recipe: Recipe, system: System, *, outputs: int, truncate: int, products: float
) -> float:
    """Count the evaluations of one task's meta-gradient.

    Parameters
    ----------
    recipe
        Inner solver and its steps.
    system
        How one differentiates.
    outputs
        Numbers that the network returns for a support set: rows of a Jacobian.
    truncate
        Through how many steps truncated back-propagation goes.
    products
        Of the implicit gradient's linear solve, as measured.

    Returns
    -------
    float
        Evaluations.
    """
    if system.adapted == "head":
        return 2.0  # the support set's and the queries' features; the head's problem has no network
    a_step = {
        "gauss-newton": outputs + len(STEP_SIZES),
        "hessian-free": 1 + HESSIAN_FREE_PRODUCTS + len(STEP_SIZES),
    }.get(recipe.inner_solver, 1)
    steps = recipe.inner_steps
    head = recipe.head_steps * (outputs + len(STEP_SIZES))
    after = {
        # The query's gradient, the inner gradient at the solution, and the linear solve.
        "implicit": 2 + products,
        "unrolled": 1 + steps,
        "truncated": 1 + min(truncate, steps),
        "first-order": 1,
        "reptile": 0,
    }[system.differentiation]
    return head + steps * a_step + after
