"""Few-shot classification on five fine-grained sets: FacT with 1 to 16 images per class, beside the paper's figures.

    python -m benchmarks.paper.few_shot --data path/to/few-shot
    python -m benchmarks.paper.few_shot --data path/to/few-shot --search
    python -m benchmarks.paper.few_shot --quick

One run per set, number of shots, decomposition and seed, on the published train list of that seed; tested with the
weights of the last epoch and with those that were best on val_meta.list. The test images are never selected on. The
paper has rank 16 and does not publish its scales: --scale sets one for all, --search chooses among the paper's for each
set and number of shots on val_meta.list.

Results are kept in OUTPUT/results.json and only missing ones are run, one at a time on each GPU. Tables and plots are
made from that file.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib import pyplot as plt

from benchmarks.paper.command_line import (
    RECIPE,
    beside,
    caption,
    error_bars,
    mean_and_range,
    parse,
    parser_for,
    recipe,
    search,
    write_tables,
)
from benchmarks.paper.folders import FEW_SHOT_SETS, few_shot_annotations, few_shot_images, few_shot_train_list
from benchmarks.paper.processes import run_missing
from benchmarks.paper.published import SHOTS, few_shot_accuracy
from benchmarks.paper.training import Job
from benchmarks.reporting import markdown
from benchmarks.reporting.results import Results

AVERAGE = "average of the sets"
Accuracies = dict[tuple[str, int], list[float]]  # per cent by set and shots, one for each seed
Published = dict[tuple[str, int], float]


class Run(NamedTuple):
    decomposition: str
    name: str  # of the set
    shots: int
    seed: int


def make_job(args: Namespace, run: Run, rank: int, scale: float) -> Job:
    """The run on the train list of `run.shots` and `run.seed`; validation and test lists are the set's."""
    lists = few_shot_annotations(Path(args.data), run.name)
    return Job(
        **recipe(args),
        task=run.name,
        num_classes=FEW_SHOT_SETS[run.name].num_classes,
        images=few_shot_images(Path(args.data), run.name),
        train_list=f"{lists}/{few_shot_train_list(run.shots, run.seed)}",
        val_list=f"{lists}/val_meta.list",
        test_list=f"{lists}/test_meta.list",
        decomposition=run.decomposition,
        rank=rank,
        scale=scale,
        seed=run.seed,
    )


def choose_settings(args: Namespace, results: Results) -> dict[tuple[str, str, int], tuple[int, float]]:
    """Rank and scale by decomposition, set and shots: given, or searched on val_meta.list with the first seed."""
    keys = [(d, name, shots) for d in args.decompositions for name in args.sets for shots in args.shots]
    setting = (args.rank, 1.0 if args.scale is None else args.scale)
    if not args.search:
        return dict.fromkeys(keys, setting)
    return search({key: make_job(args, Run(*key, args.seeds[0]), *setting) for key in keys}, args, results)


def accuracies(measured: Mapping[Run, dict[str, Any]], decomposition: str, field: str) -> Accuracies:
    """`field` of the runs of one decomposition, by set and shots, and averaged over the sets."""
    per_set: Accuracies = {}
    for run, result in measured.items():
        if run.decomposition == decomposition:
            per_set.setdefault((run.name, run.shots), []).append(result[field])
    shots = dict.fromkeys(shots for _, shots in per_set)
    average = {
        (AVERAGE, n): [fmean(seed) for seed in zip(*(per_set[key] for key in per_set if key[1] == n), strict=True)]
        for n in shots
    }
    return per_set | average


def published_accuracies(args: Namespace, decomposition: str) -> Published:
    """The paper's figures of the sets and shots, and their average if all five sets are there."""
    names = [*args.sets, *([AVERAGE] if set(args.sets) == set(FEW_SHOT_SETS) else [])]
    figures = {
        (name, shots): few_shot_accuracy("average" if name == AVERAGE else name, shots, decomposition, args.rank)
        for name in names
        for shots in args.shots
    }
    return {key: figure for key, figure in figures.items() if figure is not None}


def table(
    settings: Mapping[tuple[str, int], tuple[int, float]],
    normalization: str,
    last: Accuracies,
    selected: Accuracies,
    published: Published,
) -> str:
    """Our two accuracies and the paper's for each set and number of shots, as Markdown."""
    header = ["set", "shots", "rank", "scale", "normalisation", "last epoch", "selected on val", "paper"]
    rows = []
    for name, shots in last:
        setting = [f"{value:g}" for value in settings[name, shots]] if name != AVERAGE else ["", ""]
        ours = [mean_and_range(accuracies[name, shots]) for accuracies in (last, selected)]
        paper = beside(last[name, shots], published.get((name, shots)))
        rows.append([name, str(shots), *setting, normalization, *ours, *paper])
    return markdown.table([*header, "last epoch - paper"], rows)


def plot(last: Accuracies, selected: Accuracies, published: Published, title: str, file: Path) -> None:
    """Accuracy against shots, one panel for each set and one for the average."""
    names = list(dict.fromkeys(name for name, _ in last))
    figure, panels = plt.subplots(1, len(names), figsize=(2.6 * len(names), 3), layout="constrained", squeeze=False)
    for name, axes in zip(names, panels[0], strict=True):
        shots = [n for set_name, n in last if set_name == name]
        for accuracies, label, style in ((last, "last epoch", "o-"), (selected, "selected on val", "^--")):
            means, ranges = error_bars([accuracies[name, n] for n in shots])
            axes.errorbar(shots, means, yerr=ranges, fmt=style, markersize=4, label=label)
        known = [n for n in shots if (name, n) in published]
        axes.plot(known, [published[name, n] for n in known], "kx:", label="paper")
        axes.set_xscale("log", base=2)
        axes.set_xticks(shots, shots)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("shots")
        axes.grid(alpha=0.3)
    panels[0][0].set_ylabel("test accuracy, %")
    figure.suptitle(title, fontsize=10)
    figure.legend(*panels[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = parser_for(__doc__, RECIPE["lr_few_shot"], seeds=[0, 1, 2])
    parser.set_defaults(rank=16)
    parser.add_argument("--sets", nargs="+", choices=tuple(FEW_SHOT_SETS), default=list(FEW_SHOT_SETS), metavar="SET")
    parser.add_argument("--shots", nargs="+", type=int, default=SHOTS, help=f"default {SHOTS}")
    args = parse(parser, "few_shot")
    results = Results(args.output / "results.json")
    settings = choose_settings(args, results)
    runs = [Run(*key, seed) for key in settings for seed in args.seeds]
    jobs = {run: make_job(args, run, *settings[run[:3]]) for run in runs}
    measured = run_missing(jobs, results, args.workers)

    sections = []
    for decomposition in args.decompositions:
        last = accuracies(measured, decomposition, "last_epoch")
        selected = accuracies(measured, decomposition, "val_selected")
        published = published_accuracies(args, decomposition)
        title = caption(args, decomposition)
        chosen = {(name, shots): settings[decomposition, name, shots] for name in args.sets for shots in args.shots}
        plot(last, selected, published, title, args.output / f"{decomposition}.png")
        sections.append(f"{title}\n\n{table(chosen, args.normalization, last, selected, published)}\n")
    write_tables(args.output, sections)


if __name__ == "__main__":
    main()
