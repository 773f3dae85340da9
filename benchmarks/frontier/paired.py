"""Differences between methods, task by task: their mean and its standard error over tasks.

    python -m benchmarks.frontier.paired --output RESULTS --choose_on dtd10 rsscn7 yaleb-azimuth [--write PAGE]

RESULTS is of `benchmarks.frontier`. Every method has the rate that is best on the mean of the validation images of
--choose_on, on these tasks too. The start from gradients was found while looking at test images of seven of the
fourteen tasks; the others are a group of their own. What was not run yet is left out: a difference is of the tasks that
both methods have.
"""

import numpy as np
import pandas as pd

from benchmarks.frontier.command_line import frontier_parser, parse
from benchmarks.frontier.default import DEFAULT
from benchmarks.frontier.report import at_best_rates, read, validation_means
from benchmarks.reporting.markdown import table, write_generated

# The methods that are compared with all others.
COMPARED = (
    DEFAULT,
    "FacT-TK r=8, default scale",
    "FacT-TK r=32, default scale",
    "FacT-CP r=64, orthogonal",
    "FacT-TT r=32, orthogonal",
    "FacT-TT r=16, gradients",
)
UNTOUCHED = ("caltech101", "flowers89", "chars74k", "braintumor", "neu6", "rsscn7-scale", "dsprites-orient")


def difference(ours: pd.Series, theirs: pd.Series) -> str:
    """The mean of `ours` minus `theirs` over the tasks of both, its standard error, and the number of tasks."""
    paired = (ours - theirs).dropna()
    if paired.empty:
        return ""
    error = f" ± {paired.std() / np.sqrt(len(paired)):.1f}" if len(paired) > 1 else ""
    return f"{paired.mean():+.1f}{error} ({len(paired)})"


def cells(accuracies: pd.Series) -> list[str]:
    """Accuracies for a table; empty where there is none."""
    return ["" if np.isnan(value) else f"{value:.1f}" for value in accuracies]


def report(runs: pd.DataFrame, choosing: list[str]) -> str:
    """Tables of the accuracy of each method on each task, and of the differences from FacT's to the others."""
    kept = at_best_rates(runs, choosing)
    found = kept.pivot_table(index="task", columns="method", values="test_accuracy")  # the mean over seeds
    sizes = runs.groupby("method")["parameters"].first()
    by_size = sorted(found.columns, key=lambda method: (sizes[method], method))
    groups = {
        "all tasks": list(found.index),
        "that chose no rate": [task for task in found.index if task not in choosing],
        "untouched": [task for task in found.index if task in UNTOUCHED],
    }
    ours_all = [method for method in by_size if method in COMPARED]
    means = pd.DataFrame({name: found.loc[tasks].mean(skipna=False) for name, tasks in groups.items()})
    blocks = [
        "Test accuracy in %, at one rate a method, and its mean over groups of tasks:",
        table(
            ["method", "parameters", *found.index, *groups],
            [[method, f"{sizes[method]:,}", *cells(found[method]), *cells(means.loc[method])] for method in by_size],
        ),
    ]
    by_rate = validation_means(runs, choosing).unstack()
    blocks += [
        f"Mean validation accuracy in % on the {len(choosing)} tasks that choose, first seed, by learning rate:",
        table(
            ["method", *(f"{rate:g}" for rate in by_rate.columns)],
            [[method, *cells(by_rate.loc[method])] for method in by_size],
        ),
    ]
    for ours in ours_all:
        rows = []
        for theirs in by_size:
            of_groups = [difference(found.loc[group, ours], found.loc[group, theirs]) for group in groups.values()]
            if theirs != ours:
                rows.append([theirs, f"{sizes[theirs]:,}", *of_groups])
        blocks += [
            f"**{ours}**, {sizes[ours]:,} parameters, minus each other method, in points: mean and standard error over "
            "tasks, in brackets how many:",
            table(["minus", "parameters", *groups], rows),
        ]
    seeds = kept[~kept["task"].isin(choosing)].groupby("method")["seed"].nunique()
    blocks.append(
        f"Seeds on the tasks that chose no rate: {', '.join(f'{method} {count}' for method, count in seeds.items())}."
    )
    return "\n\n".join(blocks)


def main() -> None:
    parser = frontier_parser(__doc__)
    parser.add_argument("--choose_on", nargs="+", required=True, metavar="TASK", help="tasks that choose the rate")
    args = parse(parser, "frontier")
    text = report(read(args.output), args.choose_on)
    print(text)
    if args.write is not None:
        write_generated(args.write, f"python -m benchmarks.frontier.paired --output {args.output}", text)


if __name__ == "__main__":
    main()
