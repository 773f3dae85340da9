"""One adapter per image of a batch: ``model(pixel_values=..., adapter_names=["a", "b", "__base__"])``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..method.per_image import FactorBank, reordered
from ..method.tensorization import Slices
from .batch_axis import check_batch_axis
from .factors import FacTStack
from .head import FacTHead
from .layer import FacTLinear
from .mixed_batch import BASE, MixedBatch, calling_with

# What models call their batch, where they do not say so themselves.
INPUTS = ("pixel_values", "input_ids", "inputs_embeds", "input_values", "input_features", "x")
# What PEFT's models take out of the arguments before they call ours.
FOR_PEFT = ("adapter_names", "alora_offsets")
Owned = dict[FacTLinear, Slices]  # of one stack


@contextmanager
def using_adapters(
    model: nn.Module, adapter_names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Within the context, `model` uses the named adapter for each image, in this thread.

    Args:
        model: The adapted model.
        adapter_names: One per image; ``"__base__"`` for none.
        args: What `model` will be called with.
        kwargs: The same, and what is for PEFT.

    Raises:
        ValueError: If the names are not one per image, the model is training, has merged adapters or does not keep the
            rows of each image together, or a name is unknown.
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
    batch = batch_of(adapter_names, layers, heads, kwargs.get("labels") is not None)
    if batch.shared is None:
        check_batch_axis(model, batch, args, {key: kwargs[key] for key in kwargs if key not in FOR_PEFT})
    with calling_with(batch):
        yield


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


def batch_of(
    adapter_names: Sequence[str], layers: Sequence[FacTLinear], heads: Sequence[FacTHead], has_labels: bool
) -> MixedBatch:
    """The batch whose images have the named adapters of `layers` and `heads`."""
    names = list(dict.fromkeys(adapter_names))
    places = [names.index(name) for name in adapter_names]
    theirs: dict[FacTStack, dict[str, Owned]] = {}
    for layer in layers if len(names) > 1 else ():
        for name in layer.fact_slices.keys() & names:
            theirs.setdefault(layer.fact_stacks[name], {}).setdefault(name, {})[layer] = layer.fact_slices[name]
    slices: dict[nn.Module, dict[Any, Slices]] = {}
    ours = {stack: common_slices(list(by_name.values())) for stack, by_name in theirs.items()}
    for stack, owned in ours.items():
        for layer, its_slices in owned.items():
            slices.setdefault(layer, {})[stack] = its_slices
    bank = partial(gather, names, places, theirs, ours)
    modules: frozenset[nn.Module] = frozenset([*layers, *heads])
    return MixedBatch(places, bank, modules, slices=slices, names=names, has_labels=has_labels)


def common_slices(adapters: Sequence[Owned]) -> Owned:
    """Slices for all layers that any adapter has in a stack: those of the adapters if all have the same."""
    first, *others = adapters
    if all(other == first for other in others):
        return first
    common, count = {}, 0
    for layer, owned in (item for adapter in adapters for item in adapter.items()):
        if layer not in common:
            common[layer] = replace(owned, first=count, parts="")
            count += common[layer].count
    return common


def gather(
    names: Sequence[str],
    places: Sequence[int],
    theirs: Mapping[FacTStack, Mapping[str, Owned]],
    ours: Mapping[FacTStack, Owned],
    stack: FacTStack,
    device: torch.device,
    dtype: torch.dtype,
) -> FactorBank:
    """The factors of all images in a stack."""
    banks = []
    for name in names:
        if name not in theirs[stack]:
            banks.append(FactorBank.empty(1))
            continue
        U, cores, V = (factor[None] for factor in stack.terms(name))
        cores = cores.to(torch.promote_types(cores.dtype, torch.float32)) * stack.scale(name)
        banks.append(FactorBank(U, reordered(cores, theirs[stack][name], ours[stack]), V))
    num_slices = sum(owned.count for owned in ours[stack].values())
    return FactorBank.join(banks, num_slices).to(device, dtype).of_images(places)
