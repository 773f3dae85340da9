"""Accuracy by two learning rates, that of U and V, which all slices share, and that of the cores, from either start.

    python -m benchmarks.frontier.rates --backbone facebook/dinov2-small --data FOLDER --tasks dtd10 yaleb-azimuth
    python -m benchmarks.frontier.rates --output RATES --write PAGE    # the table of what there is

FacT-TT of rank 8, one seed, no search: every pair of the rates is run. Each run is kept in RATES/TASK.json and not
repeated; processes can share RATES if each has tasks of its own.
"""

import argparse
from dataclasses import replace
from itertools import product

import pandas as pd
from tqdm.auto import tqdm

from benchmarks.frontier.command_line import frontier_parser, measurements_of, parse
from benchmarks.frontier.methods import Method, fact, orthogonal
from benchmarks.frontier.report import read
from benchmarks.frontier.search import SEARCH_SEED, Protocol
from benchmarks.reporting.markdown import table, write_generated

RANK = 8
RATES = (1e-3, 4e-3, 1.6e-2)
STARTS = {"authors' start, scale 1": fact("tt", RANK), "orthogonal start, scale 4": orthogonal("tt", RANK)}


def with_ratio(start: str, ratio: float) -> tuple[str, Method]:
    """FacT with a learning rate of U and V in units of that of the cores, and its name in the results."""
    method = replace(STARTS[start], multipliers={"fact_U": ratio, "fact_V": ratio})
    return f"FacT-TT r={RANK}, {start}, U and V x {ratio:g}", method


def measure(args: argparse.Namespace) -> None:
    """Run what is missing of the tasks of the command line."""
    with tqdm(total=len(args.tasks) * len(STARTS) * len(RATES) ** 2, desc="runs", smoothing=0.1) as progress:
        measurements = measurements_of(args, Protocol(args.epochs, args.batch_size), progress)
        for task, start, shared, core in product(args.tasks, STARTS, RATES, RATES):
            measurements.outcome(task, *with_ratio(start, shared / core), core, SEARCH_SEED)


def report(runs: pd.DataFrame) -> str:
    """Test accuracy on each task by the two rates, a column a start."""
    tasks = sorted(set(runs["task"]))
    found = runs.set_index(["method", "learning_rate", "task"])["test_accuracy"]
    rows = []
    for shared, core in product(RATES, RATES):
        names = [with_ratio(start, shared / core)[0] for start in STARTS]
        cells = [" / ".join(f"{found.get((name, core, task), float('nan')):.1f}" for task in tasks) for name in names]
        rows.append([f"{shared:g}", f"{core:g}", *cells])
    first = runs.iloc[0]
    conditions = (
        f"FacT-TT r={RANK}, {first['image_size']} px, {first['precision']}, {first['epochs']} epochs, one seed; test "
        f"accuracy in % on {' / '.join(tasks)}."
    )
    return f"{conditions}\n\n{table(['rate of U and V', 'rate of the cores', *STARTS], rows)}"


def main() -> None:
    parser = frontier_parser(__doc__)
    parser.add_argument("--tasks", nargs="+", help="needed to measure")
    args = parse(parser, "rates", needed=["tasks"])
    if args.data is not None:
        measure(args)
    text = report(read(args.output))
    print(text)
    if args.write is not None:
        write_generated(args.write, f"python -m benchmarks.frontier.rates --output {args.output}", text)


if __name__ == "__main__":
    main()
