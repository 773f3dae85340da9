"""Accuracy with a few images a class, at a learning rate that follows from their number: few leave none to search on.

    python -m benchmarks.frontier.shots --backbone facebook/dinov2-small --data FOLDER --rates RESULTS \\
        --choose_on dtd10 rsscn7 yaleb-azimuth --tasks flowers89 monkeys10 caltech101
    python -m benchmarks.frontier.shots --output SHOTS --write PAGE    # tables and plot of what there is

RESULTS are those of `benchmarks.frontier`; a method's rate with 1,000 images is the one with the best mean validation
accuracy on the tasks of --choose_on, and methods that were not run there are left out. With n < 1,000 images it is
multiplied by sqrt(n / 1000), for every method; the rate of the head stays. A task gives the first so many images of
every class in an order drawn by the seed, of NAME-train.parquet and, if there is one, NAME-extra16.parquet; a class
that has fewer gives all it has. Every run takes about as many steps as one on 1,000 images. Each is kept in
SHOTS/TASK.SHOTS.json and not repeated.
"""

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import pandas as pd
import torch
from tqdm.auto import tqdm

from benchmarks.frontier.backbones import load
from benchmarks.frontier.command_line import frontier_parser, parse
from benchmarks.frontier.methods import METHODS
from benchmarks.frontier.report import best_rates, is_fact, means, read
from benchmarks.frontier.search import Measurements, Protocol
from benchmarks.frontier.tasks import CACHE, Labelled, Task, decoded, read_task
from benchmarks.reporting.markdown import table, write_generated
from benchmarks.reporting.results import Results

FULL = 1000  # images of a task that is not cut


def few(task: Task, more: Labelled | None, shots: int, seed: int) -> Task:
    """The task with `shots` training images a class, drawn by the seed, of its own and of `more`."""
    train = task.train
    if more is not None:
        train = Labelled(torch.cat([train.images, more.images]), torch.cat([train.labels, more.labels]))
    order = torch.randperm(len(train.labels), generator=torch.Generator().manual_seed(seed))
    chosen = [order[train.labels[order] == label][:shots] for label in range(task.num_labels)]
    return task._replace(train=train[torch.cat(chosen)])


def measure(args: argparse.Namespace) -> None:
    """Run what is missing of the tasks, shots, seeds and methods of the command line."""
    rates = best_rates(read(args.rates), args.choose_on)
    methods = [name for name in args.methods if name in rates]
    if not methods:
        raise ValueError(
            f"--rates {args.rates} has no learning rate of {', '.join(args.methods)}; measure "
            f"{', '.join(args.choose_on)} with `python -m benchmarks.frontier` first."
        )
    backbone = load(args.backbone, args.precision)
    steps = args.epochs * math.ceil(FULL / args.batch_size)
    total = len(args.tasks) * len(args.shots) * args.num_seeds * len(methods)
    with tqdm(total=total, desc="runs", smoothing=0.1) as progress:
        for name in args.tasks:
            task = read_task(args.data, name, args.image_size, CACHE)
            extra = args.data / f"{name}-extra16.parquet"
            more = decoded(extra, args.image_size, CACHE) if extra.exists() else None
            for shots in args.shots:
                for seed in range(args.num_seeds):
                    cut = few(task, more, shots, seed)
                    epochs = math.ceil(steps / math.ceil(len(cut.train.labels) / args.batch_size))
                    measurements = Measurements(
                        backbone=backbone,
                        protocol=Protocol(epochs, args.batch_size),
                        load=lambda _, cut=cut: cut,
                        image_size=args.image_size,
                        file=lambda task, _, shots=shots: args.output / f"{task}.{shots}.json",
                        progress=progress,
                    )
                    share = math.sqrt(min(1, len(cut.train.labels) / FULL))
                    for method in methods:
                        measurements.outcome(name, method, METHODS[method], rates[method] * share, seed)


def read_shots(folder: Path) -> pd.DataFrame:
    """One row per run, with its task and its shots.

    Raises:
        ValueError: If there are none.
    """
    files = sorted(folder.glob("*.*.json"))
    if not files:
        raise ValueError(f"{folder} has no results; measure some first, with --data.")
    parts = [(file, *file.name.split(".")[:2]) for file in files]
    frames = [Results(file).frame().assign(task=task, shots=int(shots)) for file, task, shots in parts]
    return pd.concat(frames, ignore_index=True)


def by_shots(runs: pd.DataFrame) -> dict[int, pd.DataFrame]:
    """What `report.means` says of each number of shots, over all tasks."""
    tasks = sorted(set(runs["task"]))
    return {shots: means(group, tasks) for shots, group in runs.groupby("shots")}


def report(runs: pd.DataFrame) -> str:
    """Test accuracy, mean over tasks, by method and shots, smallest method first."""
    points = by_shots(runs)
    sizes = runs.groupby("method")["parameters"].mean().sort_values()
    rows = []
    for method, size in sizes.items():
        means_of = {shots: group.set_index("method")["mean"].get(method) for shots, group in points.items()}
        rows.append([method, f"{size:,.0f}", *("" if mean is None else f"{mean:.1f}" for mean in means_of.values())])
    first, tasks = runs.iloc[0], ", ".join(sorted(set(runs["task"])))
    conditions = (
        f"{first['image_size']} px, {first['precision']}. Mean test accuracy in % on {tasks}; seeds: "
        f"{runs['seed'].nunique()}."
    )
    return f"{conditions}\n\n{table(['method', 'parameters', *map(str, points)], rows)}"


def plot(points: Mapping[int, pd.DataFrame], file: Path) -> None:
    """Mean accuracy against shots, a line a method."""
    matplotlib.use("Agg")
    figure, axis = plt.subplots(figsize=(6, 4.5))
    rows = pd.concat([group.assign(shots=shots) for shots, group in points.items()])
    for method, line in sorted(rows.groupby("method"), key=lambda item: item[1]["parameters"].iloc[0]):
        style = "-o" if is_fact(method) else "--s"
        error = line["std"].where(line["num_seeds"] > 1, line["sampling"])
        label = f"{method} ({line['parameters'].iloc[0]:,.0f})"
        axis.errorbar(line["shots"], line["mean"], error, fmt=style, markersize=4, capsize=2, label=label)
    axis.set(xscale="log", xlabel="images a class", ylabel="mean test accuracy, %")
    axis.set_xticks(list(points), list(map(str, points)))
    axis.minorticks_off()
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=80)
    plt.close(figure)


def main() -> None:
    parser = frontier_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", help="tasks to cut; needed to measure")
    add("--shots", nargs="+", type=int, default=[1, 2, 4, 8, 16], help="images a class (default: 1 2 4 8 16)")
    add("--rates", type=Path, metavar="RESULTS", help="results of benchmarks.frontier that settle the learning rates")
    add("--choose_on", nargs="+", default=[], metavar="TASK", help="tasks there whose validation images decide")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="METHOD", help="(default: all)")
    add("--num_seeds", type=int, default=Protocol().num_seeds, help="draws of the images (default: %(default)s)")
    args = parse(parser, "shots", needed=("tasks", "rates", "choose_on"))
    if args.data is not None:
        measure(args)
    runs = read_shots(args.output)
    print(report(runs))
    plot(by_shots(runs), args.output / "shots.png")
    if args.write is not None:
        write_generated(args.write, f"python -m benchmarks.frontier.shots --output {args.output}", report(runs))


if __name__ == "__main__":
    main()
