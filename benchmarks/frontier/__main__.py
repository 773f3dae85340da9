"""Accuracy against trainable parameters on real images, FacT beside other methods, each tuned with the same budget.

    python -m benchmarks.frontier --data FOLDER                            # measures what is missing
    python -m benchmarks.frontier --write benchmarks/frontier/README.md    # table and plot from what was measured
    python -m benchmarks.frontier --data FOLDER --backbone VIT --output OUT --write PAGE    # on another backbone

FOLDER holds cifar10-train.parquet, cifar10-test.parquet, mnist-train.parquet and mnist-test.parquet with the columns
image ({"bytes": ...}) and label. Without --backbone a small ViT is pretrained on CIFAR-10 first and kept in
outputs/frontier.

Every method gets a few trials of its learning rate with the first seed; the one with the best validation accuracy is
run with the other seeds. Results go to one file per task, so that tasks can be measured by several processes at once;
those of another backbone need another --output. PAGE gets the tables between the lines "<!-- begin: COMMAND -->" and
"<!-- end: COMMAND -->", where COMMAND has the --output if it is not the default.
"""

import argparse
import hashlib
import time
from pathlib import Path

import torch
from transformers import ViTForImageClassification
from transformers.utils import logging

from benchmarks.frontier.backbone import normalise, pretrain
from benchmarks.frontier.methods import METHODS, REMEDIES
from benchmarks.frontier.report import plot, read, report, summary
from benchmarks.frontier.search import QUICK, Protocol, accuracy, measure
from benchmarks.frontier.tasks import TASKS, make_task, read_images
from benchmarks.reporting.markdown import write_generated
from benchmarks.reporting.results import Results

COMMAND = "python -m benchmarks.frontier"
RESULTS = Path(__file__).parent / "results" / "toy"
BACKBONE = Path("outputs") / "frontier" / "backbone"


def prepare_backbone(folder: Path, data: Path, quick: bool) -> ViTForImageClassification:
    """The backbone in that folder; pretrained on CIFAR-10 and kept there if it is not yet."""
    if not (folder / "config.json").exists():
        start = time.perf_counter()
        shape = {"epochs": 1, "width": 32, "depth": 1} if quick else {"epochs": 8, "width": 64, "depth": 4}
        model = pretrain(read_images(data / "cifar10-train.parquet", "RGB"), patch_size=8, **shape)
        model.save_pretrained(folder)
        print(f"Pretrained in {time.perf_counter() - start:.0f} s and kept in {folder}.", flush=True)
    return ViTForImageClassification.from_pretrained(folder, dtype=torch.float32)


def measure_all(args: argparse.Namespace) -> None:
    """Measure what is missing of the tasks and methods of the command line."""
    protocol = QUICK if args.quick else Protocol()
    backbone = prepare_backbone(args.backbone, args.data, args.quick)
    photos = read_images(args.data / "cifar10-test.parquet", "RGB")  # which the backbone has not seen
    digits, test_digits = (read_images(args.data / f"mnist-{split}.parquet", "L") for split in ("train", "test"))
    fingerprint = hashlib.sha256((args.backbone / "model.safetensors").read_bytes()).hexdigest()[:12]
    backbones = Results(args.output / "backbones" / "cifar10.json")
    if backbones.find(backbone=fingerprint) is None:
        shape = {field: getattr(backbone.config, field) for field in ("hidden_size", "num_hidden_layers", "patch_size")}
        pretrained = accuracy(backbone, normalise(photos.images), photos.labels)
        backbones.add({"backbone": fingerprint}, {"test_accuracy": pretrained, **shape})
    for name in args.tasks:
        task = make_task(name, photos, digits, test_digits, protocol.sizes)
        # Plain methods and variants in files of their own, so that two processes can measure them at once.
        for file, group in ((f"{name}.json", METHODS), (f"{name}-remedies.json", REMEDIES)):
            methods = [method for method in args.methods if method in group]
            if methods:
                measure(backbone, task, methods, Results(args.output / file), protocol, fingerprint)


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
    parser.add_argument("--quick", action="store_true", help="one epoch on a handful of images, to see that it runs")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of the results (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the tables into")
    args = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    if args.data is not None:
        measure_all(args)
    if args.data is None or args.write is not None or args.quick:
        runs = read(sorted(args.output.glob("*.json")))
        text = report(runs)
        print(text)
        plot(summary(runs), args.output / "frontier.png")
        if args.write is not None:
            command = COMMAND if args.output == RESULTS else f"{COMMAND} --output {args.output}"
            write_generated(args.write, command, text)


if __name__ == "__main__":
    main()
