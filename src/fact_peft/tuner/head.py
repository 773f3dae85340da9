"""A trained head: PEFT's wrapper, which also gives every image of a batch the head of its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft.utils.other import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..architecture.heads import find_classifiers
from .call import MixedBatch, current_batch
from .config import FacTConfig
from .stored import to_storage

CASTABLE = (torch.float16, torch.bfloat16, torch.float32)  # not float64, which a model has for a reason


class FacTHead(ModulesToSaveWrapper):
    """`ModulesToSaveWrapper` that knows mixed batches, and trains a head of a half-precision model in float32.

    PEFT's own takes the adapters of a batch as an argument, which only a hook on this shared module can pass, and wants
    outputs of one size.

    Attributes:
        configs: The model's own config of each adapter, see `SharedFactors`.
        is_classifier: Whether its output is that of the model, and so stays in float32. Another module's is cast back
            for the half-precision layers behind it.
    """

    configs: dict[str, FacTConfig]
    is_classifier: bool

    def to_float32(self, adapter_name: str) -> None:
        """Cast the head of an adapter from float16 or bfloat16, in which no optimizer can train it."""
        if adapter_name in self.modules_to_save:
            cast_in_place(self.modules_to_save[adapter_name], torch.float32)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The active head in the precision of the model, of which it becomes a part."""
        module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        cast_in_place(module, dtype_of(self.original_module))
        return module

    def adapter_state_dict(  # type: ignore[override]  # as ModulesToSaveWrapper has it
        self, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of an adapter's head as they are saved."""
        tensors = super().adapter_state_dict(adapter_name, state_dict)
        config = self.configs.get(adapter_name)  # none of an adapter of another method
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
        heads: list[nn.Module] = [
            self.modules_to_save[name] if name in self.modules_to_save else self.original_module
            for name in batch.distinct
        ]
        if batch.shared is not None:
            return self._call(heads[0], *args, **kwargs)
        output = per_image_heads(self._call, batch, heads, *args, **kwargs)
        return output if self.is_classifier else floats_to(output, dtype_of(self.original_module))

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        head = self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module
        return self._call(head, *args, **kwargs)

    def _call(self, head: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of an adapter's head, for inputs in the precision of the model."""
        dtype, dtype_of_model = dtype_of(head), dtype_of(self.original_module)
        if dtype == dtype_of_model:
            return head(*args, **kwargs)
        args, kwargs = floats_to((args, kwargs), dtype)
        output = head(*args, **kwargs)
        return output if self.is_classifier else floats_to(output, dtype_of_model)


def adopt_heads(model: nn.Module, configs: dict[str, FacTConfig]) -> None:
    """Make the heads that PEFT has wrapped into such heads, which read their adapters' `configs`."""
    classifiers = find_classifiers(model)
    for name, module in model.named_modules():
        if type(module) is ModulesToSaveWrapper:
            module.__class__ = FacTHead
            assert isinstance(module, FacTHead)
            module.configs, module.is_classifier = configs, name in classifiers


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first parameter of floats; None if there is none."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def cast_in_place(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast parameters and buffers; those of other dtypes, such as a quantised weight's, stay."""
    for tensor in (*module.parameters(), *module.buffers()):
        if dtype in CASTABLE and tensor.dtype in CASTABLE:
            tensor.data = tensor.data.to(dtype)


def floats_to(values: Any, dtype: torch.dtype | None) -> Any:
    """`values` with every tensor of float16, bfloat16 or float32, however deep, in a dtype."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.dtype in CASTABLE else value

    return values if dtype not in CASTABLE else tree_map(cast, values)


def per_image_heads(
    call: Callable[..., Any], batch: MixedBatch, heads: Sequence[nn.Module], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor | list[Tensor]:
    """The output of every image's own head: one tensor, or a list if they differ in size.

    Args:
        call: Calls a head with its arguments.
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
            results = call(head, rows.flatten(0, 1), *args, **kwargs)
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
    rows = x.flatten(1, -2).to(weight.dtype)
    if heads[0].bias is None:
        y = torch.bmm(rows, weight.mT)
    else:
        y = torch.baddbmm(torch.stack([head.bias for head in heads])[index][:, None], rows, weight.mT)
    return y.view(*x.shape[:-1], -1)
