"""Draws the pictures of accuracy against size in docs/pictures, from results of `benchmarks.frontier`.

    python -m docs.draw_accuracy

A point is a method and its mean test accuracy over tasks, against the bytes of its trained parameters in float32,
without the head. ``accuracy_by_size.png`` is the picture of README. It shows the ten tasks that had no part in the
choice of the learning rate, and a bar is the sampling error of the mean. ``accuracy_on_toy_tasks.png`` shows five tasks
made by rule, for each method with the best of three learning rates on each task, and a bar is the standard deviation
over three seeds. FacT-TT r=8 and FacT-TK r=32, which are below smaller sizes of FacT, are left out.
"""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.frontier.report import chosen, fixed, means, read

PICTURES = Path(__file__).parent / "pictures"
FRONTIER = Path(__file__).parents[1] / "benchmarks" / "frontier"
CHOOSING = ["dtd10", "rsscn7", "yaleb-azimuth", "gtsrb"]
PROBE = "linear probe"
DEFAULT = "FacT-TT r=16, orthogonal"
OURS, THEIRS = "tab:blue", "dimgrey"
# Of every method its name in the picture, the offset of the name from the point, in points, and its alignment.
Names = Mapping[str, tuple[str, tuple[int, int], str]]

REAL: tuple[Names, Names] = (
    {
        "FacT-TT r=4, orthogonal": ("TT r=4", (8, -16), "left"),
        "FacT-TK r=8, default scale": ("FacT-TK r=8", (8, -16), "left"),
        "FacT-TK r=16, default scale": ("TK r=16", (8, -18), "left"),
        DEFAULT: ("FacT-TT r=16\n(the default)", (-26, 36), "right"),
        "FacT-TK r=32, default scale": ("TK r=32", (6, -20), "left"),
        "FacT-TT r=32, orthogonal": ("TT r=32", (8, -18), "left"),
    },
    {
        "LoRA r=1, q and v": ("LoRA r=1,\nq and v", (-8, 8), "right"),
        "BitFit": ("BitFit", (-2, -36), "center"),
        "LoRA r=1": ("LoRA r=1", (-6, 12), "right"),
        "LoRA r=2": ("LoRA r=2", (-4, 12), "right"),
        "LoRA r=8": ("LoRA r=8", (0, 18), "center"),
    },
)
TOY: tuple[Names, Names] = (
    {
        "FacT-TT r=2, orthogonal": ("TT r=2", (-8, 6), "right"),
        "FacT-TK r=4, orthogonal": ("TK r=4", (-8, 6), "right"),
        "FacT-TT r=4, orthogonal": ("TT r=4", (-8, 6), "right"),
        "FacT-TK r=8, orthogonal": ("FacT-TK r=8", (-8, 6), "right"),
        "FacT-TK r=12, orthogonal": ("TK r=12", (-8, 6), "right"),
        "FacT-TK r=16, orthogonal": ("TK r=16", (-8, 8), "right"),
        DEFAULT: ("FacT-TT r=16\n(the default)", (-2, 16), "center"),
    },
    {
        "TinyLoRA u=8": ("TinyLoRA u=8", (8, -16), "left"),
        "UniLoRA d=256": ("UniLoRA d=256", (6, 6), "left"),
        "LN tuning": ("LN tuning", (0, -34), "center"),
        "TinyLoRA u=64": ("TinyLoRA u=64", (4, -16), "center"),
        "FourierFT n=100, scaling 1": ("FourierFT n=100", (8, -4), "left"),
        "BitFit": ("BitFit", (8, -4), "left"),
        "UniLoRA d=4096": ("UniLoRA d=4096", (0, -46), "center"),
        "VeRA r=64": ("VeRA r=64", (13, -4), "left"),
        "LoRA r=1": ("LoRA r=1", (9, -8), "left"),
        "LoRA r=4": ("LoRA r=4", (8, 6), "left"),
        "FourierFT n=1000, scaling 1": ("FourierFT n=1000", (-4, -20), "center"),
        "VB-LoRA r=4": ("VB-LoRA r=4", (0, -34), "center"),
        "LoRA r=16": ("LoRA r=16", (7, -16), "left"),
        "full fine-tuning": ("full fine-tuning", (-8, 6), "right"),
    },
)


def measured(runs: pd.DataFrame, bar: str) -> pd.DataFrame:
    """Bytes, mean accuracy and the length of its bar, by method. `bar` is a column of `report.means`."""
    points = means(runs, sorted(set(runs["task"]))).set_index("method")
    return points.assign(bytes=4 * points["parameters"], bar=points[bar])


def draw(points: pd.DataFrame, names: tuple[Names, Names], axes: Axes, fontsize: int) -> None:
    print(points[["bytes", "mean", "bar"]].loc[[PROBE, *names[0], *names[1]]].to_string())
    for group, colour, marker, line, layer in ((names[1], THEIRS, "s", "none", 2), (names[0], OURS, "o", "-", 3)):
        shown = points.loc[list(group)]
        axes.errorbar(
            *(shown["bytes"], shown["mean"], shown["bar"]), color=colour, marker=marker, markersize=fontsize - 5,
            linestyle=line, capsize=3, zorder=layer,
        )  # fmt: skip
        for method, (name, offset, alignment) in group.items():
            where = points.loc[method, "bytes"], points.loc[method, "mean"]
            style = {"weight": "bold" if method == DEFAULT else "normal", "fontsize": fontsize, "color": colour}
            axes.annotate(name, where, offset, textcoords="offset points", ha=alignment, **style)
    default, probe = points.loc[DEFAULT], points.loc[PROBE]
    axes.plot(default["bytes"], default["mean"], "o", markersize=fontsize + 5, markerfacecolor="none", color=OURS)
    axes.axhline(probe["mean"], color=THEIRS, linestyle=":", zorder=1)
    axes.axhspan(probe["mean"] - probe["bar"], probe["mean"] + probe["bar"], color="grey", alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.tick_params(labelsize=12)
    axes.set_xlabel("size of what is trained for a task, without the head", fontsize=12)
    axes.set_ylabel("test accuracy, %", fontsize=12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.3)


def main() -> None:
    figure = Figure(figsize=(6.6, 4.7), layout="constrained")
    axes = figure.subplots()
    points = measured(fixed(read(FRONTIER / "results" / "vit-s14-tiny-imagenet-42px-bfloat16"), CHOOSING), "sampling")
    draw(points, REAL, axes, fontsize=12)
    axes.set(xlim=(1.5e4, 5e6), ylim=(55, 70))
    axes.set_xticks([1e5, 1e6], ["100 KB", "1 MB"])
    axes.annotate("linear probe (trains the head only)", (2.5e5, 57.2), color=THEIRS, fontsize=12)
    ours, theirs = points.loc["FacT-TK r=16, default scale"], points.loc["LoRA r=1, q and v"]
    claim = f"FacT and LoRA with 18,000 parameters differ by {abs(ours['mean'] - theirs['mean']):.1f} points"
    axes.set_title(claim, fontsize=13, loc="left", pad=10)
    figure.savefig(PICTURES / "accuracy_by_size.png", dpi=140)

    figure = Figure(figsize=(7.4, 5.6), layout="constrained")
    axes = figure.subplots()
    draw(measured(chosen(read(FRONTIER / "toy" / "results")), "std"), TOY, axes, fontsize=11)
    axes.set(xlim=(500, 2e6), ylim=(41.5, 65))
    axes.set_xticks([1e3, 1e4, 1e5, 1e6], ["1 KB", "10 KB", "100 KB", "1 MB"])
    axes.annotate("linear probe (trains the head only)", (4.2e4, 44.2), color=THEIRS, fontsize=11)
    axes.set_title(
        "On five toy tasks, FacT leads at every size below full fine-tuning", fontsize=13, loc="left", pad=10
    )
    figure.savefig(PICTURES / "accuracy_on_toy_tasks.png", dpi=140)


if __name__ == "__main__":
    main()
