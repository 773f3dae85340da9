"""Many adapters on one model: the time of a batch of different adapters, to run and to train, and of keeping 10,000.

    python -m benchmarks.many_adapters                          # what is missing, then tables and plot
    python -m benchmarks.many_adapters --parts ViT-S/96/64 capacity
    python -m benchmarks.many_adapters --write benchmarks/many_adapters/MEASURED.md

A batch is a forward pass without gradients of a ViT with random weights; adapters are of rank 8 on all linear layers of
the blocks, with a head of ten classes each. All rows of a shape are built at once and timed in turns, round by round; a
ratio is the median over rounds of a row's time by that of the reference row in that round. On a CPU, times are of the
process, not of the clock, so that other work on the machine counts as little as it can, and one thread is used unless
--threads says otherwise. On a GPU, times are of the clock and the model is in bfloat16; that has not been run yet.

Training: a step (forward, backward, AdamW) of eight tasks' adapters and heads on a ViT-S at 96 px, with 4, 8 or 16
images of each. Either one step of each of eight models with one adapter, one after another (one model stepped eight
times, since the other seven would do the same), or one step on a batch of all the images with `adapter_names`. Beside
them a step of one adapter on as many images, and the optimizers alone.

Capacity: an adapter of FacT-TT for a ViT-B is loaded from its folder 10,000 times under different names; memory is what
the process grew by. The folder is in the system's cache. PEFT's LoRA is loaded into a model until a minute is over.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers.utils import logging

from benchmarks.many_adapters.batches import DEVICE, DTYPE, SHAPES, TINY, Shape, time_batches
from benchmarks.many_adapters.capacity import ADAPTERS, TINY_ADAPTERS, fill_peft, fill_pool, in_a_process
from benchmarks.many_adapters.report import plot, report
from benchmarks.many_adapters.training import IMAGES, IN_TURN, TASKS, TINY_IMAGES, TINY_TASKS, TRAINED, time_training
from benchmarks.reporting.markdown import write_generated
from benchmarks.reporting.results import Results

COMMAND = "python -m benchmarks.many_adapters"
RESULTS = Path(__file__).parent / "results" / "many_adapters.json"
WHERE = {"device": DEVICE, "dtype": str(DTYPE)}
LARGEST = list(SHAPES.values())[-1]


def measure_batches(results: Results, shapes: dict[str, Shape], parts: list[str], rounds: int) -> None:
    """Time the shapes that are missing. One is measured whole or not at all."""
    for name, shape in shapes.items():
        setting = {"part": name, **WHERE}
        if name in parts and results.find(**setting, row="FacT, 1") is None:
            print(name, file=sys.stderr)
            for row, measured in time_batches(shape, rounds).items():
                results.add({**setting, "row": row}, measured)


def measure_training(results: Results, shape: Shape, tasks: int, batches: tuple[int, ...], rounds: int) -> None:
    """Time what is missing for each number of images a task."""
    for images in batches:
        setting = {"part": "training", **WHERE, "tasks": tasks, "images": images}
        if results.find(**setting, row=IN_TURN) is None:
            print(f"training: {images} images a task", file=sys.stderr)
            for row, measured in time_training(replace(shape, batch=images), tasks, rounds).items():
                results.add({**setting, "row": row}, measured)


def measure_capacity(results: Results, shape: Shape, adapters: int) -> None:
    """Fill what has not been filled yet."""
    for row, fill in (("AdapterPool", fill_pool), ("PEFT, LoRA", fill_peft)):
        setting = {"part": "capacity", **WHERE, "row": row}
        if results.find(**setting) is None:
            print(f"capacity: {row}", file=sys.stderr)
            results.add(setting, in_a_process(fill, shape, adapters))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = [*SHAPES, "training", "capacity"]
    parser.add_argument("--parts", nargs="+", choices=parts, default=parts, help="which to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=5, help="rounds of each shape (default: 5)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU (default: 1)")
    parser.add_argument("--results", type=Path, help=f"JSON file of the results (default: {RESULTS})")
    parser.add_argument("--quick", action="store_true", help="a tiny shape and few adapters; needs --results")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the tables into")
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.quick and arguments.results is None:
        parser.error("--quick needs --results, so that it does not mix with the real ones.")
    results = Results(arguments.results or RESULTS)
    if arguments.quick:
        measure_batches(results, TINY, list(TINY), 2)
        measure_training(results, TINY["tiny"], TINY_TASKS, TINY_IMAGES, 2)
        measure_capacity(results, TINY["tiny"], TINY_ADAPTERS)
    else:
        measure_batches(results, SHAPES, arguments.parts, arguments.rounds)
        if "training" in arguments.parts:
            measure_training(results, TRAINED, TASKS, IMAGES, arguments.rounds)
        if "capacity" in arguments.parts:
            measure_capacity(results, LARGEST, ADAPTERS)
    text = report(results)
    print(text)
    plot(results, results.file.with_suffix(".png"))
    if arguments.write is not None:
        write_generated(arguments.write, COMMAND, text)


if __name__ == "__main__":
    main()
