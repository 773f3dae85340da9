"""Draws the pictures of many adapters on one model in docs/pictures.

    python -m docs.draw_serving

``latency.png`` shows results of `benchmarks.serving`: the p95 latency of a service against the rate of requests.
``adapters_in_a_batch.png`` shows results of `benchmarks.many_adapters`: the time of a batch in which every image has an
adapter of its own, relative to the time with one FacT adapter for all images. A bar has the quartiles.
"""

from pathlib import Path

from benchmarks.many_adapters.report import batches
from benchmarks.reporting.results import Results
from benchmarks.serving.report import rows
from docs.drawing import OURS, OURS_TOO, THEIRS, THEIRS_TOO, name, save, start

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
# Of every line its name, its colour, the index of the point that the name stands at, and where it stands.
LINES = {
    "pool, uniform": ("pool of 1,000 adapters,\nuniform requests", OURS, 2, (4, -32), "left"),
    "pool, Zipf": ("pool of 1,000 adapters,\nZipf's law", OURS_TOO, 5, (6, 9), "right"),
    "one adapter, uniform": ("one adapter", THEIRS, 5, (4, -20), "center"),
    "PEFT, swapping, uniform": ("swapping with PEFT,\nuniform", THEIRS_TOO, 2, (-4, 10), "center"),
    "PEFT, swapping, Zipf": ("swapping with PEFT,\nZipf's law", THEIRS_TOO, 3, (8, 6), "left"),
}
KEEPS_UP = 1000  # ms; a service that falls behind is slower


def draw_latency() -> None:
    measured = rows(Results(BENCHMARKS / "serving" / "results" / "serving.json"))
    figure, axes = start()
    for line, (text, colour, index, offset, alignment) in LINES.items():
        points = measured[measured["line"] == line].sort_values("rate")
        axes.plot(points["rate"], points["p95"], "o-", color=colour, markersize=7)
        where = points["rate"].iloc[index], points["p95"].iloc[index]
        name(axes, text, where, offset, color=colour, ha=alignment)
    axes.set(yscale="log", xlim=(0, 106), ylim=(13, 3e4), xlabel="requests per second")
    axes.set_yticks([100, 1000, 10000], ["0.1 s", "1 s", "10 s"])
    axes.set_ylabel("95 % of the answers come within")
    pool = measured[(measured["line"] == "pool, uniform") & (measured["p95"] < KEEPS_UP)]
    claim = f"1,000 adapters in a pool keep up with {pool['rate'].max():.0f} requests per second"
    save(figure, axes, claim, "latency.png")


def draw_batches() -> None:
    measured = batches(Results(BENCHMARKS / "many_adapters" / "results" / "many_adapters.json").frame())
    figure, axes = start(height=4.2)
    shapes = []
    for part, of_part in measured.groupby("part", sort=False):
        model, image, batch = part.split("/")
        height = len(shapes)
        for method, colour in (("FacT", OURS), ("LoRA", THEIRS)):
            row = of_part[of_part["row"] == f"{method}, {batch}"].iloc[0]
            low, high = row["ratio_quartiles"]
            axes.errorbar(
                row["ratio"], height, xerr=[[row["ratio"] - low], [high - row["ratio"]]], color=colour, marker="o",
                markersize=7, capsize=3,
            )  # fmt: skip
            name(axes, f"{row['ratio']:.2f}", (row["ratio"], height), (-6, 8), color=colour)
            if height == 0:
                name(axes, method, (row["ratio"], height), (-6, 24), color=colour, weight="bold")
        shapes.append(f"{model}, {image} px,\n{batch} images")
    axes.axvline(1, color="black", linewidth=1)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.set(xlim=(0.95, 2.15), ylim=(len(shapes) - 0.6, -1.1))
    axes.set_xlabel("time of a batch, relative to one FacT adapter for all images")
    most = measured.loc[measured["row"] == "FacT, " + measured["part"].str.split("/").str[2], "ratio"].max() - 1
    claim = f"With FacT, an adapter per image takes at most {100 * most:.0f} % more time"
    save(figure, axes, claim, "adapters_in_a_batch.png", grid="x")


if __name__ == "__main__":
    draw_latency()
    draw_batches()
