"""What FacT adapts in each architecture, from full-size models without weights, as a Markdown table.

    python -m benchmarks.coverage.architectures
    python -m benchmarks.coverage.architectures --write docs/architecture_table.md

The models are those the tests train in tiny form (tests/architectures.py), in the default size of their config or of
timm, on the meta device.
"""

import argparse
import logging
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import peft
import torch
import transformers
from peft import get_peft_model

from benchmarks.reporting.markdown import write_generated
from fact_peft import FacTConfig, FacTLinear
from tests.architectures import ARCHITECTURES, Architecture

RANK = 4
HEADER = ("architecture", "class", "parameters", "linear layers", "stacks (slices of in x out)", f"FacT-TT, r={RANK}")
COMMAND = "python -m benchmarks.coverage.architectures"


def row(name: str, architecture: Architecture) -> tuple[str, ...]:
    """One line of the table."""
    with torch.device("meta"):
        model = architecture.build_full()
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        model = get_peft_model(model, FacTConfig(rank=RANK)).get_base_model()
    stacks = model.factors
    slices = {key: len(stack.fact_Sigma["default"]) for key, stack in stacks.items()}
    return (
        name,
        f"`{architecture.model}`",
        f"{num_parameters / 1e6:,.0f}M",
        str(sum(isinstance(module, FacTLinear) for module in model.modules())),
        ", ".join(f"{count} of {key.replace('x', ' x ')}" for key, count in slices.items()),
        f"{sum(factor.numel() for factor in stacks.parameters()):,}",
    )


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| " + " | ".join(HEADER) + " |"
    yield "|---|---|--:|--:|---|--:|"
    for name, architecture in ARCHITECTURES.items():
        yield "| " + " | ".join(row(name, architecture)) + " |"
    yield ""
    yield (
        f"Default sizes of transformers {transformers.__version__} and timm {version('timm')}, with peft "
        f"{peft.__version__}. The last column counts the factors, not the head that is trained beside them."
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the table into")
    file = parser.parse_args().write
    logging.disable(logging.WARNING)  # the default configs of some models disagree with themselves, at length
    text = "\n".join(table())
    if file is None:
        print(text)
    else:
        write_generated(file, COMMAND, text)


if __name__ == "__main__":
    main()
