"""An image classifier as an ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn


class Logits(nn.Module):
    """A transformers classifier from pixels to logits alone, as an ONNX graph has no output objects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor) -> Tensor:
        """(images, channels, height, width) to (images, classes)."""
        output: Any = self.model(pixel_values)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits


def export_onnx(model: nn.Module, image_processor: Any, file: Path) -> None:
    """Export a classifier, adapted or merged, for batches of any size of the images that its processor makes.

    Args:
        model: A classifier of transformers, or one that returns logits.
        image_processor: Its image processor, from which the size of the images is taken.
        file: The file to write.

    Raises:
        ImportError: If the packages ``onnx`` and ``onnxscript`` are not installed.
    """
    pixel_values = image_processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    device = next(model.parameters()).device
    program = torch.onnx.export(
        Logits(model).eval(),
        (pixel_values.repeat(2, 1, 1, 1).to(device),),  # two: of one image the exporter would fix the number
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("images", min=1)}},
        dynamo=True,
    )
    assert program is not None
    program.save(file)
