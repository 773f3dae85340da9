"""Draws docs/pictures/accuracy_by_size.png, the picture of README, from results of `benchmarks.frontier`.

    python -m docs.draw_accuracy

A point is a method: its mean test accuracy over the eleven tasks that had no part in the choice of the learning rate,
against the bytes of its trained numbers in float32, without the head. A bar is the sampling error of that mean.
"""

from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.frontier.report import fixed, means, read

FILE = Path(__file__).parent / "pictures" / "accuracy_by_size.png"
RESULTS = Path(__file__).parents[1] / "benchmarks" / "frontier" / "results" / "vit-s14-tiny-imagenet-42px"
CHOOSING = ["dtd10", "rsscn7", "yaleb-azimuth"]
DEFAULT = "FacT-TT r=16, orthogonal"
# Of every method its name in the picture, where the name stands relative to the point, in points, and its alignment.
FACT = {
    "FacT-TK r=8, orthogonal": ("FacT-TK r=8", (8, -18), "left"),
    DEFAULT: ("FacT-TT r=16\n(the default)", (-12, 10), "right"),
    "FacT-TT r=32, orthogonal": ("FacT-TT r=32", (0, 16), "center"),
}
OTHERS = {
    "VPT-deep p=10": ("VPT-deep, 10 prompts", (0, -24), "center"),
    "BitFit": ("BitFit", (10, -20), "left"),
    "LoRA r=1": ("LoRA r=1", (12, -10), "left"),
    "LoRA r=8": ("LoRA r=8", (10, 6), "left"),
    "full fine-tuning": ("full fine-tuning", (0, -26), "center"),
}
PROBE = "linear probe"


def accuracies() -> pd.DataFrame:
    """Bytes, mean accuracy and its sampling error, by method."""
    runs = fixed(read(RESULTS), CHOOSING)
    points = means(runs, sorted(set(runs["task"]))).set_index("method")
    return points.assign(bytes=4 * points["parameters"])


def main() -> None:
    points = accuracies()
    print(points[["bytes", "mean", "sampling"]].loc[[PROBE, *FACT, *OTHERS]].to_string())
    figure = Figure(figsize=(6.6, 4.7), layout="constrained")
    axes = figure.subplots()
    for group, colour, marker in ((OTHERS, "dimgrey", "s"), (FACT, "tab:blue", "o")):
        shown = points.loc[list(group)]
        axes.errorbar(
            shown["bytes"],
            shown["mean"],
            shown["sampling"],
            color=colour,
            marker=marker,
            markersize=8,
            linestyle="-" if group is FACT else "none",
            capsize=3,
            zorder=3 if group is FACT else 2,
        )
        for method, (name, offset, alignment) in group.items():
            where = points.loc[method, "bytes"], points.loc[method, "mean"]
            weight = "bold" if method == DEFAULT else "normal"
            axes.annotate(
                name, where, offset, textcoords="offset points", ha=alignment, color=colour, fontsize=12, weight=weight
            )
    default = points.loc[DEFAULT]
    axes.plot(default["bytes"], default["mean"], marker="o", markersize=17, markerfacecolor="none", color="tab:blue")
    probe = points.loc[PROBE]
    axes.axhline(probe["mean"], color="dimgrey", linestyle=":")
    axes.axhspan(
        probe["mean"] - probe["sampling"], probe["mean"] + probe["sampling"], color="grey", alpha=0.15, linewidth=0
    )
    axes.annotate(f"{PROBE} (trains the head only)", (2.2e4, probe["mean"] + 0.8), color="dimgrey", fontsize=12)
    axes.set(xscale="log", xlim=(1.5e4, 3e8), ylim=(53.5, 69))
    axes.set_xticks([1e5, 1e6, 1e7, 1e8], ["100 KB", "1 MB", "10 MB", "100 MB"])
    axes.minorticks_off()
    axes.tick_params(labelsize=12)
    axes.set_xlabel("size of what is trained for a task, without the head", fontsize=12)
    axes.set_ylabel("test accuracy, %", fontsize=12)
    axes.set_title("FacT r=16 matches LoRA r=1 with 40 % fewer parameters", fontsize=13, loc="left", pad=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(FILE, dpi=140)


if __name__ == "__main__":
    main()
