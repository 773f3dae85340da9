"""Accuracy by where FacT's factors start, and how far the cores move beside U and V, which all slices share.

    python -m benchmarks.frontier.starts --backbone facebook/dinov2-small --data FOLDER --tasks dtd10 gtsrb
    python -m benchmarks.frontier.starts --output STARTS --write PAGE    # the table of what there is

FacT-TT, one seed, no search: U and V move at `FIRST_RATE`. From the authors' start cores move at that rate or, with two
rates, at four times it; from the orthogonal start at that rate too, but the scale makes of it what the table says. Each
run is kept in STARTS/TASK.json and not repeated; processes can share STARTS if each has tasks of its own.
"""

import argparse
from dataclasses import dataclass, replace
from itertools import product

import pandas as pd
from tqdm.auto import tqdm

from benchmarks.frontier.command_line import frontier_parser, measurements_of, parse
from benchmarks.frontier.methods import FIRST_RATE, Method, fact, orthogonal
from benchmarks.frontier.report import read
from benchmarks.frontier.search import SEARCH_SEED, STEP, Protocol
from benchmarks.reporting.markdown import table, write_generated

RANKS = (8, 16, 32)


@dataclass(frozen=True)
class Start:
    """
    Attributes:
        title: In the table.
        name: Of a rank, in the results.
        method: Of a rank.
        rate: Of the cores; `method` has that of U and V in units of it.
    """

    title: str
    name: str
    method: Method
    rate: float = FIRST_RATE


def starts(rank: int) -> list[Start]:
    """What is compared at a rank."""
    name, authors = f"FacT-TT r={rank}", fact("tt", rank)
    slow = replace(authors, multipliers={"fact_U": 1 / STEP, "fact_V": 1 / STEP})
    found = [
        Start("authors'", name, authors),
        Start("authors', two rates", f"{name}, two rates", slow, STEP * FIRST_RATE),
    ]
    for product_of_both in (32, 64, 128):  # scale times rank
        scale = product_of_both / rank
        suffix = "" if product_of_both == 32 else f", scale {scale:g}"
        method = orthogonal("tt", rank, scale)
        found.append(Start(f"orthogonal, scale {product_of_both} / r", f"{name}, orthogonal{suffix}", method))
    return found


def measure(args: argparse.Namespace) -> None:
    """Run what is missing of the tasks and ranks of the command line."""
    wanted = [start for rank in args.ranks for start in starts(rank)]
    with tqdm(total=len(args.tasks) * len(wanted), desc="runs", smoothing=0.1) as progress:
        measurements = measurements_of(args, Protocol(args.epochs, args.batch_size), progress)
        for start, task in product(wanted, args.tasks):
            measurements.outcome(task, start.name, start.method, start.rate, SEARCH_SEED)


def report(runs: pd.DataFrame) -> str:
    """Test accuracy on each task and their mean by rank and start, of those that were run on all."""
    tasks = sorted(set(runs["task"]))
    found = runs.pivot_table(index=["method", "learning_rate"], columns="task", values="test_accuracy").dropna()
    rows = []
    for rank in RANKS:
        for start in starts(rank):
            if (start.name, start.rate) in found.index:
                accuracies = found.loc[(start.name, start.rate)]
                rows.append([f"{rank}", start.title, *(f"{value:.1f}" for value in [*accuracies, accuracies.mean()])])
    first = runs.iloc[0]
    conditions = (
        f"FacT-TT, {first['image_size']} px, {first['precision']}, {first['epochs']} epochs, one seed, rate of U and V "
        f"{FIRST_RATE:g}. Test accuracy in %."
    )
    return f"{conditions}\n\n{table(['rank', 'start', *tasks, 'mean'], rows)}"


def main() -> None:
    parser = frontier_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", help="needed to measure")
    add("--ranks", nargs="+", type=int, choices=RANKS, default=RANKS, help="(default: all)")
    args = parse(parser, "starts", needed=["tasks"])
    if args.data is not None:
        measure(args)
    text = report(read(args.output))
    print(text)
    if args.write is not None:
        write_generated(args.write, f"python -m benchmarks.frontier.starts --output {args.output}", text)


if __name__ == "__main__":
    main()
