"""Draw the picture of the README from a run of its program.

From the root of a clone: `python -m docs.pictures.thousand_penalties`.
"""

import re
from pathlib import Path

import matplotlib.pyplot as plt
import torch

import hypergrad

HERE = Path(__file__).parent
(PROGRAM,) = re.findall(
    r"```python\n(.*?)```", (HERE.parents[1] / "README.md").read_text(), re.DOTALL
)


def run():
    """Run the program; its names, and the weights after each step."""
    weights, argmin = [], hypergrad.argmin

    def watched(objective):
        fit = argmin(objective)

        def fit_and_keep(*args):
            w = fit(*args)
            weights.append(w.detach())
            return w

        return fit_and_keep

    names = {}
    hypergrad.argmin = watched
    try:
        exec(PROGRAM, names)
    finally:
        hypergrad.argmin = argmin
    return names, weights


def best_single(names):
    """The test loss of the one weight decay that is best on the validation set, of 17."""
    x, y = names["x"], names["y"]
    fits = [
        torch.linalg.solve(x.T @ x / 500 + rate * torch.eye(1000), x.T @ y / 500)
        for rate in torch.linspace(-4, 4, 17).exp()
    ]
    best = min(fits, key=lambda w: loss(names, "val", w))
    return loss(names, "test", best)


def loss(names, which, w):
    return ((names[f"x_{which}"] @ w - names[f"y_{which}"]) ** 2).mean().item()


def draw(names, weights, single):
    plt.rcParams.update({"font.size": 13, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.8), layout="constrained")
    for which, name in (("val", "validation"), ("test", "test")):
        left.plot([loss(names, which, w) for w in weights], label=name, linewidth=2)
    left.axhline(single, color="0.4", linestyle="--", label="test, best single decay")
    left.axhline(1, color="0.4", linestyle=":", label="noise")
    left.set(xlabel="step", ylabel="squared error", ylim=(0, None))
    left.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.62))
    decays = names["log_decay"].detach().exp().numpy()
    right.semilogy(range(50, 1000), decays[50:], ".", color="0.65", markersize=4)
    right.semilogy(range(50), decays[:50], ".", color="C3", markersize=6)
    right.set(xlabel="feature", ylabel="learnt weight decay")
    right.set_title("the 50 that count (red), and the rest", fontsize=13)
    figure.savefig(HERE / "thousand_penalties.png", dpi=130)


if __name__ == "__main__":
    torch.set_num_threads(1)
    names, weights = run()
    single = best_single(names)
    print(f"test loss: {loss(names, 'test', weights[-1]):.1f}, best single decay {single:.1f}")
    draw(names, weights, single)
