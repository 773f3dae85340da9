"""One adapter per image of a batch: ``model(pixel_values=..., adapter_names=["a", "b", "__base__"])``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

from torch import Tensor, nn

from .call import BASE, MixedBatch, calling_with
from .head import FacTHead
from .layer import FacTLinear

# What models call their batch, where they do not say so themselves.
INPUTS = ("pixel_values", "input_ids", "inputs_embeds", "input_values", "input_features", "x")


def mixed_batch(
    model: nn.Module, adapter_names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> AbstractContextManager[None]:
    """Within the context, `model` uses the named adapter for each image, in this thread.

    Args:
        model: The adapted model.
        adapter_names: One per image; ``"__base__"`` for none.
        args: What `model` will be called with.
        kwargs: The same.

    Raises:
        ValueError: If the names are not one per image, the model is training or has merged adapters, or a name is
            unknown.
    """
    layers = [module for module in model.modules() if isinstance(module, FacTLinear)]
    check_names(adapter_names, {BASE}.union(*(layer.fact_slices for layer in layers)))
    for name, inputs in batches(model, args, kwargs):
        if len(inputs) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} names for a batch of {len(inputs)} ({name}); pass one per "
                "image."
            )
    if model.training:
        raise ValueError("adapter_names works in evaluation mode only; call model.eval() first.")
    if any(layer.merged for layer in layers):
        raise ValueError("adapter_names does not work while adapters are merged; call unmerge_adapter() first.")
    heads = [module for module in model.modules() if isinstance(module, FacTHead)]
    batch = MixedBatch(adapter_names, frozenset([*layers, *heads]), has_labels=kwargs.get("labels") is not None)
    return calling_with(batch)


def check_names(adapter_names: Sequence[str], known: set[str]) -> None:
    """Refuse what is not a list of known names.

    Raises:
        ValueError: If it is no list, is empty, or has an unknown name in it.
    """
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names={adapter_names!r} is not a list of strings; pass one name per image.")
    if not adapter_names:
        raise ValueError("adapter_names=[] names no adapter; pass one name per image, or None for the active adapter.")
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"adapter_names names {unknown}, but there are only {sorted(known)}.")


def batches(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of those arguments that are a batch."""
    if args and isinstance(args[0], Tensor):
        yield "the first argument", args[0]
    for name in dict.fromkeys([getattr(model, "main_input_name", "pixel_values"), *INPUTS]):
        if isinstance(kwargs.get(name), Tensor):
            yield name, kwargs[name]
