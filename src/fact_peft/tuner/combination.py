"""Sums of adapters, exact by concatenating their factors.

With U = [U_1 ... U_n], V = [V_1 ... V_n] and block-diagonal cores w_i s_i Sigma_k of adapter i, U Sigma_k V^T is the
sum of the adapters' increments times their weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import nn

from ..architecture.linears import part_names
from .config import FacTConfig
from .layer import FacTLinear


def combined_config(model: nn.Module, configs: dict[str, FacTConfig]) -> FacTConfig:
    """The config of a sum of adapters: tensor-train, of the sum of their ranks, on all the layers of any of them.

    Of a fused layer it has the parts of any of them, and it has one U and V in every block as soon as one of them has.
    """
    first = next(iter(configs.values()))
    heads = [name for config in configs.values() for name in config.modules_to_save or []]
    return FacTConfig(
        rank=sum(config.rank for config in configs.values()),
        scale=1.0,  # those of the summands are in the cores
        target_modules={
            part
            for name, layer in model.named_modules()
            if isinstance(layer, FacTLinear)
            for adapter_name in configs.keys() & layer.fact_slices.keys()
            for part in part_names(name, layer.fact_slices[adapter_name].parts)
        },
        share="block" if any(config.share == "block" for config in configs.values()) else "model",
        modules_to_save=list(dict.fromkeys(heads)),
        labels=first.labels if all(config.labels == first.labels for config in configs.values()) else None,
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        task_type=first.task_type,
        inference_mode=first.inference_mode,
    )


@torch.no_grad()
def fill_with_sum(model: nn.Module, adapter_name: str, weights: dict[str, float], ranks: Sequence[int]) -> None:
    """Make an adapter of `combined_config` the weighted sum of others.

    Args:
        model: The adapted model.
        adapter_name: The adapter to fill.
        weights: Weight by name of the adapters to sum.
        ranks: Their ranks, in the same order.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, FacTLinear) and adapter_name in layer.fact_slices]
    for layer in layers:
        for factor in layer.fact_stacks[adapter_name].factors(adapter_name).values():
            factor.zero_()
    for layer in layers:
        total, owned = layer.fact_stacks[adapter_name].factors(adapter_name), layer.fact_slices[adapter_name]
        start = 0
        for (name, weight), rank in zip(weights.items(), ranks, strict=True):
            columns = slice(start, start + rank)
            start += rank
            if name in layer.fact_slices:
                stack = layer.fact_stacks[name]
                cores = weight * stack.scale(name) * stack.cores(name, layer.fact_slices[name])
                total["U"][:, columns] = stack.fact_U[name]
                total["V"][:, columns] = stack.fact_V[name]
                places = dict(zip(layer.fact_slices[name].places, owned.places, strict=True))
                index = [place for other, place in places.items() if other is not None]
                total["Sigma"][index, columns, columns] = cores
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper) and adapter_name in module.modules_to_save:
            sum_heads(module, adapter_name, weights)


def sum_heads(wrapper: AuxiliaryTrainingWrapper, adapter_name: str, weights: dict[str, float]) -> None:
    """Heads add up as the increments do: what each adapter changed, times its weight, on top of the original."""
    heads = wrapper.modules_to_save
    original = dict(wrapper.original_module.named_parameters())
    for key, parameter in heads[adapter_name].named_parameters():
        parameter.copy_(original[key])
        for name, weight in weights.items():
            if name in heads:
                parameter.add_(heads[name].get_parameter(key) - original[key], alpha=weight)
