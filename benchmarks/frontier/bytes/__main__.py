"""Accuracy against bytes on disk, head and config included, of one training stored in many ways.

    python -m benchmarks.frontier.bytes --backbone facebook/dinov2-small --data FOLDER    # measures what is missing
    python -m benchmarks.frontier.bytes --output RESULTS --write PAGE                     # tables and plot
    python -m benchmarks.frontier.bytes ... --image_size 70 --tasks dtd10 rsscn7          # on a CPU

Every method is trained once a task and seed, at its first learning rate, and kept as float32 in --trained. What is
stored is made from that: FacT's factors as trained and orthogonalized, the head in 8 bits or in 4; other methods packed
as FacT is.

Each is a record in RESULTS/TASK.json, and is not measured again; backbone and tasks are as for benchmarks.frontier.
"""

import argparse
from functools import cache
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from benchmarks.frontier.backbones import Backbone, load
from benchmarks.frontier.bytes.report import plot, read, report
from benchmarks.frontier.bytes.storing import AS_TRAINED, ORTHOGONALIZED, is_fact, store_fact, store_other
from benchmarks.frontier.bytes.training import trained
from benchmarks.frontier.command_line import frontier_parser, parse
from benchmarks.frontier.methods import METHODS
from benchmarks.frontier.search import Protocol, accuracy
from benchmarks.frontier.tasks import CACHE, Task, read_task, task_names
from benchmarks.reporting.markdown import write_generated
from benchmarks.reporting.results import Results

WANTED = ["FacT-TT r=4", "FacT-TT r=8", "linear probe", "LoRA r=1", "VeRA r=256"]
# Storages of factors and head, and the forms in which factors are rounded to them.
WAYS = [
    ("float32", "float32", AS_TRAINED),
    ("float16", "float16", AS_TRAINED),
    ("int8", "int8", AS_TRAINED),
    *((storage, "int8", form) for storage in ("int4", "int2") for form in (AS_TRAINED, ORTHOGONALIZED)),
    *((storage, "int4", AS_TRAINED) for storage in ("int4", "int2")),
]


def measure(args: argparse.Namespace, backbone: Backbone, task_name: str, task: Task, name: str, seed: int) -> None:
    """Train what is missing of a method on a task, and store and test what is missing of that."""
    method, protocol = METHODS[name], Protocol(args.epochs, args.batch_size)
    stem = f"{task_name}-{name.replace(' ', '_')}-seed{seed}-{args.image_size}px-{args.precision}-{args.epochs}"
    start = args.trained / f"{stem}.safetensors"
    results = Results(args.output / f"{task_name}.json")

    def keep(storage: str, head_storage: str, form: str) -> None:
        setting: dict[str, Any] = {
            "method": name,
            "seed": seed,
            "storage": storage,
            "head_storage": head_storage,
            "form": form,
            "backbone": backbone.fingerprint,
            "num_test": len(task.test.labels),
            "num_labels": task.num_labels,
            "epochs": args.epochs,
            "batch_size": args.batch_size,
            "image_size": args.image_size,
            "precision": args.precision,
        }
        if results.find(**setting) is not None:
            return
        model, heads = trained(backbone, task, method, seed, protocol, start)
        found = (
            store_fact(model, storage, head_storage, form)
            if is_fact(model)
            else store_other(model, heads, storage, head_storage)
        )
        found["test_accuracy"] = accuracy(backbone, model, task.test)
        results.add(setting, found)
        tqdm.write(f"{task_name}, {name}, {storage}, head {head_storage}, {form}: {found}")

    fact = name.startswith("FacT")
    for storage, head_storage, form in WAYS:
        if storage in args.storages and (fact or form == AS_TRAINED):
            keep(storage, head_storage, form)


def main() -> None:
    parser = frontier_parser(__doc__)
    add = parser.add_argument
    add("--tasks", nargs="+", help="(default: all in --data)")
    add("--methods", nargs="+", choices=METHODS, default=WANTED, metavar="METHOD", help=f"(default: {WANTED})")
    storages = list(dict.fromkeys(storage for storage, _, _ in WAYS))
    add("--storages", nargs="+", choices=storages, default=storages, help="(default: all)")
    add("--seeds", type=int, nargs="+", default=[0], help="(default: 0)")
    add("--trained", type=Path, default=Path("outputs") / "frontier" / "bytes" / "trained", help="what was trained")
    args = parse(parser, "frontier/bytes")
    if args.data is not None:
        backbone = load(args.backbone, args.precision)
        task_of = cache(lambda task: read_task(args.data, task, args.image_size, CACHE))
        for seed in args.seeds:
            for name in args.methods:
                for task in args.tasks or task_names(args.data):
                    measure(args, backbone, task, task_of(task), name, seed)
    runs = read(args.output)
    text = report(runs)
    print(text)
    plot(runs, args.output / "bytes.png")
    if args.write is not None:
        write_generated(args.write, f"python -m benchmarks.frontier.bytes --output {args.output}", text)


if __name__ == "__main__":
    main()
