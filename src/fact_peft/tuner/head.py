"""A trained head: PEFT's wrapper, which also gives every image of a batch the head of its own adapter."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..adapter.config import FacTConfig
from ..adapter.storage import to_storage
from ..architecture.heads import find_classifiers
from ..method.per_image import joined, of_images
from ..upstream import ModulesToSaveWrapper
from .mixed_batch import MixedBatch, current_batch

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

    def _get_name(self) -> str:
        return str(ModulesToSaveWrapper.__name__)  # which PEFT's messages name, and printed models show

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

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
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
            self.modules_to_save[name] if name in self.modules_to_save else self.original_module for name in batch.names
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


def adopt_heads(model: nn.Module, configs: dict[str, FacTConfig], others: Container[nn.Module]) -> None:
    """Make the heads that PEFT has wrapped into such heads, which read their adapters' `configs`.

    Args:
        model: The model.
        configs: Of its adapters.
        others: Heads that were wrapped before, which may belong to another method.
    """
    classifiers = find_classifiers(model)
    for name, module in model.named_modules():
        if type(module) is ModulesToSaveWrapper and module not in others:
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
    call: Callable[..., Any], batch: MixedBatch, heads: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any
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
        TypeError: If a head does not give one output per input, or takes more than one tensor.
        ValueError: If the heads differ in size and the model wants to compute a loss.
    """
    x = batch.poison(x)
    if all(is_plain(head) for head in heads):
        weight = of_images(joined([head.weight[None] for head in heads], 0, 0), batch.places)
        biases = [head.weight.new_zeros(1, 0) if head.bias is None else head.bias[None] for head in heads]
        has_bias = any(head.bias is not None for head in heads)
        bias = of_images(joined(biases, weight.shape[1]), batch.places) if has_bias else None
        y = batch.head(x.to(weight.dtype), weight, bias)
        sizes = [heads[place].out_features for place in batch.places]
        if len(set(sizes)) == 1:
            return y
        outputs = [image[..., :size] for image, size in zip(y.unflatten(0, (len(sizes), -1)), sizes, strict=True)]
    else:
        outputs = one_by_one(call, batch, heads, x, *args, **kwargs)
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


def one_by_one(
    call: Callable[..., Any], batch: MixedBatch, heads: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any
) -> list[Tensor]:
    """The output (rows of one, ...) of every image, from one call of each head with the images it has."""
    images = x.unflatten(0, (batch.num_images, -1))
    outputs: dict[int, Tensor] = {}
    for head in dict.fromkeys(heads):
        mine = [image for image, place in enumerate(batch.places) if heads[place] is head]
        results = call(head, images[torch.tensor(mine, device=x.device)].flatten(0, 1), *args, **kwargs)
        tensors = [value for value in (*args, *kwargs.values(), results) if isinstance(value, Tensor)]
        if len(tensors) != 1 or tensors[0] is not results or len(results) != len(mine) * images.shape[1]:
            raise TypeError(
                f"adapter_names cannot be used with the head {type(head).__name__}, which does not give one output "
                "per input; call the model with one adapter at a time."
            )
        outputs.update(zip(mine, results.unflatten(0, (len(mine), -1)), strict=True))
    return [outputs[image] for image in range(batch.num_images)]
