"""Accuracy against trainable parameters on a small ViT and tasks made by rule: the quick mode of `benchmarks.frontier`.

    python -m benchmarks.frontier.toy --data FOLDER                                  # measures what is missing
    python -m benchmarks.frontier.toy --write benchmarks/frontier/toy/MEASURED.md    # tables and plot of what there is
    python -m benchmarks.frontier.toy --data FOLDER --backbone VIT --output OUT --write PAGE    # on another backbone
    python -m benchmarks.frontier.toy --data FOLDER --default_seeds 20    # as frontier.default does

FOLDER holds cifar10-train.parquet, cifar10-test.parquet, mnist-train.parquet and mnist-test.parquet with the columns
image ({"bytes": ...}) and label. Without --backbone a small ViT is pretrained on CIFAR-10 first and kept in
outputs/frontier.

Every task is searched, as in `benchmarks.frontier`. Results go to one file per task, and one more for the variants of
FacT, so that several processes can measure at once; those of another backbone need another --output. PAGE gets the
tables between the lines "<!-- begin: COMMAND -->" and "<!-- end: COMMAND -->", where COMMAND has the --output if it is
not the default.
"""

import argparse
import copy
import hashlib
import time
from functools import cache
from pathlib import Path

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import ViTForImageClassification
from transformers.utils import logging

from benchmarks.frontier import default
from benchmarks.frontier.backbones import DEVICE, Backbone
from benchmarks.frontier.plot import plot
from benchmarks.frontier.report import MEAN, chosen, means, read, summary
from benchmarks.frontier.search import Measurements, Protocol, accuracy
from benchmarks.frontier.toy.backbone import pretrain
from benchmarks.frontier.toy.methods import METHODS, REMEDIES
from benchmarks.frontier.toy.report import report
from benchmarks.frontier.toy.tasks import SIDE, TASKS, make_task, read_images
from benchmarks.reporting.markdown import write_generated
from benchmarks.reporting.results import Results

COMMAND = "python -m benchmarks.frontier.toy"
RESULTS = Path(__file__).parent / "results"
BACKBONE = Path("outputs") / "frontier" / "backbone"
SIZES = (1000, 500, 2000)  # images to train on, to choose the learning rate on, and to test on
QUICK_SIZES, QUICK = (20, 10, 10), Protocol(epochs=1, batch_size=10, trials=2, num_seeds=2)


def prepare_backbone(folder: Path, data: Path, quick: bool) -> ViTForImageClassification:
    """The backbone in that folder; pretrained on CIFAR-10 and kept there if it is not yet."""
    if not (folder / "config.json").exists():
        start = time.perf_counter()
        shape = {"epochs": 1, "width": 32, "depth": 1} if quick else {"epochs": 8, "width": 64, "depth": 4}
        model = pretrain(read_images(data / "cifar10-train.parquet", "RGB"), patch_size=8, **shape)
        model.save_pretrained(folder)
        print(f"Pretrained in {time.perf_counter() - start:.0f} s and kept in {folder}.", flush=True)
    return ViTForImageClassification.from_pretrained(folder, dtype=torch.float32).to(DEVICE)


def with_fresh_head(pretrained: ViTForImageClassification, num_labels: int) -> ViTForImageClassification:
    model = copy.deepcopy(pretrained)
    model.classifier = nn.Linear(pretrained.classifier.in_features, num_labels).to(DEVICE)
    model.config.num_labels = model.num_labels = num_labels
    return model


def measure(args: argparse.Namespace) -> None:
    """Run what is missing of the tasks and methods of the command line."""
    protocol, sizes = (QUICK, QUICK_SIZES) if args.quick else (Protocol(), SIZES)
    pretrained = prepare_backbone(args.backbone, args.data, args.quick)
    fingerprint = hashlib.sha256((args.backbone / "model.safetensors").read_bytes()).hexdigest()[:12]
    backbone = Backbone(lambda num_labels: with_fresh_head(pretrained, num_labels), fingerprint)
    photos = read_images(args.data / "cifar10-test.parquet", "RGB")  # which the backbone has not seen
    digits, test_digits = (read_images(args.data / f"mnist-{split}.parquet", "L") for split in ("train", "test"))
    backbones = Results(args.output / "backbones" / "cifar10.json")
    if backbones.find(backbone=backbone.fingerprint) is None:
        fields = ("hidden_size", "num_hidden_layers", "patch_size")
        shape = {field: getattr(pretrained.config, field) for field in fields}
        measured = {"test_accuracy": accuracy(backbone, pretrained, photos), **shape}
        backbones.add({"backbone": backbone.fingerprint}, measured)
    methods = {name: {**METHODS, **REMEDIES}[name] for name in args.methods}

    def file(task: str, name: str) -> Path:
        if args.default_seeds:
            return args.output / "default" / f"{task}.json"
        return args.output / (f"{task}.remedies.json" if name in REMEDIES else f"{task}.json")

    runs_a_method = args.default_seeds or protocol.trials + protocol.num_seeds - 1
    with tqdm(total=len(args.tasks) * len(args.methods) * runs_a_method, desc="runs", smoothing=0.1) as progress:
        measurements = Measurements(
            backbone=backbone,
            protocol=protocol,
            load=cache(lambda name: make_task(name, photos, digits, test_digits, sizes)),
            image_size=SIDE,
            file=file,
            progress=progress,
        )
        if args.default_seeds:
            default.measure(measurements, args.tasks, methods, args.default_seeds)
            return
        for task in args.tasks:
            for name, method in methods.items():
                measurements.searched(task, name, method)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, help="folder of the four parquet files; without it nothing is measured")
    parser.add_argument(
        "--backbone",
        type=Path,
        default=BACKBONE,
        help="folder of a ViT for 32 x 32 images; if there is none, one is pretrained into it (default: %(default)s)",
    )
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="(default: all)")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*METHODS, *REMEDIES],
        default=[*METHODS, *REMEDIES],
        metavar="METHOD",
        help=f"(default: all) {', '.join([*METHODS, *REMEDIES])}",
    )
    parser.add_argument(
        "--default_seeds", type=int, default=0, metavar="N", help="no search, but N seeds at the default's rate"
    )
    parser.add_argument("--quick", action="store_true", help="one epoch on a handful of images, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the tables into")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.data is not None:
        measure(args)
    if args.data is None or args.write is not None or args.quick:
        runs = read(args.output)
        text = report(runs)
        if (args.output / "default").exists():
            compared = default.report(read(args.output / "default"), runs[runs["method"].isin(METHODS)])
            text += f"\n\n**A default that is not searched.** {compared}"
        print(text)
        searched = chosen(runs)
        tasks = sorted(set(searched["task"]))
        points = summary(searched)
        panels = {task: points[points["task"] == task] for task in tasks}
        plot({**panels, MEAN: means(searched, tasks)}, METHODS, args.output / "frontier.png")
        if args.write is not None:
            write_generated(
                args.write, COMMAND if args.output == RESULTS else f"{COMMAND} --output {args.output}", text
            )


if __name__ == "__main__":
    main()
