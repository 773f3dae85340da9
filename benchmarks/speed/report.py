"""Tables and plot of `benchmarks.speed`, from its results alone."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.reporting.results import Results
from benchmarks.speed.steps import FLOOR, SMALL, TIMED, Shape


def expected_ratio(shape: Shape) -> float:
    """Multiplications of a FacT step by those of the floor's: of the linear layers and of attention, per token.

    A d x e layer takes d e forward and as much backward, where the weight is frozen. Its increment takes r (d + e)
    forward, and twice that backward: once for the input, once for the factors. The two products of attention take
    tokens x width each, and twice that backward. Depth and the number of loaded adapters do not matter.
    """
    d = shape.width
    layers = [(d, d)] * 4 + [(d, 4 * d), (4 * d, d)]
    frozen = 2 * sum(a * b for a, b in layers) + 3 * 2 * shape.tokens * d
    return 1 + 3 * shape.rank * sum(a + b for a, b in layers) / frozen


def report(results: Results) -> str:
    """All tables in Markdown."""
    frame = results.frame()
    parts = []
    for table in TIMED:
        rows = frame[frame["table"] == table]
        if len(rows):
            parts += [f"**{table}**, batch {rows['batch'].iloc[0]}, seconds and ratio to {FLOOR!r}", ""]
            parts += ["| method | device | seconds | ratio, median | quartiles | ratio of the fastest |"]
            parts += ["|---|---|--:|--:|--:|--:|"]
            for row in rows.itertuples():
                low, high = row.ratio_quartiles
                parts.append(
                    f"| {row.method} | {row.device}, {row.dtype.removeprefix('torch.')} | {row.seconds:.4g} "
                    f"| {row.ratio:.3f} | {low:.3f}-{high:.3f} | {row.ratio_fastest:.3f} |"
                )
            parts.append("")
    rows = frame[frame["table"] == "memory"]
    if len(rows):
        parts += ["**memory** of a step beyond the built model", "", "| method | device | MB |", "|---|---|--:|"]
        parts += [f"| {row.method} | {row.device} | {row.bytes / 1e6:,.0f} |" for row in rows.itertuples()]
        parts.append("")
    rows = frame[frame["table"].str.startswith("scaling") & (frame["method"] != FLOOR)]
    if len(rows):
        parts += ["**scaling** of a step, ratio to the floor", ""]
        parts += ["| varied | value | method | ratio, median | quartiles | operations |", "|---|--:|---|--:|--:|--:|"]
        for row in rows.itertuples():
            varied, (low, high) = row.table.removeprefix("scaling: "), row.ratio_quartiles
            parts.append(
                f"| {varied} | {getattr(row, varied)} | {row.method} | {row.ratio:.3f} | {low:.3f}-{high:.3f} "
                f"| {expected_ratio(shape_of(row)):.3f} |"
            )
        parts.append("")
    return "\n".join(parts)


def shape_of(row: Any) -> Shape:
    return Shape(**{name: int(getattr(row, name)) for name in asdict(SMALL)})


def plot(results: Results, file: Path) -> None:
    """Ratio to the floor against what is varied: points with quartiles, and the line of counted operations."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    frame = results.frame()
    frame = frame[frame["table"].str.startswith("scaling") & (frame["method"] != FLOOR)]
    tables = list(dict.fromkeys(frame["table"]))
    if not tables:
        return
    figure, panels = pyplot.subplots(1, len(tables), figsize=(3.2 * len(tables), 3), sharey=True, squeeze=False)
    for panel, table in zip(panels[0], tables, strict=True):
        varied = table.removeprefix("scaling: ")
        rows = frame[frame["table"] == table].sort_values(varied)
        for method, of_method in rows.groupby("method"):
            low, high = zip(*of_method["ratio_quartiles"], strict=True)
            errors = [of_method["ratio"] - list(low), list(high) - of_method["ratio"]]
            panel.errorbar(of_method[varied], of_method["ratio"], yerr=errors, marker="o", capsize=3, label=method)
        one = rows.drop_duplicates(varied)
        expected = [expected_ratio(shape_of(row)) for row in one.itertuples()]
        panel.plot(one[varied], expected, "k--", label="operations")
        panel.set_xlabel(varied)
        panel.set_xscale("log", base=2)
        panel.set_xticks(one[varied], [str(value) for value in one[varied]])
        panel.minorticks_off()
    panels[0][0].set_ylabel("step / step of the frozen model")
    panels[0][0].legend()
    figure.tight_layout()
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
