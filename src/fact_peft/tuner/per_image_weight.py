"""The weight of a layer in a mixed batch, for models that read it instead of calling the layer."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from ..method.tensorization import Slices
from .mixed_batch import MixedBatch

# What one may ask a weight without using its numbers.
LOOKS = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
}


class PerImageWeight(Tensor):
    """What stands for a weight that is another matrix for every image.

    It looks like the frozen weight, and ``nn.functional.linear`` multiplies each image by its own matrix. Nothing else
    can be done with it, so that no image is silently multiplied by the matrix of another one.
    """

    frozen: Tensor
    batch: MixedBatch
    base_layer: nn.Module
    owned: Mapping[Hashable, Slices]

    @classmethod
    def of(
        cls, weight: Tensor, batch: MixedBatch, base_layer: nn.Module, owned: Mapping[Any, Slices]
    ) -> PerImageWeight:
        """For the frozen weight (out, in) of a layer; the rest as for `MixedBatch.add`."""
        per_image = weight.detach().as_subclass(cls)
        per_image.frozen, per_image.batch, per_image.base_layer, per_image.owned = weight, batch, base_layer, owned
        return per_image

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weights = [value for value in (*args, *kwargs.values()) if isinstance(value, cls)]
        # A layer that is no nn.Linear, as transformers' Conv1D, keeps its weight the other way round.
        if func is nn.functional.linear and isinstance(weights[0].base_layer, nn.Linear):
            return multiply(*args, **kwargs)
        if func not in LOOKS:
            raise NotImplementedError(
                "With adapter_names the weight of an adapted layer is another matrix for every image, and "
                f"{getattr(func, '__name__', func)}() cannot use it. This model wants one adapter at a time: call it "
                "with the images of one adapter, and adapter_names of one name."
            )
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def multiply(input: Tensor, weight: PerImageWeight, bias: Tensor | None = None) -> Tensor:
    """``nn.functional.linear``, under its names of the arguments."""
    y = nn.functional.linear(input, weight.frozen, bias)
    return weight.batch.add(weight.base_layer, input, y, weight.owned)
