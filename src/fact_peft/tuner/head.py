"""The trained head: PEFT's wrapper, which can also give every image of a batch the head of its own adapter."""

from collections.abc import Container, Sequence
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from ..adapter.config import FacTConfig
from ..adapter.storage import to_storage
from ..architecture.heads import find_classifiers
from ..method.fused_linear import joined, of_images
from .mixed_batch import MixedBatch, current_batch

CASTABLE = (torch.float16, torch.bfloat16, torch.float32)  # float64 was chosen on purpose and is kept


class FacTHead(ModulesToSaveWrapper):
    """`ModulesToSaveWrapper` that supports mixed batches, and trains a head of a half-precision model in float32.

    PEFT's own wrapper gets the adapters of a batch from a hook on this module, which concurrent calls would share, and
    requires outputs of one size.
    """

    configs: dict[str, FacTConfig]  # the model's own, see `SharedFactors`
    is_classifier: bool  # its output is one of the model and stays in float32; others are cast back to half precision

    def _get_name(self) -> str:
        return str(ModulesToSaveWrapper.__name__)  # as in PEFT's messages and in printed models

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The active head, cast to the precision of the model."""
        module = super().unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        cast_in_place(module, dtype_of(self.original_module))
        return module

    def adapter_state_dict(  # type: ignore[override]  # as in PEFT's own wrapper
        self, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """The tensors of an adapter's head as they are saved."""
        tensors = super().adapter_state_dict(adapter_name, state_dict)
        config = self.configs.get(adapter_name)  # none of an adapter of another method
        storage = config.storage_of_heads if config else None
        return {name: to_storage(name, tensor, storage) for name, tensor in tensors.items()}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The output of the active adapter's head, or in a mixed batch of every image's own head.

        If the heads of a batch have different sizes, it is a list with the output of every image.
        """
        batch = current_batch(self)
        if batch is None or self.disable_adapters:
            return super().forward(*args, **kwargs)
        heads: list[nn.Module] = [
            self.modules_to_save[name] if name in self.modules_to_save else self.original_module for name in batch.names
        ]
        if batch.shared is not None:
            return self._call(heads[0], *args, **kwargs)
        output = self._per_image(batch, heads, *args, **kwargs)
        return output if self.is_classifier else floats_to(output, dtype_of(self.original_module))

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        head = self.modules_to_save[self.active_adapters[0]] if self.active_adapters else self.original_module
        return self._call(head, *args, **kwargs)

    def _call(self, head: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """The output of `head` for inputs in the precision of the model."""
        dtype, dtype_of_model = dtype_of(head), dtype_of(self.original_module)
        if dtype == dtype_of_model:
            return head(*args, **kwargs)
        args, kwargs = floats_to((args, kwargs), dtype)
        output = head(*args, **kwargs)
        return output if self.is_classifier else floats_to(output, dtype_of_model)

    def _per_image(
        self, batch: MixedBatch, heads: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor | list[Tensor]:
        """The output of every image's own head: one tensor, or a list if the sizes differ.

        `heads` has one head for each adapter of the batch. In the input x (R, ...), every image has the same number of
        rows.
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
            outputs = self._one_by_one(batch, heads, x, *args, **kwargs)
            if len({output.shape for output in outputs}) == 1:
                return torch.stack(outputs).flatten(0, 1)
        if batch.has_labels:
            raise ValueError(
                "labels cannot be used with adapters of different numbers of classes in one batch: there is no one "
                "loss. Call the model without labels and compute the loss of each of output.logits."
            )
        return [output.squeeze(0) for output in outputs]

    def _one_by_one(
        self, batch: MixedBatch, heads: Sequence[Any], x: Tensor, *args: Any, **kwargs: Any
    ) -> list[Tensor]:
        """The output (rows per image, ...) of every image. Each head is called once, with all images that have it."""
        images = x.unflatten(0, (batch.num_images, -1))
        outputs: dict[int, Tensor] = {}
        for head in dict.fromkeys(heads):
            mine = [image for image, place in enumerate(batch.places) if heads[place] is head]
            results = self._call(head, images[torch.tensor(mine, device=x.device)].flatten(0, 1), *args, **kwargs)
            tensors = [value for value in (*args, *kwargs.values(), results) if isinstance(value, Tensor)]
            if len(tensors) != 1 or tensors[0] is not results or len(results) != len(mine) * images.shape[1]:
                raise TypeError(
                    f"adapter_names cannot be used with the head {type(head).__name__}, which does not give one output "
                    "per input; call the model with one adapter at a time."
                )
            outputs.update(zip(mine, results.unflatten(0, (len(mine), -1)), strict=True))
        return [outputs[image] for image in range(batch.num_images)]


def adopt_heads(model: nn.Module, configs: dict[str, FacTConfig], others: Container[nn.Module]) -> None:
    """Turn the heads that PEFT has wrapped, except for `others`, into `FacTHead` modules that read `configs`."""
    classifiers = find_classifiers(model)
    for name, module in model.named_modules():
        if type(module) is ModulesToSaveWrapper and module not in others:
            module.__class__ = FacTHead
            assert isinstance(module, FacTHead)
            module.configs, module.is_classifier = configs, name in classifiers


def dtype_of(module: nn.Module) -> torch.dtype | None:
    """The dtype of the first floating-point parameter; None if there is none."""
    return next((parameter.dtype for parameter in module.parameters() if parameter.is_floating_point()), None)


def cast_in_place(module: nn.Module, dtype: torch.dtype | None) -> None:
    """Cast the parameters and buffers that have a dtype in `CASTABLE`, if `dtype` is one of these."""
    for tensor in (*module.parameters(), *module.buffers()):
        if dtype in CASTABLE and tensor.dtype in CASTABLE:
            tensor.data = tensor.data.to(dtype)


def floats_to(values: Any, dtype: torch.dtype | None) -> Any:
    """Nested `values` in which the tensors that have a dtype in `CASTABLE` are cast, if `dtype` is one of these."""
    if dtype not in CASTABLE:
        return values
    return tree_map(lambda x: x.to(dtype) if isinstance(x, Tensor) and x.dtype in CASTABLE else x, values)


def is_plain(head: nn.Module) -> bool:
    """Whether a head is a linear layer that can be computed from its weight and bias alone."""
    return type(head) is nn.Linear and not head._forward_hooks and not head._forward_pre_hooks
