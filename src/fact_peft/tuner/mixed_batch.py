"""A batch in which every image has its own factors and head, for `adapter_names` and for the serving pool.

An image passes through a mixed batch in five steps:

1. The call says which adapter each image has. A context variable holds this `MixedBatch` while the model runs.
2. Before the first such call, `check_batch_axis` makes sure that the model keeps the rows of each image together.
3. Every adapted layer computes its frozen output and passes it to the batch with its input and its slices.
4. The batch adds to the rows of each image the increment from the image's own factors.
5. The head multiplies the rows of each image by the image's own weight.

Several callers may use one model at the same time, so the state of a call is not stored on its layers: each thread and
each asynchronous task has its own value of the context variable.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import KW_ONLY, dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunctionSubclass

from ..method.decomposition import core_grid
from ..method.fused_linear import (
    FactorBank,
    autocast_dtype,
    is_fusable,
    linear_per_image,
    read_per_image,
    write_per_image,
)
from ..method.tensorization import Slices

BASE = "__base__"  # PEFT's name for no adapter
# Modules that run parts of a model again in the backward pass, where the context variable is no longer set.
CHECKPOINTING = {"torch.utils.checkpoint", "deepspeed.runtime.activation_checkpointing.checkpointing"}
# What code may ask of a weight that is different for every image.
ALLOWED = {
    *(getattr(Tensor, name).__get__ for name in ("dtype", "device", "shape", "ndim", "layout", "requires_grad")),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__len__),
}


@dataclass(eq=False)
class MixedBatch:
    """Where the layers and heads of one call get the factors and weights of every image."""

    places: Sequence[int]  # for every image, the index of its adapter among the adapters of the batch
    # Returns the factors of all images in a stack, on a device and in a dtype; None if no adapter has any.
    make_bank: Callable[[Any, torch.device, torch.dtype], FactorBank | None]
    modules: frozenset[nn.Module] | None = None  # of the model that is called, not of one inside it; None for all
    _: KW_ONLY
    slices: Mapping[nn.Module, Mapping[Hashable, Slices]] = field(default_factory=dict)  # of every layer, by stack
    # Weight (images, out, in) and bias (images, out) or None, by name, for heads that do not know them.
    heads: Mapping[str, tuple[Tensor, Tensor | None]] = field(default_factory=dict)
    names: Sequence[str] = ()  # of the adapters, for layers and heads that know them by name
    has_labels: bool = False  # whether the model will compute a loss
    poisoned: bool = False  # whether NaN is written into every other image, see `check_batch_axis`

    def __post_init__(self) -> None:
        self.num_images = len(self.places)
        # The name of the adapter that all images have; None if they differ or the adapters have no names.
        self.shared = self.names[0] if len(self.names) == 1 else None
        self._banks: dict[tuple[Any, ...], FactorBank | None] = {}
        self._last_read: tuple[Tensor, int, Tensor, Tensor] | None = None
        self._checkpoints = checkpoints_around() if torch.is_grad_enabled() else None

    def add(self, base_layer: nn.Module, x: Tensor, y: Tensor, owned: Mapping[Hashable, Slices]) -> Tensor:
        """y + x dW with every image's own dW, where x (R, ..., in) and y (R, ..., out) are input and output of a layer.

        `owned` are the slices of the layer by stack.
        """
        dtype = autocast_dtype(x) or x.dtype
        # Nothing else refers to the output of a plain layer.
        in_place = not torch.is_grad_enabled() and is_fusable(base_layer)
        for stack, slices in owned.items():
            bank = self._bank(stack, x.device, dtype)
            if bank is not None:
                cores = core_grid(bank.cores.narrow(1, slices.first, slices.count), slices)
                h, rows = self._read(x, bank.U), self.by_image(y)
                y = write_per_image(h, cores, bank.V, rows, in_place and y.is_contiguous()).view(y.shape)
        return self.poison(y)

    def head(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """x (R, ..., in) times the weight (images, out, in) of every image, plus its bias: (R, ..., out)."""
        return linear_per_image(self.by_image(x), weight, bias).view(*x.shape[:-1], -1)

    def by_image(self, x: Tensor) -> Tensor:
        """View the input or output (R, ..., n) of a layer as (images, rows per image, n).

        The first axis may be longer than the batch, since Swin folds the windows of each image into it.
        """
        if len(x) % self.num_images != 0:
            raise ValueError(
                f"There is one adapter for each of {self.num_images} images, but a layer is called with a batch of "
                f"{len(x)}: pass one name per image. If the batch has as many images, this model calls layers with "
                "what belongs to no image, and cannot have one adapter per image."
            )
        return x.reshape(self.num_images, -1, x.shape[-1])

    def poison(self, x: Tensor) -> Tensor:
        """`x`, in a poisoned batch with NaN in the rows of images 0, 2, 4..."""
        if self.poisoned:
            x = x.clone(memory_format=torch.contiguous_format)
            self.by_image(x)[::2] = torch.nan
        return x

    def _bank(self, stack: Hashable, device: torch.device, dtype: torch.dtype) -> FactorBank | None:
        """The factors of all images, gathered when a stack is used first."""
        # A bank that was made without gradients, as for frozen first blocks, cannot be used where they are needed.
        key = (stack, device, dtype, torch.is_grad_enabled())
        if key not in self._banks:
            self._banks[key] = self.make_bank(stack, device, dtype)
        return self._banks[key]

    def _read(self, x: Tensor, U: Tensor) -> Tensor:
        """x (I (x) U), computed once for all layers that read the same x, as q, k and v do."""
        # A compiler finds equal products by itself. Inference tensors do not record when they are written to.
        reusable = not torch.compiler.is_compiling() and not x.is_inference()
        if reusable and self._last_read is not None:
            last_x, last_version, last_U, h = self._last_read
            if last_x is x and last_version == x._version and last_U is U:
                return h
        h = read_per_image(self.by_image(x).to(U.dtype), U)
        if reusable:
            self._last_read = (x, x._version, U, h)
        return h

    def refuse_checkpointing(self) -> None:
        """Raise a NotImplementedError inside an activation checkpoint, unless the whole call is inside it."""
        if self._checkpoints is not None and checkpoints_around() > self._checkpoints:
            raise NotImplementedError(
                "One adapter per image does not work with activation checkpointing inside the model: the backward pass "
                "would compute its parts again without the adapters. Switch gradient checkpointing off, call the model "
                "under torch.no_grad(), or put torch.utils.checkpoint around the whole call."
            )


_CURRENT: ContextVar[MixedBatch | None] = ContextVar("fact_peft_mixed_batch", default=None)


@contextmanager
def calling_with(batch: MixedBatch | None) -> Iterator[None]:
    """Within the context, the calls of this thread use this batch, or no batch if it is None."""
    token = _CURRENT.set(batch)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_batch(module: nn.Module | None = None) -> MixedBatch | None:
    """The batch of the current call in this thread. With a `module`, only if the batch concerns it."""
    batch = _CURRENT.get()
    if batch is None or module is None:
        return batch
    if batch.modules is not None and module not in batch.modules:
        return None
    batch.refuse_checkpointing()
    return batch


def checkpoints_around() -> int:
    """Number of functions of activation checkpointing on the call stack; 0 while compiling, which needs no check."""
    num_around = 0
    frame: FrameType | None = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        num_around += frame.f_globals.get("__name__") in CHECKPOINTING
        frame = frame.f_back
    return num_around


class PerImageWeight(Tensor):
    """Stands for the weight of a layer in a mixed batch, for models that read the weight instead of calling the layer.

    It has the shape and dtype of the frozen weight, and ``nn.functional.linear`` multiplies each image by its own
    matrix. Every other operation is refused, so that no image is silently multiplied by the matrix of another one.
    """

    frozen: Tensor
    batch: MixedBatch
    base_layer: nn.Module
    owned: Mapping[Hashable, Slices]

    @classmethod
    def of(
        cls, weight: Tensor, batch: MixedBatch, base_layer: nn.Module, owned: Mapping[Any, Slices]
    ) -> PerImageWeight:
        """For the frozen weight (out, in) of a layer. The other arguments are those of `MixedBatch.add`."""
        per_image = weight.detach().as_subclass(cls)
        per_image.frozen, per_image.batch, per_image.base_layer, per_image.owned = weight, batch, base_layer, owned
        return per_image

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        weights = [value for value in (*args, *kwargs.values()) if isinstance(value, cls)]
        # Layers other than nn.Linear, such as transformers' Conv1D, store the transposed weight.
        if func is nn.functional.linear and isinstance(weights[0].base_layer, nn.Linear):
            return multiply(*args, **kwargs)
        if func not in ALLOWED:
            raise NotImplementedError(
                "With adapter_names the weight of an adapted layer is another matrix for every image, and "
                f"{getattr(func, '__name__', func)}() cannot use it. This model wants one adapter at a time: call it "
                "with the images of one adapter, and adapter_names of one name."
            )
        with DisableTorchFunctionSubclass():
            return func(*args, **kwargs)


def multiply(input: Tensor, weight: PerImageWeight, bias: Tensor | None = None) -> Tensor:
    """``nn.functional.linear`` with its argument names."""
    y = nn.functional.linear(input, weight.frozen, bias)
    return weight.batch.add(weight.base_layer, input, y, weight.owned)
