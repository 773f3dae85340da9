"""What `save_pretrained` writes for an adapter on a backbone without weights, split into numbers, header and config."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from peft import (
    LoraConfig,
    PeftConfig,
    PeftModel,
    UniLoraConfig,
    VBLoRAConfig,
    VeraConfig,
    get_peft_model,
)
from safetensors import safe_open
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.reporting.results import Results
from fact_peft import FacTConfig

BACKBONES = {
    "ViT-B/16": {},
    "ViT-L/16": {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096},
}
TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}
LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]

# VB-LoRA and UniLoRA keep their own default sizes of the shared bank; the length of a vector must divide every width.
METHODS: dict[str, Callable[[int], PeftConfig]] = {
    "FacT-TT": lambda rank: FacTConfig(rank=rank, modules_to_save=[]),
    "FacT-TK": lambda rank: FacTConfig(rank=rank, decomposition="tk", modules_to_save=[]),
    "LoRA": lambda rank: LoraConfig(r=rank, target_modules=LINEARS),
    "VeRA": lambda rank: VeraConfig(r=rank, target_modules=LINEARS, save_projection=False),
    "VeRA, projections saved": lambda rank: VeraConfig(r=rank, target_modules=LINEARS),
    "VB-LoRA": lambda rank: VBLoRAConfig(r=rank, target_modules=LINEARS, vector_length=32),
    "VB-LoRA, top-k saved": lambda rank: VBLoRAConfig(
        r=rank, target_modules=LINEARS, vector_length=32, save_only_topk_weights=True
    ),
    "UniLoRA": lambda rank: UniLoraConfig(r=rank, target_modules=LINEARS),
}
RANKS = (4, 8, 16, 32)


def adapt(shape: dict[str, int], config: PeftConfig) -> PeftModel:
    """A backbone of `shape` with an adapter; its weights are one number each, which PEFT reads but never writes."""
    with torch.device("meta"):
        vit = ViTForImageClassification(ViTConfig(**shape))
    for module in vit.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(torch.zeros(1).expand(parameter.shape)))
    return get_peft_model(vit, config)


def measure(shape: dict[str, int], config: PeftConfig) -> dict[str, int]:
    """Parameters trained, and bytes of the numbers, of the safetensors file around them and of the config."""
    model = adapt(shape, config)
    parameters, _ = model.get_nb_trainable_parameters()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        file = Path(folder, "adapter_model.safetensors")
        with safe_open(file, framework="pt") as saved:
            numbers = sum(saved.get_tensor(name).nbytes for name in saved.keys())
        return {
            "parameters": parameters,
            "numbers": numbers,
            "header": file.stat().st_size - numbers,
            "config": Path(folder, "adapter_config.json").stat().st_size,
        }


def percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}"


def table(results: Results) -> str:
    """Markdown, a row per setting in the order in which they were measured."""
    lines = [
        "| backbone | method | rank | trained parameters | numbers | header | config | overhead, % | with config, % |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for record in results.records:
        setting, found = record["setting"], record["measured"]
        cells = [setting["backbone"], setting["method"], str(setting["rank"])]
        cells += [f"{found[name]:,}" for name in ("parameters", "numbers", "header", "config")]
        cells += [percent(found["header"], found["numbers"])]
        cells += [percent(found["header"] + found["config"], found["numbers"])]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
