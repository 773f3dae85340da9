"""Accuracy against trainable parameters on real images, FacT beside other methods, each tuned with the same budget.

    python -m benchmarks.frontier --data FOLDER                        # measures what is missing
    python -m benchmarks.frontier --write benchmarks/README.md         # table and plot from what was measured
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
import copy
import hashlib
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification, get_cosine_schedule_with_warmup, set_seed
from transformers.utils import logging

from benchmarks.frontier_backbone import normalise, pretrain
from benchmarks.frontier_methods import METHODS, REMEDIES, Method
from benchmarks.frontier_report import plot, read, report, summary
from benchmarks.frontier_tasks import TASKS, Task, make_task, read_images
from benchmarks.markdown import write_generated
from benchmarks.results import Results

RESULTS = Path(__file__).parent / "results" / "frontier"
COMMAND = "python -m benchmarks.frontier"
BACKBONE = Path("outputs") / "frontier" / "backbone"
FIRST_RATE = 4e-3  # of the search, and of every head
STEP = 4.0  # of the search


class Protocol(NamedTuple):
    """How a method is run.

    Attributes:
        sizes: Images to train on, to choose the learning rate on, and to test on.
        epochs: Passes over the training images.
        trials: Learning rates tried.
        seeds: The first is that of the trials.
    """

    sizes: tuple[int, int, int] = (1000, 500, 2000)
    epochs: int = 10
    trials: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 50


QUICK = Protocol(sizes=(20, 10, 10), epochs=1, trials=2, seeds=(0, 1), batch_size=10)


def next_rate(accuracies: dict[float, float]) -> float:
    """The learning rate to try after those with these validation accuracies.

    A step beyond the best if that lies at the edge, upwards at first; else between it and its better neighbour.
    """
    rates = sorted(accuracies)
    best = max(rates, key=accuracies.__getitem__)
    if best == rates[-1]:
        return best * STEP
    if best == rates[0]:
        return best / STEP
    at = rates.index(best)
    return math.sqrt(best * max(rates[at - 1], rates[at + 1], key=accuracies.__getitem__))


def groups(model: nn.Module, method: Method, learning_rate: float) -> list[dict[str, Any]]:
    """What is trainable, with its learning rate, for an optimizer."""

    def rate(name: str) -> float:
        if "classifier" in name:
            return FIRST_RATE if method.own_head_rate else learning_rate
        return learning_rate * math.prod(factor for part, factor in method.multipliers.items() if part in name)

    return [{"params": [p], "lr": rate(name)} for name, p in model.named_parameters() if p.requires_grad]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent of `images` whose largest logit is that of their label."""
    predicted = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in images.split(200)])
    return 100 * (predicted == labels).sum().item() / len(labels)


def run(
    backbone: ViTForImageClassification, task: Task, method: Method, learning_rate: float, seed: int, protocol: Protocol
) -> dict[str, Any]:
    """Adapt a copy of the backbone with a fresh head: AdamW, a tenth of the steps warm-up, cosine decay."""
    start = time.perf_counter()
    set_seed(seed)
    model = copy.deepcopy(backbone)
    model.classifier = nn.Linear(backbone.classifier.in_features, task.num_labels)
    model.config.num_labels = model.num_labels = task.num_labels
    model = method.adapt(model, task.train)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups(model, method, learning_rate), weight_decay=1e-4, fused=True)
    images, labels = normalise(task.train.images), task.train.labels
    steps_per_epoch = math.ceil(len(labels) / protocol.batch_size)
    num_steps = protocol.epochs * steps_per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    losses = []
    model.train()
    for _ in range(protocol.epochs):
        for batch in torch.randperm(len(labels)).split(protocol.batch_size):
            loss = nn.functional.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    return {
        "parameters": sum(p.numel() for name, p in trained.items() if "classifier" not in name),
        "val_accuracy": accuracy(model, normalise(task.val.images), task.val.labels),
        "test_accuracy": accuracy(model, normalise(task.test.images), task.test.labels),
        "train_loss": sum(losses[-steps_per_epoch:]) / steps_per_epoch,
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(
    backbone: ViTForImageClassification,
    task: Task,
    names: list[str],
    results: Results,
    protocol: Protocol,
    fingerprint: str,
) -> None:
    """Run what `results` lacks: for each method the trials, then the chosen learning rate with the other seeds."""
    for name in names:
        method = {**METHODS, **REMEDIES}[name]

        def outcome(learning_rate: float, seed: int, name: str = name, method: Method = method) -> dict[str, Any]:
            setting = {"method": name, "learning_rate": learning_rate, "seed": seed, "backbone": fingerprint}
            setting |= protocol._asdict()
            found = results.find(**setting)
            if found is None:
                found = run(backbone, task, method, learning_rate, seed, protocol)
                results.add(setting, found)
                print(f"{results.file.stem}, {name}, rate {learning_rate:.2g}, seed {seed}: {found}", flush=True)
            return found

        accuracies: dict[float, float] = {}
        while len(accuracies) < protocol.trials:
            rate = next_rate(accuracies) if accuracies else FIRST_RATE
            accuracies[rate] = outcome(rate, protocol.seeds[0])["val_accuracy"]
        chosen = max(accuracies, key=accuracies.__getitem__)
        for seed in protocol.seeds[1:]:
            outcome(chosen, seed)


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
