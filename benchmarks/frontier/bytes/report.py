"""Table and plot of `benchmarks.frontier.bytes`, from its results alone."""

from itertools import cycle
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from benchmarks.frontier.bytes.storing import AS_TRAINED
from benchmarks.frontier.report import frontier
from benchmarks.reporting.markdown import table
from benchmarks.reporting.results import Results

WAY = ["method", "storage", "head_storage", "form"]  # what is compared
COLOURS = [*plt.get_cmap("tab20").colors[::2], *plt.get_cmap("tab20").colors[1::2]]  # the light shades last
MARKERS = {"float32": "o", "float16": "s", "int8": "D", "int4": "^", "int2": "v"}


def read(folder: Path) -> pd.DataFrame:
    """One row per record, with its task.

    Raises:
        ValueError: If there are none.
    """
    frames = [Results(file).frame().assign(task=file.stem) for file in sorted(folder.glob("*.json"))]
    if not frames:
        raise ValueError(f"{folder} has no results; measure some first, with --data.")
    return pd.concat(frames, ignore_index=True)


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Of every way to store: accuracy by task (mean over seeds), their mean, its loss to float32, mean bytes and error.

    The mean is of ways that were measured on all tasks; the loss is to the same trainings in float32. "seeds" is the
    number that every task has.
    """
    by_task = runs.pivot_table(index=WAY, columns="task", values="test_accuracy", sort=False)
    rows = by_task.assign(mean=by_task.mean(axis=1, skipna=False))
    taken = runs.groupby(WAY, sort=False)[["bytes", *(["error"] if "error" in runs else [])]].mean()
    training = ["method", "task", "seed"]
    whole = runs[runs["storage"] == "float32"].set_index(training)["test_accuracy"]
    losses = runs.assign(change=runs["test_accuracy"] - runs[training].apply(tuple, axis=1).map(whole))
    changes = losses.pivot_table(index=WAY, columns="task", values="change", sort=False, dropna=False)
    seeds = runs.groupby([*WAY, "task"])["seed"].nunique().groupby(WAY).min()
    rows = rows.assign(change=changes.mean(axis=1, skipna=False), seeds=seeds)
    return rows.join(taken).reset_index()


def report(runs: pd.DataFrame) -> str:
    """Conditions and table as Markdown."""
    first = runs.iloc[0]
    tasks = sorted(set(runs["task"]))
    rows = []
    for _, row in summary(runs).iterrows():
        cells = [
            row["method"],
            row["storage"],
            row["head_storage"],
            "" if row["form"] == AS_TRAINED else row["form"],
            str(row["seeds"]),
            f"{row['bytes']:,.0f}",
            number(row.get("error"), "{:.1f}"),
        ]
        cells += [number(row[task], "{:.1f}") for task in tasks]
        rows.append([*cells, number(row["mean"], "{:.1f}"), number(row["change"], "{:+.1f}")])
    errors = [sampling_error(runs[runs["task"] == task]) for task in tasks]
    of_mean = np.sqrt(np.square(errors).sum()) / len(errors)
    return "\n\n".join(
        [
            f"{first['image_size']} px, {first['precision']}, {first['epochs']} epochs, batches of "
            f"{first['batch_size']}. Sampling error of an accuracy: "
            f"{min(errors):.1f} to {max(errors):.1f}, of the mean {of_mean:.1f}.",
            table(
                [
                    "method",
                    "factors",
                    "head",
                    "how",
                    "seeds",
                    "bytes",
                    "change of dW, %",
                    *tasks,
                    "mean",
                    "to float32",
                ],
                rows,
            ),
        ]
    )


def sampling_error(runs: pd.DataFrame) -> float:
    """Of one accuracy on the test images, in points."""
    share = runs["test_accuracy"].mean() / 100
    return 100 * float(np.sqrt(share * (1 - share) / runs["num_test"].iloc[0]))


def number(value: float | None, form: str) -> str:
    return "" if value is None or np.isnan(value) else form.format(value)


def plot(runs: pd.DataFrame, file: Path) -> None:
    """Mean accuracy against bytes a task: a colour for every method, a marker for every storage of its numbers.

    Rounded as trained. The line is what FacT reaches with at most so many bytes.
    """
    matplotlib.use("Agg")
    rows = summary(runs).dropna(subset=["mean"])
    rows = rows[rows["form"] == AS_TRAINED]
    figure, axes = plt.subplots(figsize=(8, 5.5))
    for colour, (method, group) in zip(cycle(COLOURS), rows.groupby("method", sort=False), strict=False):
        axes.plot([], [], color=colour, linestyle="", marker=".", markersize=14, label=method)
        for _, row in group.iterrows():
            axes.plot(row["bytes"], row["mean"], marker=MARKERS[row["storage"]], color=colour, markersize=7)
    ours = rows[rows["method"].str.startswith("FacT")]
    best = frontier(zip(ours["bytes"], ours["mean"], strict=True))
    if best:
        sizes, accuracies = zip(*[*best, (rows["bytes"].max(), best[-1][1])], strict=True)
        axes.step(sizes, accuracies, where="post", color="black", linewidth=1, zorder=0, label="best of FacT")
    for storage, marker in MARKERS.items():
        axes.plot([], [], color="grey", linestyle="", marker=marker, label=storage)
    axes.set(xscale="log", xlabel="bytes a task: adapter, head and config", ylabel="test accuracy, mean of tasks, %")
    axes.grid(alpha=0.3, which="both")
    axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
