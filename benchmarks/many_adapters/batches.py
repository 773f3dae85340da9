"""What is timed: a batch whose images have one, eight or as many different adapters as images."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.reporting.timing import time_in_turns
from fact_peft import AdapterPool, FacTConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
DEVICE, DTYPE = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
REFERENCE = "FacT, 1"
RANK, RANKS, LABELS = 8, (4, 8, 16), 10


@dataclass(frozen=True)
class Shape:
    """A ViT and a batch for it."""

    width: int = 768
    image: int = 224
    batch: int = 64
    depth: int = 12

    def config(self) -> ViTConfig:
        return ViTConfig(
            image_size=self.image,
            hidden_size=self.width,
            num_hidden_layers=self.depth,
            num_attention_heads=self.width // 64,
            intermediate_size=4 * self.width,
            num_labels=LABELS,
        )

    def model(self) -> nn.Module:
        """With random weights, without spending time on their distribution."""
        with torch.device("meta"):
            model = ViTForImageClassification(self.config())
        model = model.to_empty(device=DEVICE).to(DTYPE).eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.02)
        return model


SHAPES = {
    f"{name}/{image}/{batch}": Shape(width, image, batch)
    for name, width in (("ViT-S", 384), ("ViT-B", 768))
    for image in (96, 224)
    for batch in (32, 64)
}
TINY = {"tiny": Shape(64, 32, 4, 1)}


def fact(rank: int) -> PeftConfig:
    return FacTConfig(rank=rank, init_weights=False)


def lora(rank: int) -> PeftConfig:
    return LoraConfig(
        r=rank, lora_alpha=rank, target_modules=LINEARS, modules_to_save=["classifier"], init_lora_weights=False
    )


def with_adapters(shape: Shape, configs: list[PeftConfig]) -> nn.Module:
    model = get_peft_model(shape.model(), configs[0], "0")
    for index, config in enumerate(configs[1:], start=1):
        model.add_adapter(str(index), config)
    return model.to(DEVICE, DTYPE).eval()


def rows_of(shape: Shape) -> dict[str, Callable[[], Any]]:
    """What is timed, by name: method and number of different adapters in the batch."""
    batch = shape.batch
    images = torch.randn(batch, 3, shape.image, shape.image, device=DEVICE, dtype=DTYPE)
    ours = with_adapters(shape, [fact(RANK)] * batch)
    mixed = with_adapters(shape, [fact(RANKS[index % len(RANKS)]) for index in range(batch)])
    theirs = with_adapters(shape, [lora(RANK)] * batch)
    pool = AdapterPool(shape.model())
    for name, config in ours.peft_config.items():
        pool.load(name, (config, get_peft_model_state_dict(ours, adapter_name=name)))

    def names(distinct: int) -> list[str]:
        return [str(index % distinct) for index in range(batch)]

    rows: dict[str, Callable[[], Any]] = {REFERENCE: partial(ours, pixel_values=images)}
    rows["base"] = partial(ours, pixel_values=images, adapter_names=["__base__"] * batch)
    for distinct in (8, batch) if batch > 8 else (batch,):
        rows[f"FacT, {distinct}"] = partial(ours, pixel_values=images, adapter_names=names(distinct))
    rows[f"FacT, {batch}, ranks 4 8 16"] = partial(mixed, pixel_values=images, adapter_names=names(batch))
    rows[f"AdapterPool, {batch}"] = partial(pool, images, names(batch))
    rows["LoRA, 1"] = partial(theirs, pixel_values=images)
    for distinct in (8, batch) if batch > 8 else (batch,):
        rows[f"LoRA, {distinct}"] = partial(theirs, pixel_values=images, adapter_names=names(distinct))
    return rows


@torch.no_grad()
def time_batches(shape: Shape, rounds: int) -> dict[str, dict[str, Any]]:
    """What `time_in_turns` says of every row, after one round for nothing."""
    rows = rows_of(shape)
    for run in rows.values():
        run()
    return time_in_turns(rows, REFERENCE, rounds)
