"""Tiny backbones of every kind the behaviour suite runs on. The same name always gives the same weights."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    DeiTConfig,
    DeiTForImageClassification,
    SwinConfig,
    SwinForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

NUM_LABELS = 5
VIT_SHAPE = {
    "image_size": 16,
    "patch_size": 8,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 128,
    "num_labels": NUM_LABELS,
}


def vit(**changes: int) -> nn.Module:
    return ViTForImageClassification(ViTConfig(**{**VIT_SHAPE, **changes}))


def deit() -> nn.Module:
    return DeiTForImageClassification(DeiTConfig(**VIT_SHAPE))


def swin() -> nn.Module:
    return SwinForImageClassification(
        SwinConfig(
            image_size=16,
            patch_size=2,
            embed_dim=16,
            depths=[1, 2],
            num_heads=[1, 2],
            window_size=4,
            drop_path_rate=0.0,
            num_labels=NUM_LABELS,
        )
    )


def timm_vit() -> nn.Module:
    timm = pytest.importorskip("timm")
    return timm.models.VisionTransformer(
        img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=NUM_LABELS
    )


BACKBONES = {"vit": vit, "deit": deit, "swin": swin, "timm": timm_vit}


def make_backbone(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(7)
    return BACKBONES[name]().to(dtype).eval()


def images(dtype: torch.dtype = torch.float32, count: int = 3) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(11)).to(dtype)


def image_processor(**settings: Any) -> ViTImageProcessor:
    """For `images`."""
    pytest.importorskip("PIL")
    pytest.importorskip("torchvision")
    return ViTImageProcessor(size={"height": 16, "width": 16}, **settings)


def to_int8(model: nn.Module, is_quantized: Callable[[nn.Module, str], bool] | None = None) -> None:
    """Quantise the linear layers of a model with torchao."""
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), is_quantized)


def logits(model: nn.Module, pixels: Tensor) -> Tensor:
    """Class scores (images, labels) of a transformers or timm classifier."""
    output = model(pixels)
    return output if isinstance(output, Tensor) else output.logits


def holdings(model: nn.Module) -> list[dict[str, int]]:
    """How many entries every dictionary of every module has: parameters, hooks, what it keeps by adapter."""
    return [{key: len(held) for key, held in vars(m).items() if isinstance(held, Mapping)} for m in model.modules()]


@torch.no_grad()
def alone(model: nn.Module, name: str) -> Tensor:
    """Class scores of `images` in float64 under one adapter of `model`, or under none: ``"__base__"``."""
    if name == "__base__":
        with model.disable_adapter():
            return logits(model, images(torch.float64))
    model.set_adapter(name)
    return logits(model, images(torch.float64))
