"""One adapter per image of a batch: ``model(pixel_values=..., adapter_names=["a", "b", "__base__"])``."""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..method.fused_linear import FactorBank, reordered
from ..method.tensorization import Slices
from .factors import FacTStack
from .head import FacTHead
from .layer import FacTLinear
from .mixed_batch import BASE, MixedBatch, calling_with

# Names that models give to the batch of inputs, tried in addition to the model's own `main_input_name`.
INPUTS = ("pixel_values", "input_ids", "inputs_embeds", "input_values", "input_features", "x")
# Arguments that PEFT's models remove before they call the adapted model.
FOR_PEFT = ("adapter_names", "alora_offsets")
Owned = dict[FacTLinear, Slices]  # the layers of one adapter in one stack
_CHECKED: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


@contextmanager
def using_adapters(
    model: nn.Module, adapter_names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Iterator[None]:
    """Within the context, `model` uses the named adapter for each image, in this thread; ``"__base__"`` is none.

    `args` and `kwargs` are those that `model` will be called with, including arguments for PEFT.
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
    """Refuse `adapter_names` that are not a nonempty list of known names."""
    if isinstance(adapter_names, str) or not all(isinstance(name, str) for name in adapter_names):
        raise ValueError(f"adapter_names={adapter_names!r} is not a list of strings; pass one name per image.")
    if not adapter_names:
        raise ValueError("adapter_names=[] names no adapter; pass one name per image, or None for the active adapter.")
    if unknown := sorted(set(adapter_names) - known):
        raise ValueError(f"adapter_names names {unknown}, but there are only {sorted(known)}.")


def batches(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Iterator[tuple[str, Tensor]]:
    """Name and value of the arguments that are a batch of images."""
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
    ours = {stack: common_slices(list(by_name.values())) for stack, by_name in theirs.items()}
    slices: dict[nn.Module, dict[Hashable, Slices]] = {}
    for stack, owned in ours.items():
        for layer, its_slices in owned.items():
            slices.setdefault(layer, {})[stack] = its_slices

    def make_bank(stack: FacTStack, device: torch.device, dtype: torch.dtype) -> FactorBank:
        banks = []
        for name in names:
            if name not in theirs[stack]:
                banks.append(FactorBank.empty(1))
                continue
            U, cores, V = (factor[None] for factor in stack.terms(name))
            cores = cores.to(torch.promote_types(cores.dtype, torch.float32)) * stack.configs[name].scaling
            banks.append(FactorBank(U, reordered(cores, theirs[stack][name], ours[stack]), V))
        num_slices = sum(owned.count for owned in ours[stack].values())
        return FactorBank.join(banks, num_slices).to(device, dtype).of_images(places)

    modules: frozenset[nn.Module] = frozenset([*layers, *heads])
    return MixedBatch(places, make_bank, modules, slices=slices, names=names, has_labels=has_labels)


def common_slices(adapters: Sequence[Owned]) -> Owned:
    """Slices for all layers that any adapter has in a stack. If all adapters have the same slices, these."""
    first, *others = adapters
    if all(other == first for other in others):
        return first
    common, count = {}, 0
    for layer, owned in (item for adapter in adapters for item in adapter.items()):
        if layer not in common:
            common[layer] = replace(owned, first=count, parts="")
            count += common[layer].count
    return common


@torch.compiler.disable
def check_batch_axis(model: nn.Module, batch: MixedBatch, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a model in which an image is computed with the adapter of another image.

    A layer sees rows, not images, and no shape tells whether the rows of an image are together. So the model is called
    once with `args` and `kwargs` for each combination of input shapes and adapted layers: the adapters of images 0, 2,
    4... give NaN in this call, and the outputs of images 1, 3, 5... must be free of it.
    """
    inputs = tuple(described(leaf, batch.num_images) for leaf in tree_leaves((args, dict(kwargs))))
    key = (batch.modules, frozenset(batch.slices), inputs)
    checked = _CHECKED.setdefault(model, set())
    if batch.num_images == 1 or key in checked:
        return
    with torch.no_grad(), calling_with(replace(batch, poisoned=True)):
        outputs = list(of_odd_images(model(*args, **kwargs), batch.num_images))
    if not outputs or any(output.isnan().any() for output in outputs):
        none = f"it gives no tensor with a first axis of {batch.num_images} images, by which to check that they do"
        raise ValueError(
            f"{type(model).__name__} cannot have one adapter per image: its layers must have the rows of each image "
            f"together in front, and {'they do not' if outputs else none}. Call it with the images of one adapter."
        )
    checked.add(key)


def described(argument: Any, num_images: int) -> Hashable:
    """The properties of an argument on which the arrangement of rows may depend: not its values nor `num_images`."""
    if isinstance(argument, Tensor):
        is_batch = argument.ndim > 0 and len(argument) == num_images
        return (is_batch, *argument.shape[int(is_batch) :], argument.dtype)
    return argument if isinstance(argument, (bool, int, float, str)) else str(type(argument))


def of_odd_images(output: Any, num_images: int) -> Iterator[Tensor]:
    """The outputs of images 1, 3, 5..., from batched tensors or from lists with one tensor per image."""

    def is_batch(part: Any) -> bool:
        return isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 0 and len(part) == num_images

    def is_list(part: Any) -> bool:
        of_tensors = isinstance(part, list) and len(part) == num_images and all(isinstance(t, Tensor) for t in part)
        return of_tensors and not any(map(is_batch, part))

    for part in tree_leaves(output, is_leaf=is_list):
        if is_list(part):
            yield from part[1::2]
        elif is_batch(part):
            # CLIP compares all images with all captions, so both axes of its similarities count images.
            yield part[1::2, 1::2] if part.shape[1:2] == part.shape[:1] else part[1::2]
