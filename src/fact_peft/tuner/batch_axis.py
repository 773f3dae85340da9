"""Whether a model keeps the rows of each image together, so that every image can have an adapter of its own.

A layer sees rows, not images. Most models have one row, or one table of rows, per image in front; Swin folds the
windows of an image into the first axis, image by image. Others put all images behind all mirrored ones, or the tokens
before the images, and no shape tells these apart. So a model is asked once for every shape of its inputs, by a call in
which the adapters of images 0, 2, 4... give NaN: what images 1, 3, 5... get must be free of it.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .mixed_batch import MixedBatch, calling_with

_CHECKED: WeakKeyDictionary[nn.Module, set[Hashable]] = WeakKeyDictionary()


@torch.compiler.disable
def check_batch_axis(model: nn.Module, batch: MixedBatch, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Refuse a model in which an image meets the adapter of another one; a call like one before passes at once.

    Args:
        model: The model.
        batch: The adapters of the images.
        args: What `model` will be called with.
        kwargs: The same.

    Raises:
        ValueError: If it does, or has no output from which one could tell.
    """
    inputs = tuple(described(leaf, batch.num_images) for leaf in tree_leaves((args, dict(kwargs))))
    key = (batch.modules, frozenset(batch.slices), inputs)
    checked = _CHECKED.setdefault(model, set())
    if batch.num_images > 1 and key not in checked:
        call_poisoned(model, batch, args, kwargs)
        checked.add(key)


@torch.no_grad()
def call_poisoned(model: nn.Module, batch: MixedBatch, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Call the model once and look at its output; as `check_batch_axis`."""
    with calling_with(batch.poisoned_copy()):
        outputs = list(of_odd_images(model(*args, **kwargs), batch.num_images))
    if outputs and not any(output.isnan().any() for output in outputs):
        return
    raise ValueError(
        f"{type(model).__name__} cannot have one adapter per image: "
        + (
            "its layers do not have the rows of each image together in front, as when all images come before all "
            "mirrored ones or tokens before images, and an image would meet the adapter of another one."
            if outputs
            else f"it gives no tensor with a first axis of {batch.num_images} images, by which to check that no image "
            "meets the adapter of another one."
        )
        + " Call it with the images of one adapter at a time."
    )


def described(argument: Any, num_images: int) -> Hashable:
    """What of an argument may decide how a model arranges its rows: not its numbers, nor how many images there are."""
    if isinstance(argument, Tensor):
        is_batch = argument.ndim > 0 and len(argument) == num_images
        return (is_batch, *argument.shape[int(is_batch) :], argument.dtype)
    if isinstance(argument, (bool, int, float, str)):
        return argument
    return str(type(argument))


def of_odd_images(output: Any, num_images: int) -> Iterator[Tensor]:
    """What images 1, 3, 5... get in an output: in its tensors, or in the list that heads of several sizes give."""

    def is_batch(part: Any) -> bool:
        return isinstance(part, Tensor) and part.is_floating_point() and part.ndim > 0 and len(part) == num_images

    def is_list(part: Any) -> bool:
        of_tensors = isinstance(part, list) and len(part) == num_images and all(isinstance(t, Tensor) for t in part)
        return of_tensors and not any(map(is_batch, part))

    for part in tree_leaves(output, is_leaf=is_list):
        if is_list(part):
            yield from part[1::2]
        elif is_batch(part):
            # Images times their captions, as CLIP compares them, hold each other's numbers by intention.
            yield part[1::2, 1::2] if part.shape[1:2] == part.shape[:1] else part[1::2]
