"""Draws docs/pictures/accuracy_by_bytes.png, the picture of README, from results of `benchmarks.frontier`.

    python -m docs.draw_accuracy

A point is a method measured on all tasks: its mean test accuracy over the tasks against the bytes of what is trained,
without the head, as float32. On the left with one learning rate a method, which was chosen on other tasks; on the right
with that which was best on the validation images of each task.
"""

from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.frontier.report import FACT, ORTHOGONAL, chosen, fixed, frontier, means, read, side

FILE = Path(__file__).parent / "pictures" / "accuracy_by_bytes.png"
FRONTIER = Path(__file__).parents[1] / "benchmarks" / "frontier"
CHOOSING = ["dtd10", "rsscn7", "yaleb-azimuth"]
LINES = {FACT: ("tab:blue", "o", "--"), ORTHOGONAL: ("tab:blue", "o", "-")}
FAMILIES = {"LoRA": "tab:red", "VeRA": "tab:green", "full fine-tuning": "black"}
OTHER = "grey"


def family(method: str) -> str:
    """The name without rank and size: "LoRA" of "LoRA r=8"."""
    return method.partition("=")[0].rpartition(" ")[0] if "=" in method else method


def is_shown(method: str) -> bool:
    """Not the variants of FacT that were tried as remedies."""
    return side(method) not in LINES or method.partition(",")[2] in ("", " orthogonal")


def draw(points: list[tuple[str, float, float]], axes: Axes) -> None:
    """Points are method, bytes, accuracy."""
    for name, (colour, marker, line) in LINES.items():
        ours = frontier([(size, accuracy) for method, size, accuracy in points if side(method) == name])
        if ours:
            label = "FacT, authors' start" if name == FACT else "FacT"
            axes.plot(*zip(*ours, strict=True), color=colour, marker=marker, linestyle=line, label=label, zorder=3)
    others: dict[str, list[tuple[float, float]]] = {}
    for method, size, accuracy in points:
        if size == 0:
            axes.axhline(accuracy, color=OTHER, linestyle=":", linewidth=1)
            axes.annotate("linear probe", (0.99, accuracy), xycoords=("axes fraction", "data"), ha="right", va="bottom")
        elif side(method) not in LINES:
            others.setdefault(family(method), []).append((size, accuracy))
    labelled = False
    for name, group in sorted(others.items()):
        colour = FAMILIES.get(name, OTHER)
        label = name if name in FAMILIES else None if labelled else "other methods"
        labelled = labelled or name not in FAMILIES
        line = "none" if colour == OTHER else "-"
        axes.plot(*zip(*sorted(group), strict=True), color=colour, marker="s", linestyle=line, linewidth=1, label=label)
        if colour == OTHER:
            best = max(group, key=lambda point: point[1])
            axes.annotate(name, best, (-6, -7), textcoords="offset points", fontsize=9, color="dimgrey", va="top")


def panel(runs: pd.DataFrame, title: str, axes: Axes) -> None:
    """Draw one, and print its points."""
    tasks = sorted(set(runs["task"]))
    measured = means(runs, tasks)
    rows = zip(measured["method"], measured["parameters"], measured["mean"], strict=True)
    points = [(method, 4 * parameters, accuracy) for method, parameters, accuracy in rows if is_shown(method)]
    draw(points, axes)
    axes.set(xscale="log", xlabel="bytes of trained numbers, without the head", ylabel="test accuracy, %")
    axes.set_title(f"{title}, {len(tasks)} tasks")
    axes.grid(alpha=0.3)
    print(title, *tasks)
    for method, size, accuracy in sorted(points, key=lambda point: point[1]):
        print(f"{size:>12,.0f}  {accuracy:5.1f}  {method}")


def main() -> None:
    figure = Figure(figsize=(11, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    real = read(FRONTIER / "results" / "vit-s14-tiny-imagenet-42px")
    panel(fixed(real, CHOOSING), "ViT-S/14, real images, one rate", left)
    panel(chosen(read(FRONTIER / "toy" / "results")), "Small ViT, made images, rate searched", right)
    right.legend(loc="center right")
    figure.savefig(FILE, dpi=100)


if __name__ == "__main__":
    main()
