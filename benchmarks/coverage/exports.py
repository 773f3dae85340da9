"""The largest difference between exports of adapted models and the models themselves, as a Markdown table.

    python -m benchmarks.coverage.exports                                  # what is missing, an hour on one core
    python -m benchmarks.coverage.exports --only "DINOv3" "timm EVA"       # of some architectures
    python -m benchmarks.coverage.exports --write benchmarks/coverage/MEASURED.md

The models are the tiny ones of tests/architectures.py with random weights and a random adapter, in float32. A
difference is relative to the adapter's effect on the output: 1 says that the export has lost the adapter. Outputs are
compared for the two images that were exported and for three. A model that is not exported so is exported for two images
only, and the same model without an adapter is exported in the same ways to see whether it can be. Where the adapter
has little effect, a difference may exceed 1e-4 up to twice that of float32 from float64.
"""

import argparse
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnxruntime
import onnxscript
import torch
import transformers

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))

from architectures import ARCHITECTURES, Architecture
from exporting import WAYS, difference, rounding

from benchmarks.reporting import markdown
from benchmarks.reporting.results import Results

COMMAND = "python -m benchmarks.coverage.exports"
RESULTS = Path(__file__).parent / "results" / "exports.json"
COLUMNS = {**{way: (way, False) for way in WAYS}, "merged, export": ("export", True), "merged, ONNX": ("ONNX", True)}
# In float32, of the adapter's effect. Above it, and above what rounding is for the model, an export is not the model.
TOLERANCE = 1e-4
SAID = {"any": "exported", "two": "exported for two images", "none": "not exported"}


def measure(architecture: Architecture, way: str, merged: bool) -> dict[str, Any]:
    """How one model is exported, and beside it the same model without an adapter if that is not for every size."""
    measured = attempt(architecture, way, merged=merged)
    if measured["images"] != "any":
        measured["plain"] = attempt(architecture, way, plain=True)
    return measured


def attempt(architecture: Architecture, way: str, **settings: bool) -> dict[str, Any]:
    """For how many images a model is exported ("any", "two" or "none"), how exactly, and what stood in the way."""
    error = ""
    for images in ("any", "two"):
        try:
            found = difference(architecture, way, any_size=images == "any", **settings)
            # The model and its export may each be so far from the exact outputs.
            allowed = TOLERANCE if found < TOLERANCE else 2 * rounding(architecture)
            if found <= allowed:
                return {"images": images, "difference": found, "allowed": allowed, "error": error}
            error = error or f"the outputs differ by {found:.0e}"
        except Exception as exception:  # whatever torch's exporters raise
            error = error or reason(exception)
    return {"images": "none", "difference": None, "error": error}


def reason(exception: BaseException) -> str:
    """The first line of what an exporter says, or of the exception that it wraps."""
    while exception.__cause__ is not None:
        exception = exception.__cause__
    return f"{type(exception).__name__}: {str(exception).strip().partition(chr(10))[0]}"


def cell(measured: dict[str, Any] | None) -> str:
    if measured is None:
        return ""
    if measured["images"] == "none":
        return "no, nor plain" if measured["plain"]["images"] == "none" else "no"
    return f"{measured['difference']:.0e}" + (" (2)" if measured["images"] == "two" else "")


def lines(results: Results) -> Iterator[str]:
    """The table, what it says in numbers, and the reason for every export that is not for any number of images."""
    names = [name for name in ARCHITECTURES if any(each["setting"]["architecture"] == name for each in results.records)]
    found = {(name, key): results.find(architecture=name, column=key) for name in names for key in COLUMNS}
    rows = [[name, *(cell(found[name, key]) for key in COLUMNS)] for name in names]
    yield markdown.table(["architecture", *COLUMNS], rows)
    yield ""
    for key in COLUMNS:
        column = {name: measured for name in names if (measured := found[name, key]) is not None}
        exported = [each for each in column.values() if each["images"] != "none"]
        above = [f"{name} {each['allowed']:.0e}" for name, each in column.items() if each.get("allowed", 0) > TOLERANCE]
        within = max(each["difference"] for each in exported if each["difference"] < TOLERANCE)
        yield f"- {key}: {len(exported)} of {len(column)} exported, with differences of at most {within:.0e}" + (
            f"; or within rounding ({', '.join(above)})" if above else ""
        )
    yield ""
    for name in names:
        limited = {key: measured for key in COLUMNS if (measured := found[name, key]) and measured["images"] != "any"}
        for images in ("two", "none"):
            keys = [key for key, measured in limited.items() if measured["images"] == images]
            if keys:
                error = limited[keys[0]]["error"][:120]
                plain = " or ".join(sorted({SAID[limited[key]["plain"]["images"]] for key in keys}))
                yield f"- {name}; {'; '.join(keys)}: {SAID[images]}. Without an adapter: {plain}. `{error}`"
    yield ""
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
    yield f"{versions}, onnxscript {onnxscript.__version__}, onnxruntime {onnxruntime.__version__}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=ARCHITECTURES, help="architectures to export")
    parser.add_argument("--results", type=Path, default=RESULTS, help=f"JSON file of the results (default: {RESULTS})")
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the table into")
    arguments = parser.parse_args()
    logging.disable(logging.ERROR)  # exporters log their own failures at length
    warnings.simplefilter("ignore")
    results = Results(arguments.results)
    for key, (way, merged) in COLUMNS.items():
        for name in arguments.only or ARCHITECTURES:
            if results.find(architecture=name, column=key) is None:
                results.add({"architecture": name, "column": key}, measure(ARCHITECTURES[name], way, merged))
                print(name, key, cell(results.find(architecture=name, column=key)), file=sys.stderr, flush=True)
    text = "\n".join(lines(results))
    print(text)
    if arguments.write is not None:
        markdown.write_generated(arguments.write, COMMAND, text)


if __name__ == "__main__":
    main()
