"""What a task takes on disk in each storage, head and config included: ViT-B/16 with a head of 100 classes.

    python -m benchmarks.bytes.storage_sizes
    python -m benchmarks.bytes.storage_sizes --write benchmarks/bytes/MEASURED.md

The backbone has shapes but no weights; factors and head are random numbers, whose bytes are those of any others.
"""

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.reporting.markdown import table, write_generated
from fact_peft import Adapter, FacTConfig
from fact_peft.adapter.storage import STORAGES
from fact_peft.operations.inspection import TaskBytes, task_bytes

COMMAND = "python -m benchmarks.bytes.storage_sizes"
NUM_LABELS = 100
METHODS = [("tt", 4), ("tt", 8), ("tk", 16)]
WAYS = [*((storage, None) for storage in STORAGES), ("int4", "int4"), ("int2", "int2")]  # of factors and head


def adapted(decomposition: str, rank: int, num_labels: int) -> PeftModel:
    """A ViT-B/16 without weights but for the adapter and its head."""
    with torch.device("meta"):
        backbone = ViTForImageClassification(ViTConfig(num_labels=num_labels))
        model = get_peft_model(backbone, FacTConfig(rank=rank, decomposition=decomposition))
    torch.manual_seed(0)
    vit = model.base_model.model
    for trained in (vit.factors, vit.classifier.modules_to_save):
        trained.to_empty(device="cpu")
        for parameter in trained.parameters():
            nn.init.normal_(parameter)
    return model


def measure(model: PeftModel) -> TaskBytes:
    with tempfile.TemporaryDirectory() as folder:
        adapter = Adapter.of(model)
        adapter.write(folder)
        return task_bytes(adapter, Path(folder))


def rows() -> Iterator[list[str]]:
    for decomposition, rank in METHODS:
        model = adapted(decomposition, rank, NUM_LABELS)
        config = model.peft_config["default"]
        for config.storage, config.head_storage in WAYS:
            taken = measure(model)
            parts = (taken.factors, taken.others, taken.header + taken.config, taken.total)
            name = f"FacT-{decomposition.upper()} r={rank}"
            yield [name, str(config.storage), str(config.storage_of_heads), *(f"{part:,}" for part in parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the table into")
    file = parser.parse_args().write
    header = ["adapter", "factors in", "head in", "factors", "head", "names and config", "bytes a task"]
    text = table(header, rows())
    print(text)
    if file is not None:
        write_generated(file, COMMAND, text)


if __name__ == "__main__":
    main()
