"""VTAB-1K: FacT on 19 tasks with 1,000 labelled images each, beside the figures of the paper.

    python -m benchmarks.paper.vtab --data path/to/vtab-1k
    python -m benchmarks.paper.vtab --data path/to/vtab-1k --decompositions tt --rank 4
    python -m benchmarks.paper.vtab --data path/to/vtab-1k --model microsoft/swin-base-patch4-window7-224-in22k \\
        --decompositions tt --rank 16 --output outputs/vtab-swin
    python -m benchmarks.paper.vtab --quick

Two runs per task, decomposition and seed: on train800val200, tested with the weights of the last epoch, and on
train800, tested with the weights that were best on val200. The test images are never selected on. Rank and scale of
each task are the paper's, or those that --search finds on val200 after training on train800.

Results are kept in OUTPUT/results.json and only missing ones are run, one at a time on each GPU. Tables and plots are
made from that file.
"""

from argparse import Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib import pyplot as plt
from transformers import AutoConfig

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
from benchmarks.paper.folders import prepare_vtab_task, vtab_folder
from benchmarks.paper.processes import run_missing
from benchmarks.paper.published import FLAT_MEAN, GROUP_MEAN, TASKS, swin_accuracies, vit_accuracies, with_means
from benchmarks.paper.training import Job
from benchmarks.reporting import markdown
from benchmarks.reporting.results import Results

Accuracies = dict[str, list[float]]  # per cent by task or mean, one for each seed


class Run(NamedTuple):
    decomposition: str
    task: str
    train: str  # the name of the list
    seed: int


def make_job(args: Namespace, run: Run, rank: int, scale: float) -> Job:
    """The run that trains on the list `run.train`; if that is train800 it selects on val200."""
    folder = vtab_folder(run.task)
    return Job(
        **recipe(args),
        task=run.task,
        num_classes=TASKS[run.task].num_classes,
        images=folder,
        train_list=f"{folder}/{run.train}.txt",
        val_list=f"{folder}/val200.txt" if run.train == "train800" else None,
        test_list=f"{folder}/test.txt",
        decomposition=run.decomposition,
        rank=rank,
        scale=scale,
        seed=run.seed,
    )


def paper_setting(args: Namespace, task: str, decomposition: str) -> tuple[int, float]:
    """The paper's rank and scale for a task, or what the command line puts in their place."""
    rank, scale = TASKS[task].settings[decomposition]
    return rank if args.rank is None else args.rank, scale if args.scale is None else args.scale


def choose_settings(args: Namespace, results: Results) -> dict[tuple[str, str], tuple[int, float]]:
    """Rank and scale by decomposition and task: the paper's, or searched on val200 with the first seed."""
    settings = {(d, task): paper_setting(args, task, d) for d in args.decompositions for task in args.tasks}
    if not args.search:
        return settings
    jobs = {key: make_job(args, Run(*key, "train800", args.seeds[0]), *setting) for key, setting in settings.items()}
    return search(jobs, args, results)


def accuracies(measured: Mapping[Run, dict[str, Any]], decomposition: str, train: str, field: str) -> Accuracies:
    """`field` of the runs on one list, by task and, where all tasks of a group are there, by mean."""
    per_seed: dict[int, dict[str, float]] = {}
    for run, result in measured.items():
        if (run.decomposition, run.train) == (decomposition, train):
            per_seed.setdefault(run.seed, {})[run.task] = result[field]
    with_seeds = [with_means(values) for values in per_seed.values()]
    return {name: [values[name] for values in with_seeds] for name in with_seeds[0]}


def published_accuracies(args: Namespace, decomposition: str) -> dict[str, float]:
    """What the paper has for this kind of backbone and rank, by task and mean."""
    is_swin = AutoConfig.from_pretrained(args.model).model_type.startswith("swin")
    return (swin_accuracies if is_swin else vit_accuracies)(decomposition, args.rank)


def table(
    settings: Mapping[str, tuple[int, float]],
    normalization: str,
    last: Accuracies,
    selected: Accuracies,
    published: Mapping[str, float],
) -> str:
    """Our two accuracies and the paper's for each task and mean, as Markdown."""
    header = ["task", "group", "rank", "scale", "normalisation", "last epoch", "selected on val200", "paper"]
    rows = []
    for name in last:
        if name in TASKS:
            about = [TASKS[name].group, str(settings[name][0]), f"{settings[name][1]:g}"]
        else:
            about = [{GROUP_MEAN: "mean of the 3 groups", FLAT_MEAN: "mean of the 19 tasks"}.get(name, "mean"), "", ""]
        ours = [mean_and_range(last[name]), mean_and_range(selected[name])]
        rows.append([name, *about, normalization, *ours, *beside(last[name], published.get(name))])
    return markdown.table([*header, "last epoch - paper"], rows)


def plot(last: Accuracies, selected: Accuracies, published: Mapping[str, float], title: str, file: Path) -> None:
    """Dots for each task and mean: ours of the last epoch and validation-selected with their range, and the paper's."""
    names = list(last)
    figure, axes = plt.subplots(figsize=(7, 1.5 + 0.28 * len(names)), layout="constrained")
    for accuracies, label, marker, shift in (
        (last, "last epoch", "o", -0.15),
        (selected, "selected on val200", "^", 0.15),
    ):
        means, ranges = error_bars([accuracies[name] for name in names])
        places = [index + shift for index in range(len(names))]
        axes.errorbar(means, places, xerr=ranges, fmt=marker, markersize=5, label=label)
    known = [name for name in names if name in published]
    axes.plot(
        [published[name] for name in known], [names.index(name) for name in known], "k|", markersize=14, label="paper"
    )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("top-1 accuracy on the test images, %")
    axes.set_title(title, fontsize=10)
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=3)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def main() -> None:
    parser = parser_for(__doc__, RECIPE["lr"], seeds=[42])
    parser.add_argument("--tasks", nargs="+", choices=tuple(TASKS), default=list(TASKS), metavar="TASK")
    args = parse(parser, "vtab")
    for task in args.tasks:
        prepare_vtab_task(Path(args.data), task)
    results = Results(args.output / "results.json")
    settings = choose_settings(args, results)
    runs = [
        Run(*key, train, seed) for key in settings for train in ("train800", "train800val200") for seed in args.seeds
    ]
    jobs = {run: make_job(args, run, *settings[run[:2]]) for run in runs}
    measured = run_missing(jobs, results, args.workers)

    sections = []
    for decomposition in args.decompositions:
        last = accuracies(measured, decomposition, "train800val200", "last_epoch")
        selected = accuracies(measured, decomposition, "train800", "val_selected")
        published = published_accuracies(args, decomposition)
        title = caption(args, decomposition)
        chosen = {task: settings[decomposition, task] for task in args.tasks}
        plot(last, selected, published, title, args.output / f"{decomposition}.png")
        sections.append(f"{title}\n\n{table(chosen, args.normalization, last, selected, published)}\n")
    write_tables(args.output, sections)


if __name__ == "__main__":
    main()
