"""Draws docs/pictures/step_time.png from results of `benchmarks.speed`.

    python -m docs.draw_speed

A point is the median time of a training step of a ViT-B/16 at rank 16 on a CPU, relative to a step of the frozen
backbone; a bar has the quartiles.
"""

from pathlib import Path

from benchmarks.reporting.results import Results
from docs.drawing import OURS, THEIRS, name, save, start

SPEED = Path(__file__).parents[1] / "benchmarks" / "speed" / "results" / "speed.json"
COLOURS = {"FacT-TK": OURS, "FacT-TT": OURS, "VeRA": THEIRS, "LoRA": THEIRS, "full": THEIRS}


def main() -> None:
    measured = Results(SPEED).frame()
    steps = measured[measured["table"] == "step"].set_index("method")
    figure, axes = start(height=3.2)
    for height, (method, colour) in enumerate(COLOURS.items()):
        step = steps.loc[method]
        low, high = step["ratio_quartiles"]
        bar = [[step["ratio"] - low], [high - step["ratio"]]]
        axes.errorbar(step["ratio"], height, xerr=bar, color=colour, marker="o", markersize=7, capsize=3)
        name(axes, f"{step['ratio']:.2f}", (high, height), (8, 0), color=colour, va="center")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(COLOURS)), [*list(COLOURS)[:-1], "full fine-tuning"])
    axes.set(xlim=(0.97, 1.65), ylim=(len(COLOURS) - 0.5, -0.5))
    axes.set_xlabel("time of a training step, relative to the frozen backbone")
    save(figure, axes, "A training step with FacT takes 7 to 9 % longer, with LoRA 23 %", "step_time.png", grid="x")


if __name__ == "__main__":
    main()
