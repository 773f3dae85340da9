"""Trainable parameters and adapter bytes on the shapes of the paper, from configs alone.

    python -m benchmarks.bytes.parameter_counts
    python -m benchmarks.bytes.parameter_counts --write benchmarks/bytes/MEASURED.md

Builds ViT-B/16 and Swin-B without weights, adapts them without the head, and prints the trainable parameters beside
the paper's counts. The adapter of each is also written to disk to see what a file costs beyond its numbers.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from transformers import PreTrainedModel, SwinConfig, SwinForImageClassification, ViTConfig, ViTForImageClassification

from benchmarks.reporting.markdown import write_generated
from fact_peft import FacTConfig

COMMAND = "python -m benchmarks.bytes.parameter_counts"
VIT_B = (ViTForImageClassification, ViTConfig())
SWIN_B = (
    SwinForImageClassification,
    SwinConfig(embed_dim=128, depths=[2, 2, 18, 2], num_heads=[4, 8, 16, 32]),
)
# Backbone, decomposition, rank and the count of Jie & Deng, Tables 1 and 2 and section "FacT".
ROWS = [
    ("ViT-B/16", "tt", 4, 8_448),
    ("ViT-B/16", "tt", 8, 21_504),
    ("ViT-B/16", "tt", 16, 61_440),
    ("ViT-B/16", "tk", 8, 13_952),
    ("ViT-B/16", "tk", 16, 30_976),
    ("ViT-B/16", "tk", 32, 86_528),
    ("Swin-B", "tt", 16, 135_168),
]


def backbone(name: str) -> PreTrainedModel:
    """The model with its shapes but without its numbers."""
    model_cls, config = {"ViT-B/16": VIT_B, "Swin-B": SWIN_B}[name]
    with torch.device("meta"):
        return model_cls(config)


def adapt(name: str, decomposition: str, rank: int) -> PeftModel:
    model = get_peft_model(backbone(name), FacTConfig(rank=rank, decomposition=decomposition, modules_to_save=[]))
    # Only the factors get numbers, so that they can be written to disk.
    model.base_model.model.factors.to_empty(device="cpu")
    return model


def adapter_bytes(model: PeftModel) -> int:
    """Size of the safetensors file that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return Path(folder, "adapter_model.safetensors").stat().st_size


def table() -> Iterator[str]:
    """The lines of the table."""
    yield "| backbone | method | rank | parameters | paper | bytes of numbers | bytes on disk |"
    yield f"|{'---|' * 7}"
    for name, decomposition, rank, published in ROWS:
        model = adapt(name, decomposition, rank)
        count, _ = model.get_nb_trainable_parameters()
        method = f"FacT-{decomposition.upper()}"
        yield f"| {name} | {method} | {rank} | {count:,} | {published:,} | {4 * count:,} | {adapter_bytes(model):,} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the table into")
    file = parser.parse_args().write
    text = "\n".join(table())
    print(text)
    if file is not None:
        write_generated(file, COMMAND, text)


if __name__ == "__main__":
    main()
