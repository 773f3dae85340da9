"""What `vtab` and `few_shot` share: options, the search on validation images, and tables."""

import argparse
from collections.abc import Hashable, Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any, TypeVar

from benchmarks.paper.image_lists import NORMALIZATIONS, from_hub
from benchmarks.paper.processes import run_missing
from benchmarks.paper.published import GRIDS, PAPER, SCALES
from benchmarks.paper.synthetic import IMAGE_SIZE, write_synthetic
from benchmarks.paper.training import Job
from benchmarks.reporting.results import Results

Key = TypeVar("Key", bound=Hashable)
RECIPE = PAPER["recipe"]


def parser_for(doc: str | None, learning_rate: float, seeds: list[int]) -> argparse.ArgumentParser:
    """The options of both commands; the defaults are the paper's."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", help="folder with one folder per task; with --archive, where to extract it")
    add("--archive", nargs=2, metavar=("REPO_ID", "FILE"), help="an archive in a Hub dataset")
    add("--model", default="google/vit-base-patch16-224-in21k", help="Hub name or folder of a transformers model")
    add("--decompositions", nargs="+", choices=("tt", "tk"), default=["tt", "tk"])
    add("--rank", type=int, help="one rank for all tasks, in place of the paper's")
    add("--scale", type=float, help="one scale for all tasks, in place of the paper's")
    add("--search", action="store_true", help="choose rank and scale per task on the validation images, first seed")
    add("--ranks", nargs="+", type=int, help=f"ranks to search; default {GRIDS}, or --rank if it is given")
    add("--scales", nargs="+", type=float, help=f"scales to search; default {SCALES}, or --scale if it is given")
    add("--normalization", choices=tuple(NORMALIZATIONS), default="imagenet", help="inception: (x - 0.5) / 0.5")
    add("--seeds", nargs="+", type=int, default=seeds, help=f"one run per seed; default {seeds}")
    add("--image_size", type=int, default=224, help="pixels a side, resized without cropping")
    add("--epochs", type=int, default=RECIPE["epochs"])
    add("--learning_rate", type=float, default=learning_rate)
    add("--weight_decay", type=float, default=RECIPE["weight_decay"])
    add("--batch_size", type=int, default=RECIPE["batch_size"])
    add("--fact_dropout", type=float, default=RECIPE["factor_dropout"])
    add("--drop_path", type=float, default=RECIPE["drop_path"], help="where the architecture has stochastic depth")
    add("--workers", type=int, default=1, help="jobs at a time without a GPU; with GPUs it is one on each")
    add("--output", type=Path, help="folder for results.json, tables and plots")
    add("--quick", action="store_true", help="two epochs of a tiny model on synthetic images: does everything run?")
    return parser


def parse(parser: argparse.ArgumentParser, name: str) -> argparse.Namespace:
    """The arguments, with data and model in place."""
    args = parser.parse_args()
    args.output = args.output or Path("outputs", f"{name}-quick" if args.quick else name)
    if args.quick:
        synthetic = write_synthetic(args.output / "synthetic")
        args.data, args.model = str(synthetic / name), str(synthetic / "backbone")
        args.epochs, args.batch_size, args.image_size = 2, 8, IMAGE_SIZE
    if args.data is None:
        parser.error("--data is missing; pass the folder that has one folder per task, or --quick for synthetic data.")
    if args.archive:
        args.data = str(from_hub(*args.archive, Path(args.data)))
    if not Path(args.data).is_dir():
        parser.error(f"--data {args.data} is not a folder; pass the one that has one folder per task.")
    return args


def recipe(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `Job` that are the same in all of them."""
    names = (
        "data model normalization image_size epochs learning_rate weight_decay batch_size fact_dropout drop_path"
    ).split()
    return {name: getattr(args, name) for name in names}


def search(jobs: Mapping[Key, Job], args: argparse.Namespace, results: Results) -> dict[Key, tuple[int, float]]:
    """The rank and scale that are best on the validation images of each job; of equals the first of the grid.

    The test images are not looked at.
    """
    grid = {
        (key, rank, scale): replace(job, rank=rank, scale=scale, test_list=None)
        for key, job in jobs.items()
        for rank in args.ranks or (GRIDS[job.decomposition] if args.rank is None else [args.rank])
        for scale in args.scales or (SCALES if args.scale is None else [args.scale])
    }
    measured = run_missing(grid, results, args.workers)
    best = {key: max((c for c in grid if c[0] == key), key=lambda c: measured[c]["val_best"]) for key in jobs}
    return {key: (rank, scale) for key, (_, rank, scale) in best.items()}


def caption(args: argparse.Namespace, decomposition: str) -> str:
    """What a table or plot shows: method, backbone, protocol."""
    seeds = ", ".join(map(str, args.seeds))
    return (
        f"FacT-{decomposition.upper()}, {Path(args.model).name}, normalisation {args.normalization}, "
        f"{args.epochs} epochs, seeds {seeds}"
    )


def mean_and_range(values: list[float]) -> str:
    """Such as "71.3" of one value, "71.3 (70.9-71.8)" of several."""
    spread = f" ({min(values):.1f}-{max(values):.1f})" if len(values) > 1 else ""
    return f"{fmean(values):.1f}{spread}"


def error_bars(values: list[list[float]]) -> tuple[list[float], tuple[list[float], list[float]]]:
    """Means, and how far the smallest value lies below and the largest above each, as matplotlib wants them."""
    means = [fmean(v) for v in values]
    # Rounding can put the mean of equal values beside them, and a bar must not be negative.
    below = [max(0.0, mean - min(v)) for mean, v in zip(means, values, strict=True)]
    above = [max(0.0, max(v) - mean) for mean, v in zip(means, values, strict=True)]
    return means, (below, above)


def beside(ours: list[float] | None, published: float | None) -> list[str]:
    """The published figure and how far the mean of ours is above it, "-" where there is none."""
    return [
        "-" if published is None else f"{published:.1f}",
        "-" if published is None or not ours else f"{fmean(ours) - published:+.1f}",
    ]


def write_tables(output: Path, sections: list[str]) -> None:
    """Print the sections and keep them as OUTPUT/tables.md."""
    text = "\n".join(sections)
    print(text)
    (output / "tables.md").write_text(text)
