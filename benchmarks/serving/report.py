"""Table and plot of the measured service."""

from pathlib import Path

import pandas as pd

from benchmarks.reporting.markdown import table
from benchmarks.reporting.results import Results

HEADER = ["served", "requests for", "requests a second", "answered a second", "p50, ms", "p95, ms", "p99, ms"]


def rows(results: Results) -> pd.DataFrame:
    frame = results.frame()
    frame["line"] = frame["served"] + ", " + frame["requests"]
    return frame


def report(results: Results) -> str:
    def line(row: pd.Series) -> list[str]:
        latencies = ["-" if pd.isna(row[name]) else f"{row[name]:,.0f}" for name in ("p50", "p95", "p99")]
        return [
            row["served"],
            row["requests"],
            f"{row['rate']:g}",
            f"{row['throughput']:.1f}",
            *latencies,
            f"{row['unanswered']}",
            f"{row['batch']:.1f}",
        ]

    frame = rows(results)
    return table([*HEADER, "unanswered", "images a batch"], (line(row) for _, row in frame.iterrows()))


def plot(results: Results, file: Path) -> None:
    """p95 and throughput against the rate of requests."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    frame = rows(results)
    figure, (latency, throughput) = pyplot.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for name, of_line in frame.groupby("line", sort=False):
        of_line = of_line.sort_values("rate")
        latency.plot(of_line["rate"], of_line["p95"], marker="o", label=name)
        throughput.plot(of_line["rate"], of_line["throughput"], marker="o", label=name)
    limits = [0, frame["rate"].max()]
    throughput.plot(limits, limits, "k:", linewidth=1, label="all answered at once")
    latency.set_yscale("log")
    latency.set_ylabel("p95 of the latency, ms")
    throughput.set_ylabel("answers a second")
    for panel in (latency, throughput):
        panel.set_xlabel("requests a second")
        panel.set_xlim(left=0)
    throughput.legend(fontsize="small")
    figure.savefig(file, dpi=150)
    pyplot.close(figure)
