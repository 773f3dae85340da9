"""Whether increments can be merged into the weights of a model, and which are."""

from __future__ import annotations

from typing import Any

from torch import nn

from .layer import FacTLinear
from .removal import own_stacks


def is_merged(model: nn.Module, adapter_name: str) -> bool:
    """Whether the increment of an adapter is part of the base weights, so that it must not be changed."""
    return any(adapter_name in stack.merged_adapters for stack in own_stacks(model))


def check_mergeable(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Refuse a merge before the first layer is merged rather than at the first bad one.

    Args:
        model: The adapted model.
        adapter_names: The adapters to merge; None for the active ones.
        safe_merge: Whether to check that the merged weights are finite.

    Raises:
        ValueError: If a weight cannot take an increment, or with `safe_merge`, if a merged weight would not be finite.
    """
    for path, layer in model.named_modules():
        if not isinstance(layer, FacTLinear):
            continue
        names = layer.active_adapters if adapter_names is None else adapter_names
        for name in [name for name in names if name in layer.fact_slices]:
            if reason := why_not_mergeable(layer):
                raise ValueError(f"An increment cannot be merged into {path}: {reason}.")
            if safe_merge:
                layer.merged_weight(name, check=True)


def why_not_mergeable(layer: FacTLinear) -> str | None:
    """Why an increment added to the base weight would be lost or fail; None if it would not."""
    base_layer: Any = layer.get_base_layer()
    if layer.quantization_backend is not None:
        return None
    if "weight" not in base_layer._parameters:
        return (
            "its weight is computed from other parameters (weight_norm, spectral_norm, prune, FSDP), and would be "
            "computed anew without the increment; make it a parameter first, for instance with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if not layer.is_whole(base_layer.weight):
        return "its weight is sharded over processes; gather it, or merge in one process"
    return None
