"""Accuracy by where FacT's factors start, and how far the cores move beside U and V, which all slices share.

    python -m benchmarks.frontier.starts --backbone facebook/dinov2-small --data FOLDER --tasks dtd10 gtsrb
    python -m benchmarks.frontier.starts --output STARTS --write PAGE    # the table of what there is

One seed, no search: U and V move at `FIRST_RATE`. From the authors' start cores move at that rate or, with two rates,
at four times it; from the orthogonal start at that rate too, but the scale makes of it what the table says. Each run is
kept in STARTS/TASK.json and not repeated; processes can share STARTS if each has tasks of its own.
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

RANKS = (8, 16, 32)  # of tensor-train
DEFAULT_PRODUCT = 32  # scale times rank


@dataclass(frozen=True)
class Start:
    """
    Attributes:
        of: What is started.
        title: How, in the table.
        method: The two.
        rate: Of the cores; `method` has that of U and V in units of it.
        suffix: Of `of`, in the results.
    """

    of: str
    title: str
    method: Method
    rate: float = FIRST_RATE
    suffix: str = ""

    @property
    def name(self) -> str:
        """In the results."""
        return self.of + self.suffix


def authors(decomposition: str, rank: int) -> list[Start]:
    """The authors' start, with one rate and with two."""
    of, method = f"FacT-{decomposition.upper()} r={rank}", fact(decomposition, rank)
    slow = replace(method, multipliers={"fact_U": 1 / STEP, "fact_V": 1 / STEP})
    return [
        Start(of, "authors'", method),
        Start(of, "authors', two rates", slow, STEP * FIRST_RATE, ", two rates"),
    ]


def orthogonals(rank: int) -> list[Start]:
    """The orthogonal start of tensor-train at several scales."""
    found = []
    for both in (DEFAULT_PRODUCT, 64, 128):
        scale = "" if both == DEFAULT_PRODUCT else f", scale {both / rank:g}"
        method = orthogonal("tt", rank, both / rank)
        found.append(Start(f"FacT-TT r={rank}", f"orthogonal, scale {both} / r", method, suffix=f", orthogonal{scale}"))
    return found


def by_block(rank: int) -> Start:
    """U and V of each block instead of one for all; as many more directions at a lower rank, so at a lower scale."""
    method = orthogonal("tt", rank, 8 / rank, share="block")
    return Start(f"FacT-TT r={rank} by block", "orthogonal, scale 8 / r", method, suffix=", orthogonal, scale 2")


def by_root(decomposition: str, rank: int) -> list[Start]:
    """The orthogonal start of Tucker or CP at the default scale, and at that of tensor-train."""
    of = f"FacT-{decomposition.upper()} r={rank}"
    scales = {"32 / r": 32 / rank, "32 / sqrt(r)": 32 / rank**0.5}
    return [
        Start(
            of,
            f"orthogonal, scale {title}",
            orthogonal(decomposition, rank, scale),
            suffix=f", orthogonal, scale {scale:g}",
        )
        for title, scale in scales.items()
    ]


STARTS = [*(start for rank in RANKS for start in [*authors("tt", rank), *orthogonals(rank)]), *authors("tk", 32)]
STARTS += [by_block(4), *by_root("tk", 16), *by_root("cp", 64)]


def measure(args: argparse.Namespace) -> None:
    """Run what is missing of the tasks of the command line."""
    wanted = [start for start in STARTS if not args.of or start.of in args.of]
    with tqdm(total=len(args.tasks) * len(wanted), desc="runs", smoothing=0.1) as progress:
        measurements = measurements_of(args, Protocol(args.epochs, args.batch_size), progress)
        for start, task in product(wanted, args.tasks):
            measurements.outcome(task, start.name, start.method, start.rate, SEARCH_SEED)


def report(runs: pd.DataFrame) -> str:
    """Test accuracy on each task and their mean by start, of those that were run on all."""
    tasks = sorted(set(runs["task"]))
    found = runs.pivot_table(index=["method", "learning_rate"], columns="task", values="test_accuracy").dropna()
    sizes = runs.groupby("method")["parameters"].first()
    rows = []
    for start in STARTS:
        if (start.name, start.rate) in found.index:
            accuracies = found.loc[(start.name, start.rate)]
            cells = [f"{value:.1f}" for value in [*accuracies, accuracies.mean()]]
            rows.append([start.of, start.title, f"{sizes[start.name]:,}", *cells])
    first = runs.iloc[0]
    conditions = (
        f"{first['image_size']} px, {first['precision']}, {first['epochs']} epochs, one seed, rate of U and V "
        f"{FIRST_RATE:g}. Test accuracy in %."
    )
    return f"{conditions}\n\n{table(['method', 'start', 'parameters', *tasks, 'mean'], rows)}"


def main() -> None:
    parser = frontier_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", help="needed to measure")
    names = list(dict.fromkeys(start.of for start in STARTS))
    add("--of", nargs="+", choices=names, metavar="METHOD", help=f"(default: all) {', '.join(names)}")
    args = parse(parser, "starts", needed=["tasks"])
    if args.data is not None:
        measure(args)
    text = report(read(args.output))
    print(text)
    if args.write is not None:
        write_generated(args.write, f"python -m benchmarks.frontier.starts --output {args.output}", text)


if __name__ == "__main__":
    main()
