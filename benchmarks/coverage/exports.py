"""The largest difference between exports of adapted models and the models themselves, as a Markdown table.

    python -m benchmarks.coverage.exports                                  # about an hour on one core
    python -m benchmarks.coverage.exports --only "DINOv3" "timm EVA"       # some architectures

The models are the tiny ones of tests/architectures.py with random weights and a random adapter, in float32. A
difference is relative to the adapter's effect on the output: 1 says that the export has lost the adapter. Outputs are
compared for the two images that were exported and for three; "(2)" behind a number says that this model is exported for
two only. "no" says that it cannot be exported, which is then tried without an adapter too: "no, nor plain".
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from architectures import ARCHITECTURES, Architecture
from exporting import WAYS, Floats, difference

COLUMNS = {**{way: (way, False) for way in WAYS}, "merged, export": ("export", True), "merged, ONNX": ("ONNX", True)}


def cell(architecture: Architecture, way: str, merged: bool) -> str:
    for any_size in (True, False):
        try:
            found = difference(architecture, way, merged, any_size)
        except Exception:  # whatever torch's exporters raise
            continue
        return f"{found:.0e}" + ("" if any_size else " (2)")
    return "no" if plain_is_exported(architecture, WAYS[way]) else "no, nor plain"


@torch.no_grad()
def plain_is_exported(architecture: Architecture, export: Callable[..., object]) -> bool:
    model, inputs = architecture.build(), architecture.inputs()
    try:
        export(Floats(model, list(inputs)).eval(), tuple(inputs.values()), False)
    except Exception:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ARCHITECTURES, help="architectures to export")
    names = parser.parse_args().only or list(ARCHITECTURES)
    logging.disable(logging.ERROR)  # exporters log their own failures at length
    warnings.simplefilter("ignore")
    print("| architecture | " + " | ".join(COLUMNS) + " |")
    print("|---|" + "--:|" * len(COLUMNS))
    for name in names:
        cells = [cell(ARCHITECTURES[name], *column) for column in COLUMNS.values()]
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
