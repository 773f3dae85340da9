"""What is served, a ViT-Ti with random weights and adapters with random factors, and pictures to ask about."""

import io
from pathlib import Path

import numpy as np
import torch
from peft import get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from fact_peft import FacTConfig

SIDE, NUM_LABELS, RANK = 96, 10, 8
VIT_TI = {"hidden_size": 192, "intermediate_size": 768, "num_hidden_layers": 12, "num_attention_heads": 3}


def save_backbone(folder: Path) -> None:
    torch.manual_seed(0)
    ViTForImageClassification(ViTConfig(**VIT_TI, image_size=SIDE, num_labels=NUM_LABELS)).save_pretrained(folder)
    ViTImageProcessor(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)


def save_adapters(backbone: Path, folder: Path, count: int) -> list[str]:
    """`count` adapters that differ in every number, saved below `folder`; returns their names."""
    vit = ViTForImageClassification.from_pretrained(backbone)
    get_peft_model(vit, FacTConfig(rank=RANK, init_weights=False)).save_pretrained(folder / "first")
    tensors = load_file(folder / "first" / "adapter_model.safetensors")
    config = (folder / "first" / "adapter_config.json").read_text()
    names = [f"adapter-{number}" for number in range(count)]
    for name in names:
        (folder / name).mkdir()
        (folder / name / "adapter_config.json").write_text(config)
        other = {key: tensor[torch.randperm(len(tensor))] + 0.01 for key, tensor in tensors.items()}
        save_file(other, folder / name / "adapter_model.safetensors", {"format": "pt"})
    return names


def pictures(count: int) -> list[bytes]:
    """JPEG files of 120 x 120 pixels, to be shrunk by the service."""
    files = [io.BytesIO() for _ in range(count)]
    for number, file in enumerate(files):
        coarse = np.random.default_rng(number).integers(0, 256, (12, 12, 3), dtype="uint8")
        Image.fromarray(coarse).resize((120, 120), Image.Resampling.BICUBIC).save(file, "JPEG")
    return [file.getvalue() for file in files]
