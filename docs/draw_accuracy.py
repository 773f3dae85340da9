"""Draws docs/pictures/accuracy_by_bytes.png, the picture of README, from results of `benchmarks.frontier`.

    python -m docs.draw_accuracy                                                        # of the toy frontier
    python -m docs.draw_accuracy --results benchmarks/frontier/results/vit-s14-tiny-imagenet --title "ViT-S/14"

A point is a method measured on all tasks, with the learning rate that was best on validation images: its mean test
accuracy over the tasks against the bytes of what is trained, without the head, as float32.
"""

import argparse
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.frontier.report import FACT, ORTHOGONAL, chosen, frontier, means, read, side

FILE = Path(__file__).parent / "pictures" / "accuracy_by_bytes.png"
RESULTS = Path("benchmarks/frontier/toy/results")
TITLE = "Small ViT, five tasks from photographs and digits"
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
            label = "FacT" if name == FACT else "FacT, orthogonal start"
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--title", default=TITLE, help="(default: %(default)s)")
    asked = parser.parse_args()
    runs = chosen(read(asked.results))
    measured = means(runs, sorted(set(runs["task"])))
    points = [
        (method, 4 * parameters, accuracy)
        for method, parameters, accuracy in zip(
            measured["method"], measured["parameters"], measured["mean"], strict=True
        )
        if is_shown(method)
    ]
    figure = Figure(figsize=(6.4, 5), layout="constrained")
    axes = figure.subplots()
    draw(points, axes)
    axes.set(xscale="log", xlabel="bytes of trained numbers, without the head", ylabel="test accuracy, %")
    axes.set_title(asked.title)
    axes.grid(alpha=0.3)
    axes.legend(loc="center right")
    figure.savefig(FILE, dpi=110)
    for method, size, accuracy in sorted(points, key=lambda point: point[1]):
        print(f"{size:>12,.0f}  {accuracy:5.1f}  {method}")


if __name__ == "__main__":
    main()
