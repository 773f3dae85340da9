"""A trained head: PEFT's wrapper, which also gives every image of a batch the head of its own adapter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapter.config import FacTConfig
from ..adapter.storage import to_storage
from ..upstream import ModulesToSaveWrapper
from .call import MixedBatch, current_batch


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
            self.modules_to_save[name] if name in self.modules_to_save else self.original_module
            for name in batch.distinct
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
    batch: MixedBatch, heads: Sequence[nn.Module], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor | list[Tensor]:
    """The output of every image's own head: one tensor, or a list if they differ in size.

    Args:
        batch: The adapters of the images.
        heads: The head of each distinct adapter.
        x: Input of the heads, (R, ...), where every image has as many rows.
        args: Passed to all heads.
        kwargs: Passed to all heads.

    Raises:
        TypeError: If a head does not give one output per input.
        ValueError: If the heads differ in size and the model wants to compute a loss.
    """
    batch.by_image(x)  # for its check
    rows_per_image = len(x) // len(batch.names)
    images = x.view(len(batch.names), rows_per_image, *x.shape[1:])
    owners = [batch.distinct.index(name) for name in batch.names]
    outputs: list[Any] = [None] * len(batch.names)
    for members in alike(heads):
        mine = [image for image, owner in enumerate(owners) if owner in members]
        rows = images[torch.tensor(mine, device=x.device)]
        head = heads[members[0]]
        if is_plain(head):
            index = torch.tensor([members.index(owners[image]) for image in mine], device=x.device)
            results = linear_heads(rows, [heads[member] for member in members], index)
        else:
            results = head(rows.flatten(0, 1), *args, **kwargs)
            if not isinstance(results, Tensor) or len(results) != len(mine) * rows_per_image:
                raise TypeError(
                    f"adapter_names cannot be used with the head {type(head).__name__}, which does not give one output "
                    "per input; call the model with one adapter at a time."
                )
            results = results.unflatten(0, (len(mine), rows_per_image))
        for image, result in zip(mine, results, strict=True):
            outputs[image] = result
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


def alike(heads: Sequence[nn.Module]) -> list[list[int]]:
    """Places of heads that can be computed together: plain linear layers of one size, or one and the same module."""
    groups: dict[Any, list[int]] = {}
    for place, head in enumerate(heads):
        key = (head.weight.shape, head.weight.dtype, head.bias is None) if is_plain(head) else id(head)
        groups.setdefault(key, []).append(place)
    return list(groups.values())


def linear_heads(x: Tensor, heads: Sequence[Any], index: Tensor) -> Tensor:
    """Every image (B, rows, ..., in) through the linear layer `index` says, in one batched product."""
    weight = torch.stack([head.weight for head in heads])[index]
    rows = x.flatten(1, -2)
    if heads[0].bias is None:
        y = torch.bmm(rows, weight.mT)
    else:
        y = torch.baddbmm(torch.stack([head.bias for head in heads])[index][:, None], rows, weight.mT)
    return y.view(*x.shape[:-1], -1)
