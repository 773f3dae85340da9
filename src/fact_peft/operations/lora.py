"""A FacT adapter as a LoRA adapter, exactly.

A layer is one slice high or one slice wide, so its dW has rank r: it is a LoRA of rank r without any approximation, and
can be served where only LoRA is known. It costs more parameters, since a LoRA shares nothing.
"""

from __future__ import annotations

import os

from peft import LoraConfig, get_peft_model_state_dict
from torch import Tensor, nn

from ..architecture.multihead import IN_PROJ
from ..storage.adapter_file import write_adapter
from ..tuner.config import fact_config
from ..tuner.layer import FacTLinear

PREFIX = "base_model.model."
Pairs = dict[str, tuple[Tensor, Tensor]]


def adapted_attentions(model: nn.Module, adapter_name: str) -> dict[str, nn.MultiheadAttention]:
    """Every ``nn.MultiheadAttention`` of which an adapter has a projection, by name."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
        and any(isinstance(child, FacTLinear) and adapter_name in child.fact_slices for child in module.children())
    }


def move_to_attention(pairs: Pairs, state_dict: dict[str, Tensor], name: str, width: int) -> None:
    """Rename what belongs to the projections of one attention: PEFT's LoRA targets the attention as a whole.

    Where only one of the two is adapted, the other gets zeros.
    """
    rank, like = next((len(A), A) for key, (A, _) in pairs.items() if key.startswith(f"{name}."))
    for layer, place, bias, out_features in (
        (IN_PROJ, name, f"{name}.base_layer.in_proj_bias", 3 * width),
        ("out_proj", f"{name}.base_layer.out_proj", f"{name}.base_layer.out_proj.base_layer.bias", width),
    ):
        nothing = like.new_zeros(rank, width), like.new_zeros(out_features, rank)
        pairs[place] = pairs.pop(f"{name}.{layer}", nothing)
        trained = state_dict.pop(f"{PREFIX}{name}.{layer}.base_layer.bias", None)
        if trained is not None:
            state_dict[PREFIX + bias] = trained


def convert_to_lora(model: nn.Module, adapter_name: str = "default") -> tuple[LoraConfig, dict[str, Tensor]]:
    """Write a FacT adapter as LoRA matrices with B A = dW^T, the scale folded in (``lora_alpha = r``).

    Args:
        model: A `PeftModel`, or a model with injected FacT layers.
        adapter_name: The adapter to convert.

    Returns:
        The LoRA config and its state dict, trained heads and biases included, as `set_peft_model_state_dict` takes it.

    Raises:
        ValueError: If the model has no such FacT adapter.
    """
    config = fact_config(model, adapter_name)
    pairs = {
        name.removeprefix(PREFIX): layer.low_rank_pair(adapter_name)
        for name, layer in model.named_modules()
        if isinstance(layer, FacTLinear) and adapter_name in layer.fact_slices
    }
    state_dict = get_peft_model_state_dict(model, adapter_name=adapter_name)
    state_dict = {
        PREFIX + name.removeprefix(PREFIX): value for name, value in state_dict.items() if ".fact_" not in name
    }
    attentions = {name.removeprefix(PREFIX): module for name, module in adapted_attentions(model, adapter_name).items()}
    targets = [name for name in pairs if name.rpartition(".")[0] not in attentions] + list(attentions)
    for name, attention in attentions.items():
        move_to_attention(pairs, state_dict, name, attention.embed_dim)
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


def save_as_lora(path: str | os.PathLike[str], model: nn.Module, adapter_name: str = "default") -> None:
    """Save a FacT adapter as a LoRA adapter that ``PeftModel.from_pretrained`` loads without fact_peft.

    Raises:
        ValueError: If the model has no such FacT adapter.
    """
    lora_config, state_dict = convert_to_lora(model, adapter_name)
    write_adapter(path, lora_config, state_dict)
