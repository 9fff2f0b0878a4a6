"""Many right-hand sides at once: Jacobians, and the influence of training examples.

``python -m benchmarks.block_solves [jacobian] [influence] [retraining]``; one thread, processor
time, medians (quartiles) of interleaved rounds. The loops over test points are timed on a few of
them, and multiplied.
"""

import gc
import sys
import time
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from tempfile import TemporaryDirectory

import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits as each_loss
from torch.nn.functional import cross_entropy

import hypergrad
from benchmarks.logistic import LogisticRegression
from benchmarks.timing import in_units, seconds

ROWS, ROUNDS = 2000, 9
CASES = ((500, 32), (5000, 16))
TRAIN, TEST, UNKNOWNS, CALLS = 1000, 500, 5000, 5
LEFT_OUT = 100


def jacobians(features: int, outputs: int) -> None:
    """Time the Jacobian of predictions, in gradients of the inner loss."""
    drawn = LogisticRegression.draw(ROWS, features)
    p, x_val = drawn.to(torch.float32), drawn.x_val[:outputs].float()
    penalty = drawn.log_penalty.exp()
    exact = torch.stack([-penalty * drawn.w * drawn.solve(x) for x in drawn.x_val[:outputs]])
    leaf, rough = p.w.detach().requires_grad_(), hypergrad.CG(rtol=1e-3)

    def predictions(w: Tensor, log_penalty: Tensor) -> Tensor:
        return x_val @ w

    def by_jacobian(solver: hypergrad.CG | None, compile: bool = False) -> Tensor:
        return hypergrad.jacobian(
            predictions, p.inner, p.w, p.log_penalty, solver=solver, compile=compile
        )

    def by_jacrev(solver: hypergrad.CG | None) -> Tensor:
        fit = hypergrad.custom_argmin(p.inner, solver=solver)(lambda init, log_penalty: p.w)
        return torch.func.jacrev(lambda h: x_val @ fit(None, h))(p.log_penalty)

    def by_loop(solver: hypergrad.CG | None) -> Tensor:
        return torch.stack([
            hypergrad.implicit_grad(
                lambda w, h, x=x: x @ w, p.inner, p.w, p.log_penalty, solver=solver
            )
            for x in x_val
        ])

    sides = {
        "jacobian": partial(by_jacobian, None),
        "jacobian, compiled": partial(by_jacobian, None, True),
        "jacobian, CG()": partial(by_jacobian, hypergrad.CG()),
        "jacobian, CG(), compiled": partial(by_jacobian, hypergrad.CG(), True),
        "jacobian, CG(rtol=1e-3)": partial(by_jacobian, rough),
        "jacobian, CG(rtol=1e-3), compiled": partial(by_jacobian, rough, True),
        "jacrev through custom_argmin": partial(by_jacrev, None),
        "a loop of implicit_grad, CG()": partial(by_loop, hypergrad.CG()),
    }
    errors = {
        name: float((replayed(side).double() - exact).norm() / exact.norm())
        for name, side in sides.items()
    }

    def gradient() -> None:
        torch.autograd.grad(p.inner(leaf, p.log_penalty), leaf)

    found = in_units(seconds({"gradient": gradient, **sides}, rounds=ROUNDS, warm_up=2), "gradient")
    print(f"Jacobian of {outputs} outputs, d {features}, n {ROWS}, float32, in gradients:")
    for name in sides:
        print(f"  {name}: {found[name]}, error {errors[name]:.1e}")


def replayed(side: Callable[[], Tensor]) -> Tensor:
    """The answer of the second call: of a compiled call the first is that of the call as it is."""
    side()
    return side()


def influences() -> None:
    """Time the influence of all examples on all test points against a loop."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.logspace(0, -1, UNKNOWNS, dtype=torch.float64)

    def draw(rows: int) -> tuple[Tensor, Tensor]:
        X = torch.randn(rows, UNKNOWNS, dtype=torch.float64, generator=generator) * scale
        return X, torch.bernoulli((X @ truth).sigmoid(), generator=generator)

    truth = torch.randn(UNKNOWNS, dtype=torch.float64, generator=generator) / 5
    (X, y), (X_test, y_test) = draw(TRAIN), draw(TEST)
    ones, solver = torch.ones(TRAIN, dtype=torch.float64), hypergrad.CG(rtol=1e-8)

    def decay(w: Tensor) -> Tensor:
        return w.square().sum() / 2

    def train(w: Tensor) -> Tensor:
        return each_loss(X @ w, y, reduction="none")

    def test(w: Tensor, rows: slice = slice(None)) -> Tensor:
        return each_loss(X_test[rows] @ w, y_test[rows], reduction="none")

    fit = hypergrad.argmin(
        lambda w: train(w).sum() + decay(w), solver=hypergrad.inner_solvers.NewtonCG(tol=1e-9)
    )
    w = fit(torch.zeros_like(truth)).detach()

    def loop() -> Tensor:
        return -torch.stack([
            hypergrad.implicit_grad(
                lambda w, weights, j=j: test(w, slice(j, j + 1)).sum(),
                lambda w, weights: (weights * train(w)).sum() + decay(w),
                w,
                ones,
                solver=solver,
            )
            for j in range(CALLS)
        ])

    def block() -> Tensor:
        return hypergrad.influence(test, train, w, regulariser=decay, solver=solver)

    found = seconds({"loop": loop, "block": block}, rounds=3, warm_up=1)
    times = [TEST / CALLS * a / b for a, b in zip(found["loop"], found["block"], strict=True)]
    rows, whole = loop(), block()
    error = ((whole[:CALLS] - rows).norm(dim=1) / rows.norm(dim=1)).max()
    print(f"Influence of {TRAIN} examples on {TEST} test points, {UNKNOWNS} unknowns, float64:")
    print(f"  {sorted(times)[1]:.1f} times as fast as a loop of implicit_grad ({CALLS} of {TEST}")
    print(f"  calls timed), relative difference {float(error):.1e}")


class Digits:
    """Softmax regression on scikit-learn's digits, and what leaving an example out does."""

    decay = 1.0

    def __init__(self, train: int = 1200, test: int = 100) -> None:
        from sklearn.datasets import load_digits

        data, labels = load_digits(return_X_y=True)
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        X = torch.as_tensor(data, dtype=torch.float64)[order] / 16
        y = torch.as_tensor(labels)[order]
        self.X, self.y = X[:train], y[:train]
        self.X_test, self.y_test = X[train : train + test], y[train : train + test]
        self.W = self.fit(torch.zeros(64, 10, dtype=torch.float64), torch.ones(train))

    def train(self, W: Tensor) -> Tensor:
        return cross_entropy(self.X @ W, self.y, reduction="none")

    def test(self, W: Tensor) -> Tensor:
        return cross_entropy(self.X_test @ W, self.y_test, reduction="none")

    def penalty(self, W: Tensor) -> Tensor:
        return self.decay * W.square().sum() / 2

    def fit(self, start: Tensor, weights: Tensor) -> Tensor:
        """Train to the rounding, from a start."""
        W = start.clone().requires_grad_()
        optimiser = torch.optim.LBFGS(
            [W], max_iter=400, tolerance_grad=1e-9, tolerance_change=0.0, history_size=30,
            line_search_fn="strong_wolfe",
        )  # fmt: skip

        def closure() -> Tensor:
            optimiser.zero_grad()
            loss = (weights * self.train(W)).sum() + self.penalty(W)
            loss.backward()
            return loss

        optimiser.step(closure)
        return W.detach()

    def retrained(self) -> Tensor:
        """The change of every test loss without each of the first examples."""
        before, changes = self.test(self.W), []
        for i in range(LEFT_OUT):
            weights = torch.ones(len(self.y), dtype=torch.float64)
            weights[i] = 0
            changes.append(self.test(self.fit(self.W, weights)) - before)
        return torch.stack(changes, dim=1)

    def influence(self) -> Tensor:
        """The same to first order."""
        found = hypergrad.influence(self.test, self.train, self.W, regulariser=self.penalty)
        return found[:, :LEFT_OUT]


def by_dattri(digits: Digits) -> Tensor:
    """The same by dattri's explicit influence function, damped by the weight decay."""
    from dattri.algorithm.influence_function import IFAttributorExplicit
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader, TensorDataset

    model = torch.nn.Linear(64, 10, bias=False, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(digits.W.mT)

    def loss(params: dict[str, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
        X, y = batch
        logits = torch.func.functional_call(model, params, (torch.atleast_2d(X),))
        return cross_entropy(logits, torch.atleast_1d(y).reshape(-1))

    task = AttributionTask(loss_func=loss, model=model, checkpoints=model.state_dict())
    # Its Hessian is that of the mean.
    damping = digits.decay / len(digits.y)
    attributor = IFAttributorExplicit(task=task, regularization=damping)
    train = DataLoader(TensorDataset(digits.X, digits.y), batch_size=len(digits.y))
    test = DataLoader(TensorDataset(digits.X_test, digits.y_test), batch_size=len(digits.y_test))
    attributor.cache(train)
    scores = attributor.attribute(train, test)
    return scores.mT[:, :LEFT_OUT].detach() / len(digits.y)


def by_kronfluence(digits: Digits) -> Tensor:
    """The same by kronfluence's EK-FAC, damped by the weight decay, its labels sampled once."""
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset

    class Classification(Task):
        def compute_train_loss(
            self, batch: tuple[Tensor, Tensor], model: torch.nn.Module, sample: bool = False
        ) -> Tensor:
            logits, y = model(batch[0]), batch[1]
            if sample:
                y = logits.detach().softmax(dim=1).multinomial(1).flatten()
            return cross_entropy(logits, y, reduction="sum")

        def compute_measurement(
            self, batch: tuple[Tensor, Tensor], model: torch.nn.Module
        ) -> Tensor:
            return self.compute_train_loss(batch, model)

    # It wraps the layers within a module.
    model = torch.nn.Sequential(torch.nn.Linear(64, 10, bias=False, dtype=torch.float64))
    model.load_state_dict({"0.weight": digits.W.mT})
    task, rows, test_rows = Classification(), len(digits.y), len(digits.y_test)
    model = prepare_model(model, task)
    train = TensorDataset(digits.X, digits.y)
    test = TensorDataset(digits.X_test, digits.y_test)
    with TemporaryDirectory() as folder, torch.random.fork_rng():
        torch.manual_seed(0)  # the correlation is from 0.86 to 0.89 over seeds
        analyzer = Analyzer("digits", model, task, cpu=True, disable_tqdm=True, output_dir=folder)
        analyzer.fit_all_factors(
            "ekfac", train, per_device_batch_size=rows, factor_args=FactorArguments("ekfac")
        )
        analyzer.compute_pairwise_scores(
            "scores", "ekfac", test, train,
            per_device_query_batch_size=test_rows, per_device_train_batch_size=rows,
            # Its curvature is that of the mean, too.
            score_args=ScoreArguments(damping_factor=digits.decay / rows),
        )  # fmt: skip
        scores: Tensor = analyzer.load_pairwise_scores("scores")["all_modules"]
    return scores[:, :LEFT_OUT].double() / rows


OTHERS: dict[str, tuple[str, Callable[[Digits], Tensor]]] = {
    "dattri": ("explicit influence function", by_dattri),
    "kronfluence": ("EK-FAC", by_kronfluence),
}


def retraining() -> None:
    """Compare with training again without an example."""
    digits = Digits()
    true = digits.retrained()
    sides: dict[str, Callable[[Digits], Tensor]] = {"hypergrad.influence": Digits.influence}
    for package, (way, other) in OTHERS.items():
        if find_spec(package) is None:
            print(f"{package} is not installed, and its row is left out")
        else:
            sides[f"{package}, {way}"] = other
    print(f"{LEFT_OUT} digits left out, {len(digits.y_test)} test points, softmax regression:")
    unit = None
    for name, side in sides.items():
        side(digits)
        # kronfluence collects garbage at each step, over all that was imported here: not its work.
        gc.freeze()
        start = time.process_time()
        found = side(digits)
        took = time.process_time() - start
        gc.unfreeze()
        unit = unit or took
        correlation = torch.corrcoef(torch.stack([found.flatten(), true.flatten()]))[0, 1]
        ratio = found.norm() / true.norm()
        print(
            f"  {name}: correlation {float(correlation):.4f}, size {float(ratio):.2f} of it, "
            f"time {took / unit:.2f}"
        )


def main(chosen: list[str]) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    chosen = chosen or ["jacobian", "influence", "retraining"]
    if "jacobian" in chosen:
        for features, outputs in CASES:
            jacobians(features, outputs)
    if "influence" in chosen:
        influences()
    if "retraining" in chosen:
        retraining()


if __name__ == "__main__":
    main(sys.argv[1:])
