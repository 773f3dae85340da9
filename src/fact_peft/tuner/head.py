"""A trained head: PEFT's wrapper, which also gives every image of a batch the head of its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.config import FacTConfig
from ..adapter.storage import to_storage
from ..method.per_image import joined, of_images
from ..upstream import ModulesToSaveWrapper
from .mixed_batch import MixedBatch, current_batch


class FacTHead(ModulesToSaveWrapper):
    """`ModulesToSaveWrapper` that knows mixed batches.

    PEFT's own takes the adapters of a batch as an argument, which only a hook on this shared module can pass, and wants
    outputs of one size.

    Attributes:
        fact_config: The model's own config of each adapter, as in `FacTStack`.
    """

    fact_config: dict[str, FacTConfig]

    def adapter_state_dict(  # type: ignore[override]  # as ModulesToSaveWrapper has it
        self, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of an adapter's head as they are saved."""
        tensors = super().adapter_state_dict(adapter_name, state_dict)
        config = self.fact_config.get(adapter_name)  # none of an adapter of another method
        storage = config.storage_of_heads if config else None
        return {name: to_storage(name, tensor, storage) for name, tensor in tensors.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the head of the active adapter.

        In a mixed batch the images get their own heads. The outputs are one tensor as always; if heads of different
        sizes are among them, a list with the output of every image.
        """
        batch = current_batch(self)
        if batch is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        heads = [
            self.modules_to_save[name] if name in self.modules_to_save else self.original_module for name in batch.names
        ]
        if batch.shared is not None:
            return heads[0](*args, **kwargs)
        return per_image_heads(batch, heads, *args, **kwargs)


def adopt_heads(model: nn.Module, adapter_name: str, config: FacTConfig) -> None:
    """Make the heads that PEFT has wrapped into such heads, and give them the config of a new adapter."""
    for module in model.modules():
        if type(module) is ModulesToSaveWrapper:
            module.__class__ = FacTHead
            module.fact_config = {}  # type: ignore[assignment]
        if isinstance(module, FacTHead):
            module.fact_config[adapter_name] = config


def per_image_heads(
    batch: MixedBatch, heads: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor | list[Tensor]:
    """The output of every image's own head: one tensor, or a list if they differ in size.

    Args:
        batch: The adapters of the images.
        heads: The head of each distinct adapter.
        x: Input of the heads, (R, ...), where every image has as many rows.
        args: Passed to all heads.
        kwargs: Passed to all heads.

    Raises:
        TypeError: If a head does not give one output per input, or takes more than one tensor.
        ValueError: If the heads differ in size and the model wants to compute a loss.
    """
    x = batch.poison(x)
    if all(is_plain(head) for head in heads):
        weight = of_images(joined([head.weight[None] for head in heads], 0, 0), batch.places)
        biases = [head.weight.new_zeros(1, 0) if head.bias is None else head.bias[None] for head in heads]
        has_bias = any(head.bias is not None for head in heads)
        bias = of_images(joined(biases, weight.shape[1]), batch.places) if has_bias else None
        y = batch.head(x, weight, bias)
        sizes = [heads[place].out_features for place in batch.places]
        if len(set(sizes)) == 1:
            return y
        outputs = [image[..., :size] for image, size in zip(y.unflatten(0, (len(sizes), -1)), sizes, strict=True)]
    else:
        outputs = one_by_one(batch, heads, x, *args, **kwargs)
        if len({output.shape for output in outputs}) == 1:
            return torch.stack(outputs).flatten(0, 1)
    if batch.has_labels:
        raise ValueError(
            "labels cannot be used with adapters of different numbers of classes in one batch: there is no one loss. "
            "Call the model without labels and compute the loss of each of output.logits."
        )
    return [output.squeeze(0) for output in outputs]


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a linear layer of which nothing but its weight and bias matters."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks


def one_by_one(batch: MixedBatch, heads: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any) -> list[Tensor]:
    """The output (rows of one, ...) of every image, from one call of each head with the images it has."""
    images = x.unflatten(0, (batch.num_images, -1))
    outputs = {}
    for head in dict.fromkeys(heads):
        mine = [image for image, place in enumerate(batch.places) if heads[place] is head]
        results = head(images[torch.tensor(mine, device=x.device)].flatten(0, 1), *args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values(), results) if isinstance(value, Tensor)]
        if len(tensors) != 1 or tensors[0] is not results or len(results) != len(mine) * images.shape[1]:
            raise TypeError(
                f"adapter_names cannot be used with the head {type(head).__name__}, which does not give one output "
                "per input; call the model with one adapter at a time."
            )
        outputs.update(zip(mine, results.unflatten(0, (len(mine), -1)), strict=True))
    return [outputs[image] for image in range(batch.num_images)]
