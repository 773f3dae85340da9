"""A pretrained backbone: how to build it with a fresh head, and how to call it."""

import hashlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoModelForImageClassification

from fact_peft.architecture.heads import find_classifiers

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class Backbone:
    """
    Attributes:
        build: The pretrained model with a fresh head of so many labels.
        fingerprint: Of its weights.
        mean: Of the channels of images in [0, 1].
        std: Likewise.
        precision: ``"float32"``, or ``"bfloat16"`` by autocast with weights in float32.
        options: Further arguments of the forward pass.
    """

    build: Callable[[int], nn.Module]
    fingerprint: str
    mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    std: tuple[float, ...] = (0.5, 0.5, 0.5)
    precision: str = "float32"
    options: dict[str, Any] = field(default_factory=dict)

    def normalise(self, images: Tensor) -> Tensor:
        """Bytes (N, 3, H, W) as the model wants them: float32 on its device."""
        mean, std = (torch.tensor(values, device=DEVICE).view(3, 1, 1) for values in (self.mean, self.std))
        return (images.to(DEVICE).float() / 255 - mean) / std

    def logits(self, model: nn.Module, images: Tensor) -> Tensor:
        """Logits (N, labels) in float32 of images (N, 3, H, W) of bytes."""
        with torch.autocast(DEVICE, torch.bfloat16, enabled=self.precision == "bfloat16"):
            return model(pixel_values=self.normalise(images), **self.options).logits.float()


def load(name: str, precision: str) -> Backbone:
    """A backbone of the Hub or of a folder.

    Args:
        name: What `AutoModelForImageClassification.from_pretrained` takes; a head it may have is replaced.
        precision: See `Backbone`.
    """
    build = partial(
        AutoModelForImageClassification.from_pretrained,
        name,
        dtype=torch.float32,
        ignore_mismatched_sizes=True,
        # On a CPU, flash attention makes a product for every image and head, which doubles the time of short sequences.
        attn_implementation=None if DEVICE == "cuda" else "eager",
    )
    model = build(num_labels=2)
    processor = AutoImageProcessor.from_pretrained(name)
    # Models that interpolate their positions only when asked to; the others do, or need none.
    can_interpolate = "interpolate_pos_encoding" in inspect.signature(model.forward).parameters
    return Backbone(
        build=lambda num_labels: fresh(build(num_labels=num_labels)),
        fingerprint=fingerprint(model),
        mean=tuple(processor.image_mean),
        std=tuple(processor.image_std),
        precision=precision,
        options={"interpolate_pos_encoding": True} if can_interpolate else {},
    )


def fresh(model: nn.Module) -> nn.Module:
    """`model` on the device, with heads drawn anew, since one of the same size would have come pretrained."""
    for name in find_classifiers(model):
        for module in model.get_submodule(name).modules():
            if isinstance(module, nn.Linear):
                module.reset_parameters()
    return model.to(DEVICE)


def fingerprint(model: nn.Module) -> str:
    """Of the weights without heads."""
    heads = tuple(f"{name}." for name in find_classifiers(model))
    digest = hashlib.sha256()
    for name, parameter in sorted(model.state_dict().items()):
        if not name.startswith(heads):
            digest.update(name.encode() + parameter.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:12]


def local_name(name: str) -> str:
    """A name for folders of results: the last part of a Hub name or path."""
    return Path(name).name
