"""Draws docs/pictures/decisions.png: which method, rank, decomposition, and way to run the result.

python docs/draw_decisions.py
"""

from pathlib import Path

from matplotlib.figure import Figure

FILE = Path(__file__).parent / "pictures" / "decisions.png"
DECISIONS = {
    "Which method?": [
        ("4 to 16 images per class", "BitFit or LoRA r=1"),
        ("the file may have any size", "LoRA r=8"),
        ("small files, or many tasks", "FacT"),
    ],
    "Which rank?": [
        ("to start with", "rank=16"),
        ("as few bytes as possible", "rank=4"),
        ("more accuracy", "rank=32"),
    ],
    "Which decomposition?": [
        ("to start with", '"tt"'),
        ("fewer parameters at the same rank", '"tk"'),
    ],
    "How do I run it?": [
        ("one task", "merge_and_unload()"),
        ("a few tasks, one at a time", "set_adapter()"),
        ("many tasks in one batch", "AdapterPool"),
        ("on a LoRA server", "save_as_lora()"),
    ],
}
QUESTION, ANSWER, ARROW = "#dde8f3", "#4477aa", "#888888"


def main() -> None:
    height = sum(1.2 + len(cases) for cases in DECISIONS.values())
    figure = Figure(figsize=(6.2, 0.4 * height))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 10), ylim=(height, 0))
    axes.axis("off")
    y = 0.6
    for question, cases in DECISIONS.items():
        box = {"boxstyle": "round,pad=0.35", "facecolor": QUESTION, "edgecolor": "none"}
        axes.text(0.25, y, question, va="center", fontsize=13, weight="bold", bbox=box)
        bottom = y + len(cases)
        axes.plot([0.35, 0.35], [y + 0.45, bottom], color=ARROW, linewidth=1.2)
        for number, (case, answer) in enumerate(cases, start=1):
            axes.plot([0.35, 0.7], [y + number] * 2, color=ARROW, linewidth=1.2)
            axes.text(0.8, y + number, case, va="center", fontsize=12.5)
            axes.annotate(
                "", (6.45, y + number), (5.95, y + number), arrowprops={"arrowstyle": "->", "color": ARROW, "lw": 1.2}
            )
            axes.text(6.6, y + number, answer, va="center", fontsize=12.5, color=ANSWER, weight="bold")
        y = bottom + 1.2
    figure.savefig(FILE, dpi=120)


if __name__ == "__main__":
    main()
