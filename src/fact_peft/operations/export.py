"""An adapter in other forms: as a LoRA adapter, exactly, and with its base model as an ONNX file."""

import os
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.files import replacing_files, write_files
from ..adapter.names import PREFIX
from ..architecture.linears import IN_PROJ, uncompiled
from ..tuner.layer import FacTLinear

Pairs = dict[str, tuple[Tensor, Tensor]]  # A and B by layer name


def convert_to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Write a FacT adapter as LoRA matrices with B A = dW^T, the scale folded in (``lora_alpha = r``).

    Args:
        model: A `PeftModel`, or a model with injected FacT layers.
        adapter_name: The adapter to convert.

    Returns:
        The LoRA config and its state dict, trained heads and biases included, as `set_peft_model_state_dict` takes it.

    Raises:
        ValueError: If the model has no such FacT adapter, or it has an output projection of ``nn.MultiheadAttention``.
    """
    model = uncompiled(model)
    adapter = Adapter.of(model, adapter_name)
    config = adapter.config
    pairs = {
        name.removeprefix(PREFIX): layer.low_rank_pair(adapter_name)
        for name, layer in model.named_modules()
        if isinstance(layer, FacTLinear) and adapter_name in layer.fact_slices
    }
    state_dict = {f"{PREFIX}{name}": value for name, value in adapter.others.items()}
    attentions = adapted_attentions(model, pairs)
    targets = [name for name in pairs if name.rpartition(".")[0] not in attentions] + attentions
    for name in attentions:
        move_to_attention(pairs, state_dict, name)
    for name, (A, B) in pairs.items():
        state_dict[f"{PREFIX}{name}.lora_A.weight"] = A
        state_dict[f"{PREFIX}{name}.lora_B.weight"] = B

    lora_config = LoraConfig(
        r=config.rank,
        lora_alpha=config.rank,
        target_modules=targets,
        modules_to_save=config.modules_to_save,
        bias="lora_only" if config.bias == "fact_only" else config.bias,
        fan_in_fan_out=any(layer.fan_in_fan_out for layer in model.modules() if isinstance(layer, FacTLinear)),
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        inference_mode=True,
    )
    return lora_config, state_dict


def save_as_lora(model: nn.Module, folder: str | os.PathLike[str], adapter_name: str = "default") -> None:
    """Save a FacT adapter as a LoRA adapter that ``PeftModel.from_pretrained`` loads without fact_peft.

    Args:
        model: A `PeftModel`, or a model with injected FacT layers.
        folder: Where to save. Files of an adapter that lie there are replaced.
        adapter_name: The adapter to convert.

    Raises:
        ValueError: As `convert_to_lora`.
    """
    lora_config, state_dict = convert_to_lora(model, adapter_name)
    with replacing_files(folder) as staging:
        write_files(staging, lora_config, state_dict)


def adapted_attentions(model: nn.Module, pairs: Pairs) -> list[str]:
    """Names of the ``nn.MultiheadAttention`` modules whose q, k and v have a pair; output projections are refused."""
    attentions = []
    for full_name, module in model.named_modules():
        name = full_name.removeprefix(PREFIX)
        if isinstance(module, nn.MultiheadAttention) and f"{name}.out_proj" in pairs:
            raise ValueError(
                f"{name}.out_proj cannot be exported: PEFT's LoRA (0.21) adds the increment of the output projection "
                "of nn.MultiheadAttention twice. Use merge_and_unload for the plain model, or adapt without it "
                '(exclude_modules=["out_proj"]) where LoRA is wanted.'
            )
        if isinstance(module, nn.MultiheadAttention) and f"{name}.{IN_PROJ}" in pairs:
            attentions.append(name)
    return attentions


def move_to_attention(pairs: Pairs, state_dict: dict[str, Tensor], name: str) -> None:
    """Rename the pair and biases of q, k and v of an attention, since PEFT's LoRA targets the attention as a whole.

    LoRA adapts the output projection with it. Its pair is zero.
    """
    A, B = pairs[name] = pairs.pop(f"{name}.{IN_PROJ}")
    pairs[f"{name}.base_layer.out_proj"] = torch.zeros_like(A), B.new_zeros(A.shape[1], len(A))
    biases = {
        f"{name}.{IN_PROJ}.base_layer.bias": f"{name}.base_layer.in_proj_bias",
        f"{name}.out_proj.bias": f"{name}.base_layer.out_proj.base_layer.bias",
    }
    for ours, theirs in biases.items():
        if PREFIX + ours in state_dict:
            state_dict[PREFIX + theirs] = state_dict.pop(PREFIX + ours)


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
    """Export a classifier as an ONNX file that takes batches of any number of images, of its image processor's size."""
    from PIL import Image  # not every user of the package has it

    pixel_values = image_processor(images=Image.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"]
    device = next(model.parameters()).device
    program = torch.onnx.export(
        Logits(model).eval(),
        (pixel_values.repeat(2, 1, 1, 1).to(device),),  # two images: from one, the exporter would fix the number
        input_names=["pixel_values"],
        output_names=["logits"],
        dynamic_shapes={"pixel_values": {0: torch.export.Dim("images", min=1)}},
        dynamo=True,
    )
    assert program is not None
    program.save(file)
