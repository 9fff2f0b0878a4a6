"""The three ways to differentiate through training; the build of the documentation draws them."""

import matplotlib.pyplot as plt
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

GREY, RED, BLUE = "0.45", "#c0392b", "#1f6fb2"
STEPS = ("start", "step 1", "step 2", "...", "step T")
ROWS = (
    ("Explicit (unrolled)", 0, "back through every step; memory grows with T"),
    ("Truncated", 3, "back through the last steps; the rest is left out"),
    ("Implicit", None, "one linear system at the solution; no step is stored"),
)


def box(axes, x, y, text, color=GREY, fill="white", width=0.94):
    axes.add_patch(
        FancyBboxPatch(
            (x - width / 2, y - 0.24), width, 0.48, boxstyle="round,pad=0.04",
            edgecolor=color, facecolor=fill, linewidth=1.6,
        )
    )  # fmt: skip
    axes.text(x, y, text, ha="center", va="center", fontsize=12, color="black")


def arrow(axes, start, end, color, bend=0.0, width=1.6):
    axes.add_patch(
        FancyArrowPatch(
            start, end, connectionstyle=f"arc3,rad={bend}", arrowstyle="-|>",
            mutation_scale=14, color=color, linewidth=width, shrinkA=0, shrinkB=0,
        )
    )  # fmt: skip


def row(axes, name, first, says):
    for i, text in enumerate(STEPS):
        stored = first is not None and i >= first
        box(axes, 1.3 * i, 0, text, RED if stored else GREY, "#fbeae8" if stored else "white")
        if i:
            arrow(axes, (1.3 * i - 0.79, 0), (1.3 * i - 0.51, 0), GREY)
    box(axes, 6.75, 0, "validation\nloss", width=1.2)
    arrow(axes, (5.71, 0), (6.11, 0), GREY)
    if first is None:
        box(axes, 5.2, -1.05, "solve  A u = b", BLUE, "#e6f0f9", width=1.7)
        arrow(axes, (6.6, -0.3), (6.13, -0.9), BLUE)
        arrow(axes, (4.31, -1.05), (0.55, -1.05), BLUE)
    else:
        for i in range(first + 1, len(STEPS)):
            arrow(axes, (1.3 * i, -0.3), (1.3 * i - 1.3, -0.3), RED, -0.35)
        arrow(axes, (6.7, -0.3), (5.25, -0.3), RED, -0.35)
        if first:
            arrow(axes, (1.3 * first - 0.05, -0.4), (0.55, -1.05), RED, -0.1)
        else:
            arrow(axes, (0.1, -0.34), (0.1, -0.86), RED)
    hypergradient = BLUE if first is None else RED
    axes.text(0.45, -1.05, "gradient", ha="right", va="center", fontsize=12, color=hypergradient)
    axes.set_title(name, loc="left", fontsize=14, fontweight="bold")
    axes.text(7.4, 0.62, says, ha="right", va="center", fontsize=12, color=hypergradient)
    axes.set(xlim=(-0.7, 7.5), ylim=(-1.4, 0.55), aspect="equal")
    axes.axis("off")


def draw():
    figure, axes = plt.subplots(3, 1, figsize=(8.6, 7.4), layout="constrained")
    for place, (name, first, says) in zip(axes, ROWS, strict=True):
        row(place, name, first, says)
    return figure


draw()
