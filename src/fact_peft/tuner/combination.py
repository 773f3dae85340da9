"""Exact weighted sums of adapters, made by concatenating their factors.

With U = [U_1 ... U_n], V = [V_1 ... V_n] and a block-diagonal core whose block i is w_i s_i Sigma_k of adapter i,
U Sigma_k V^T is the sum of the adapters' increments times their weights.
"""

import functools
import math
from collections.abc import Mapping, Sequence

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from ..adapter.names import by_key
from ..adapter.validation import factor_shapes
from ..architecture.linears import part_names
from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import PARTS, describe_layout
from .layer import FacTLinear


@torch.no_grad()
def weighted_sum(
    adapters: Sequence[Adapter],
    weights: Sequence[float],
    heads: Mapping[str, Tensor] | None = None,
    order: Sequence[str] | None = None,
) -> Adapter:
    """The adapter whose increments are exactly the weighted sum of those of other adapters.

    It is a tensor-train adapter whose rank is the sum of their ranks. The adapters may have different decompositions,
    scales and layers. Federated averaging of n clients is ``weighted_sum(adapters, [1 / n] * n)``.

    Args:
        adapters: The adapters to sum.
        weights: Their weights, in the same order; negative ones subtract.
        heads: The base model's own tensors of the trained heads, by name, to which the weighted changes that the
            adapters made are added. They are not needed if the weights add up to 1.
        order: All adapted layers in the order of the model. It is needed if the adapters have different layers.

    Raises:
        ValueError: If there is not one finite weight per adapter, an adapter trains biases, the ranks add up to more
            than a layer's width, or `heads` or `order` is missing.
    """
    if len(adapters) != len(weights) or not adapters:
        raise ValueError(f"weights={list(weights)!r} must be one number for each of {len(adapters)} adapters.")
    if not all(math.isfinite(weight) for weight in weights):
        raise ValueError(f"weights={list(weights)!r} must be finite numbers.")
    if any(adapter.config.bias != "none" for adapter in adapters):
        raise ValueError("Adapters that train biases (bias='all' or 'fact_only') cannot be summed: biases are shared.")
    config = summed_config(adapters, order)
    numbers = (factor for adapter in adapters for group in adapter.factors.values() for factor in group.values())
    dtype = functools.reduce(torch.promote_types, (factor.dtype for factor in numbers), torch.float32)
    factors = {
        stack: {letter: torch.zeros(shape, dtype=dtype) for letter, shape in shapes.items()}
        for stack, shapes in factor_shapes(config).items()
    }
    start = 0
    for adapter, weight in zip(adapters, weights, strict=True):
        columns = slice(start, start + adapter.config.rank)
        start = columns.stop
        decomposition = DECOMPOSITIONS[adapter.config.decomposition]
        for layer, theirs in adapter.slices.items():
            owned, summand = config.slices[layer], adapter.factors[theirs.stack]
            total = factors[owned.stack]
            total["U"][:, columns], total["V"][:, columns] = summand["U"], summand["V"]
            cores = decomposition.cores(summand, theirs.first, theirs.count)
            places = [ours for other, ours in zip(theirs.places, owned.places, strict=True) if other is not None]
            total["Sigma"][places, columns, columns] = weight * adapter.config.scaling * cores.to(total["Sigma"])
    return Adapter.from_state_dict(config, {**by_key(factors), **summed_heads(adapters, weights, heads)}, "The sum")


def sum_of_model(model: nn.Module, adapter_names: Sequence[str], weights: Sequence[float]) -> Adapter:
    """`weighted_sum` of adapters of `model`."""
    if len(set(adapter_names)) < len(adapter_names):
        raise ValueError(f"adapters={adapter_names!r} names one adapter twice; add up its weights.")
    heads = {
        f"{name}.{key}": value.detach()
        for name, module in model.named_modules()
        if isinstance(module, ModulesToSaveWrapper)
        for key, value in module.original_module.state_dict().items()
    }
    order = [name for name, module in model.named_modules() if isinstance(module, FacTLinear)]
    return weighted_sum([Adapter.of(model, name) for name in adapter_names], weights, heads, order)


def summed_config(adapters: Sequence[Adapter], order: Sequence[str] | None) -> FacTConfig:
    """The config of a sum. It has the layers, and the parts of fused layers, that any of the adapters has.

    Every block has its own U and V if this is so in one of the adapters.
    """
    layers = list(adapters[0].slices)
    if any(list(adapter.slices) != layers for adapter in adapters):
        if order is None:
            raise ValueError(
                "The adapters have different layers, whose order is the model's: load them into it and call "
                "add_weighted_adapter."
            )
        owned = set().union(*(adapter.slices for adapter in adapters))
        layers = [layer for layer in order if layer in owned]
    shapes, parts = {}, {}
    for layer in layers:
        owners = [adapter.slices[layer] for adapter in adapters if layer in adapter.slices]
        shapes[layer] = owners[0].in_features, owners[0].out_features
        if all(slices.parts for slices in owners):
            wanted = "".join(part for part in PARTS if any(part in slices.parts for slices in owners))
            if wanted != PARTS:
                parts[layer] = wanted
    rank = sum(adapter.config.rank for adapter in adapters)
    width = min(min(slices.in_width, slices.out_width) for adapter in adapters for slices in adapter.slices.values())
    if rank > width:
        raise ValueError(f"The ranks add up to rank={rank}, which is larger than {width}, the width of a layer.")
    first = adapters[0].config
    heads = [name for adapter in adapters for name in adapter.config.modules_to_save or []]
    return FacTConfig(
        rank=rank,
        scale=1.0,  # those of the summands are in the cores
        target_modules={part for layer in layers for part in part_names(layer, parts.get(layer, ""))},
        share="block" if any(adapter.config.share == "block" for adapter in adapters) else "model",
        modules_to_save=list(dict.fromkeys(heads)),
        labels=first.labels if all(adapter.config.labels == first.labels for adapter in adapters) else None,
        layout=describe_layout(shapes, parts),
        base_model_name_or_path=first.base_model_name_or_path,
        revision=first.revision,
        task_type=first.task_type,
        auto_mapping=first.auto_mapping,
        inference_mode=first.inference_mode,
    )


def summed_heads(
    adapters: Sequence[Adapter], weights: Sequence[float], heads: Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """The original heads plus the weighted sum of what the adapters changed in them."""
    summed = {}
    for key in dict.fromkeys(key for adapter in adapters for key in adapter.others):
        owners = [(a.others[key], weight) for a, weight in zip(adapters, weights, strict=True) if key in a.others]
        first, total = owners[0][0], sum(weight for _, weight in owners)
        if not first.is_floating_point():
            summed[key] = first
            continue
        if heads is not None and key in heads:
            original = heads[key].to(first)
        elif math.isclose(total, 1.0, rel_tol=1e-6):
            original = torch.zeros_like(first)  # any tensor gives the same sum
        else:
            raise ValueError(
                f"The weights of the adapters that train {key} add up to {total:g}; pass the base model's own tensor "
                "in heads, or weights that add up to 1."
            )
        summed[key] = original + torch.stack([(tensor - original) * weight for tensor, weight in owners]).sum(0)
    return summed
