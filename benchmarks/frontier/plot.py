"""The plot of accuracy against trainable parameters."""

from collections.abc import Mapping
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd

from benchmarks.frontier.methods import Method
from benchmarks.frontier.report import FACT, GRADIENTS, ORTHOGONAL, OTHERS, frontier, is_fact, sides

COLOURS = {FACT: "black", ORTHOGONAL: "tab:blue", GRADIENTS: "tab:green", OTHERS: "tab:red"}
COLUMNS = 3


def plot(panels: Mapping[str, pd.DataFrame], methods: Mapping[str, Method], file: Path) -> None:
    """A panel for each group of points: of methods by family, and the frontier of FacT and of the others.

    Bars are the standard deviation over seeds where there are several, else the sampling error of the test images.

    Args:
        panels: Points as `report.means` and `report.summary` give them, by title.
        methods: Those that are shown.
        file: Where it goes, as PNG.
    """
    matplotlib.use("Agg")
    families = sorted({method.family for method in methods.values()}, key=lambda family: (not is_fact(family), family))
    colours = dict(zip(families, plt.get_cmap("tab20").colors, strict=False))
    num_columns = 2 if len(panels) == COLUMNS + 1 else min(len(panels), COLUMNS)
    num_rows = -(-len(panels) // num_columns)
    figure, axes = plt.subplots(num_rows, num_columns, figsize=(4.4 * num_columns, 4 * num_rows), squeeze=False)
    for axis, (title, points) in zip(axes.flat, panels.items(), strict=False):
        points = points[points["method"].isin(methods)]
        for _, row in points[points["parameters"] == 0].iterrows():
            axis.axhline(row["mean"], color="grey", linestyle=":", linewidth=1, label="linear probe")
        points = points[points["parameters"] > 0]
        for _, row in points.iterrows():
            family = methods[row["method"]].family
            style = {"marker": "o", "markersize": 6} if is_fact(family) else {"marker": "s", "markersize": 5}
            error = row["std"] if row["num_seeds"] > 1 else row["sampling"]
            axis.errorbar(
                row["parameters"], row["mean"], error, color=colours[family], label=family, capsize=2, elinewidth=0.8,
                **style,
            )  # fmt: skip
        for name, of_side in sides(points).items():
            if of_side:
                sizes, accuracies = zip(*frontier(of_side), strict=True)
                axis.step(
                    [*sizes, points["parameters"].max()], [*accuracies, accuracies[-1]], where="post",
                    color=COLOURS[name], linewidth=1, linestyle="--" if name == OTHERS else "-",
                    label=f"frontier of {name}",
                )  # fmt: skip
        axis.set(xscale="log", title=title, xlabel="trainable parameters without head", ylabel="test accuracy, %")
        axis.grid(alpha=0.3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    entries = {
        label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        entries.values(), entries.keys(), loc="lower center", ncols=2 * num_columns, frameon=False, fontsize=8
    )
    figure.tight_layout(rect=(0, 0.12 if num_rows > 1 else 0.2, 1, 1))
    figure.savefig(file, dpi=80)
    plt.close(figure)
