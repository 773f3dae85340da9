"""What the commands that measure a backbone on a folder of tasks have in common."""

import argparse
from collections.abc import Iterable
from functools import cache
from pathlib import Path

import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from benchmarks.frontier.backbones import load, local_name
from benchmarks.frontier.search import Measurements, Protocol
from benchmarks.frontier.tasks import CACHE, read_task


def frontier_parser(description: str | None) -> argparse.ArgumentParser:
    """A parser with the arguments of all these commands."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--backbone", help="Hub name or folder of a pretrained model")
    add("--data", type=Path, help="folder of the tasks; without it nothing is measured")
    add("--image_size", type=int, default=224, help="pixels a side (default: %(default)s)")
    add("--precision", choices=("float32", "bfloat16"), default="float32", help="of the passes (default: %(default)s)")
    add("--epochs", type=int, default=Protocol().epochs, help="(default: %(default)s)")
    add("--batch_size", type=int, default=Protocol().batch_size, help="(default: %(default)s)")
    add("--threads", type=int, default=1, help="of torch on a CPU (default: %(default)s)")
    add("--output", type=Path, help="folder of the results (default: one in outputs/, named as the backbone)")
    add("--write", type=Path, metavar="PAGE", help="Markdown file to write the tables into")
    return parser


def parse(parser: argparse.ArgumentParser, folder: str, needed: Iterable[str] = ()) -> argparse.Namespace:
    """The arguments of the command line, with torch and transformers set up as they say.

    Args:
        parser: From `frontier_parser`.
        folder: Where in outputs/ results go by default.
        needed: Arguments without which nothing can be measured, beside the backbone.
    """
    args = parser.parse_args()
    if args.output is None and args.backbone is None:
        parser.error("--output is missing; pass the folder of the results, or --backbone and --data to measure some.")
    if args.data is not None:
        for name in ("backbone", *needed):
            if not getattr(args, name):
                parser.error(f"--{name} is missing; --data asks to measure, and there is no default.")
    args.output = args.output or Path("outputs", folder, local_name(args.backbone))
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    return args


def measurements_of(args: argparse.Namespace, protocol: Protocol, progress: tqdm) -> Measurements:
    """Runs of the backbone on the folder of tasks that the command line names, kept in a file a task."""
    return Measurements(
        backbone=load(args.backbone, args.precision),
        protocol=protocol,
        load=cache(lambda task: read_task(args.data, task, args.image_size, CACHE)),
        image_size=args.image_size,
        file=lambda task, method: args.output / f"{task}.json",
        progress=progress,
    )
