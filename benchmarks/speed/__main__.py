"""Time and memory of a training step and of inference beside the frozen backbone, PEFT's methods and full fine-tuning.

    python -m benchmarks.speed                       # what is missing of all tables, then tables and plot
    python -m benchmarks.speed --tables step memory
    python -m benchmarks.speed --write benchmarks/speed/MEASURED.md

A step is forward, backward and optimizer step of a ViT-B/16 at 224 px with random weights; inference is a forward pass
without gradients. The floor of a step is the backbone frozen but for its head and the biases of the first q, k and v,
so that gradients flow exactly as far as adapters need them; that of inference is the backbone alone. All methods of a
table are built at once and run in turns, round by round; a ratio is the median over rounds of a method's time by the
floor's in that round, with quartiles. With images of 32 px, which are 5 tokens, there is next to nothing to multiply:
what is left is what the calls of a method cost, as they do on a device that is faster than its calls.

On a CPU, times are of the process, not of the clock, so that other work on the machine counts as little as it can, and
one thread is used unless --threads says otherwise. On a GPU, times are of the clock and the model is in bfloat16; that
has not been run yet. Memory is the highest over two steps beyond the built model, each method in a process of its own.
The table "start" has `initialize_from_gradients` with one batch, two passes over it, beside a step with that batch. In
the table of scaling one thing is varied at a time; "operations" is the ratio that counting multiplications predicts.
"""

import argparse
import gc
import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from benchmarks.reporting.markdown import write_generated
from benchmarks.reporting.results import Results
from benchmarks.speed.report import plot, report
from benchmarks.speed.steps import (
    BESIDE_START,
    DEVICE,
    DTYPE,
    FLOOR,
    SCALING,
    STEP,
    TABLES,
    TIMED,
    TINY,
    TINY_SCALING,
    Shape,
    peak_memory,
    peak_memory_alone,
    time_methods,
)

COMMAND = "python -m benchmarks.speed"
RESULTS = Path(__file__).parent / "results" / "speed.json"


def measure(
    results: Results,
    tables: Iterable[str],
    shape: Shape,
    scaling: dict[str, list[Shape]],
    memory: Iterable[str],
    rounds: int,
) -> None:
    """Measure what is missing. A table measured in turns is measured whole or not at all."""

    def setting(table: str, method: str, at: Shape) -> dict[str, Any]:
        return {"table": table, "method": method, **asdict(at), "device": DEVICE, "dtype": str(DTYPE)}

    def timed(table: str, methods: list[str], at: Shape, training: bool = True, compiled: bool = False) -> None:
        if all(results.find(**setting(table, method, at)) is not None for method in methods):
            return
        print(f"{table}: {at}", file=sys.stderr)
        for method, measured in time_methods(methods, at, training, compiled, rounds).items():
            results.add(setting(table, method, at), measured)
        gc.collect()

    for table, what in TIMED.items():
        if table in tables:
            timed(table, what.methods, what.at(shape), what.training, what.compiled)
    if "memory" in tables:
        for method in memory:
            if results.find(**setting("memory", method, shape)) is None:
                print(f"memory: {method}", file=sys.stderr)
                results.add(setting("memory", method, shape), peak_memory_alone(method, shape))
    if "scaling" in tables:
        for varied, shapes in scaling.items():
            for at in shapes:
                timed(f"scaling: {varied}", [FLOOR, "FacT-TT", "FacT-TK"], at)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=TABLES, help="which to measure (default: all)")
    parser.add_argument("--rounds", type=int, default=11, help="rounds of each table (default: 11)")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch on a CPU (default: 1)")
    parser.add_argument("--results", type=Path, help=f"JSON file of the results (default: {RESULTS})")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, two rounds; needs --results")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the tables into")
    parser.add_argument("--one-peak", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    if arguments.one_peak:
        method, shape = arguments.one_peak
        print(json.dumps(peak_memory(method, Shape(**json.loads(shape)))))
        return
    if arguments.quick and arguments.results is None:
        parser.error("--quick needs --results, so that it does not mix with the real ones.")
    results = Results(arguments.results or RESULTS)
    if arguments.quick:
        measure(results, arguments.tables, TINY, TINY_SCALING, [FLOOR, "FacT-TT"], rounds=2)
    else:
        measure(results, arguments.tables, Shape(), SCALING, [*STEP, *BESIDE_START], arguments.rounds)
    text = report(results)
    print(text)
    plot(results, results.file.with_name(f"{results.file.stem}_scaling.png"))
    if arguments.write is not None:
        write_generated(arguments.write, COMMAND, text)


if __name__ == "__main__":
    main()
