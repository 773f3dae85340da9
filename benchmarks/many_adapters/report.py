"""Tables and plot of `benchmarks.many_adapters`, from its results alone."""

from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.many_adapters.batches import REFERENCE
from benchmarks.many_adapters.training import IN_TURN
from benchmarks.reporting.markdown import table
from benchmarks.reporting.results import Results


def report(results: Results) -> str:
    """All tables in Markdown."""
    frame = results.frame()
    parts = []
    for (part, device, dtype), rows in batches(frame).groupby(["part", "device", "dtype"], sort=False):
        name, image, batch = (*part.split("/"), "", "")[:3]
        parts += [f"**{name}, {image} px, batch {batch}**, {device}, {dtype.removeprefix('torch.')}", ""]
        cells = [[row.row, *times(row)] for row in rows.itertuples()]
        parts += [table(["method, different adapters", "seconds", f"by {REFERENCE!r}", "quartiles"], cells), ""]
    rows = frame[frame["part"] == "training"]
    if len(rows):
        parts += ["**training**, ViT-S, 96 px, 8 tasks, rank 8; seconds until all tasks have made a step", ""]
        cells = [[row.row, f"{row.images:.0f}", *times(row)] for row in rows.itertuples()]
        parts += [table(["", "images a task", "seconds", f"by {IN_TURN!r}", "quartiles"], cells), ""]
    rows = frame[frame["part"] == "capacity"]
    if len(rows):
        parts += ["**capacity**, rank 8, ViT-B, a head of 10 classes; milliseconds to load one", ""]
        cells = [
            [
                row.row,
                f"{row.adapters:,.0f}",
                f"{row.raw_bytes / 1e6:,.0f}",
                f"{row.bytes / row.raw_bytes:.2f}",
                f"{row.first_ms:.1f}",
                f"{row.last_ms:.1f}",
                f"{row.slowest_ms:.1f}",
            ]
            for row in rows.itertuples()
        ]
        header = ["", "adapters", "raw MB", "memory by raw", "first", "last", "slowest"]
        parts += [table(header, cells), ""]
    return "\n".join(parts)


def batches(frame: pd.DataFrame) -> pd.DataFrame:
    """Those of the results that are of forward passes."""
    return frame[~frame["part"].isin(["training", "capacity"])]


def times(row: Any) -> list[str]:
    return [f"{row.seconds:.3g}", f"{row.ratio:.2f}", "{:.2f}-{:.2f}".format(*row.ratio_quartiles)]


def plot(results: Results, file: Path) -> None:
    """Left: a batch of different adapters by one of a single adapter. Right: the time to load one more adapter."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    frame = results.frame()
    passes, capacity = batches(frame), frame[frame["part"] == "capacity"]
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 5))
    colors = {part: f"C{number}" for number, part in enumerate(passes["part"].unique())}
    for method in ("FacT", "LoRA"):
        rows = passes[passes["row"].str.fullmatch(rf"{method}, \d+")]
        for part, of_part in rows.groupby("part", sort=False):
            distinct = [int(row.rpartition(" ")[2]) for row in of_part["row"]]
            style = {"FacT": "o-", "LoRA": "x--"}[method]
            left.plot(distinct, of_part["ratio"], style, color=colors[part], label=f"{method}, {part}", alpha=0.8)
    left.set_xscale("log", base=2)
    left.set_xlabel("different adapters in the batch")
    left.set_ylabel(f"time by that of {REFERENCE!r}")
    left.legend(loc="upper center", bbox_to_anchor=(0.5, -0.15), ncols=2, fontsize=7, frameon=False)
    for row in capacity.itertuples():
        right.plot(*zip(*row.curve, strict=True), label=row.row)
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("adapters already there")
    right.set_ylabel("milliseconds to load one")
    right.legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
