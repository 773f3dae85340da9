"""One batch in which every image has factors and a head of its own, whoever asks for it: `adapter_names` or the pool.

An image's way through a mixed batch:

1. The call says which adapter each image has, and a `MixedBatch` stands in a context variable while the model runs.
2. Before the first such call, `batch_axis.py` makes sure that the model keeps the rows of each image together.
3. Every adapted layer computes its frozen output and gives it to the batch with its input and its slices.
4. The batch adds to the rows of each image the increment of the image's own factors.
5. The head multiplies the rows of each image by the image's own weight.

The layers of a model are shared by all who call it, also at the same time. So what one call says is not written on
them: of the context variable every thread (and every asynchronous task) has its own.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from ..method.decomposition import core_grid
from ..method.fused_linear import autocast_dtype, is_fusable
from ..method.per_image import FactorBank, linear_per_image, read_per_image, write_per_image
from ..method.tensorization import Slices

BASE = "__base__"  # PEFT's name for no adapter
# Modules whose functions run a part of a model again in the backward pass, which knows nothing of the call.
CHECKPOINTING = {"torch.utils.checkpoint", "deepspeed.runtime.activation_checkpointing.checkpointing"}
MakeBank = Callable[[Any, torch.device, torch.dtype], "FactorBank | None"]


class MixedBatch:
    """What the layers and heads of one call take the factors and weights of every image from.

    Attributes:
        poisoned: Whether the layers make every other image NaN, to see where its rows go; see `batch_axis.py`.
    """

    poisoned = False

    def __init__(
        self,
        places: Sequence[int],
        make_bank: MakeBank,
        modules: frozenset[nn.Module] | None = None,
        *,
        slices: Mapping[nn.Module, Mapping[Hashable, Slices]] | None = None,
        heads: Mapping[str, tuple[Tensor, Tensor | None]] | None = None,
        names: Sequence[str] = (),
        has_labels: bool = False,
    ) -> None:
        """
        Args:
            places: The place of every image's adapter among the adapters of the batch.
            make_bank: The factors of all images in a stack, on a device and in a dtype; None if no adapter has any.
            modules: The layers and heads of the model that is called. Others, such as those of a second model called
                inside the first, are none of this batch's business. None for all.
            slices: The slices of every layer in the banks, by stack, where the layers do not know them.
            heads: Weight (images, out, in) and bias (images, out) or None of heads that do not know them, by name.
            names: The names of the adapters, for layers and heads that know adapters by name.
            has_labels: Whether the model will want to compute a loss.
        """
        self.places = list(places)
        self.num_images = len(self.places)
        self.modules = modules
        self.slices = slices or {}
        self.heads = heads or {}
        self.names = list(names)
        self.has_labels = has_labels
        self._make_bank = make_bank
        self._banks: dict[tuple[Any, ...], FactorBank | None] = {}
        self._last_read: tuple[Tensor, int, Tensor, Tensor] | None = None
        self._checkpoints = checkpoints_around() if torch.is_grad_enabled() else None

    @property
    def shared(self) -> str | None:
        """The adapter of the images if all have the same one, and it is known by name."""
        return self.names[0] if len(self.names) == 1 else None

    def add(self, base_layer: nn.Module, x: Tensor, y: Tensor, owned: Mapping[Hashable, Slices]) -> Tensor:
        """y + x dW, for every image its own dW.

        Args:
            base_layer: The frozen layer.
            x: Its input (R, ..., in).
            y: Its output (R, ..., out).
            owned: The layer's slices by stack.
        """
        dtype = autocast_dtype(x) or x.dtype
        # Nobody else has seen what a plain layer gives.
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
        """View the input or output (R, ..., n) of a layer as (images, rows of one, n).

        The first axis may be longer than the batch: Swin folds the windows of an image into it, image by image.

        Raises:
            ValueError: If the first axis is no multiple of the number of images.
        """
        if len(x) % self.num_images != 0:
            raise ValueError(
                f"There is one adapter for each of {self.num_images} images, but a layer is called with a batch of "
                f"{len(x)}: pass one name per image. If the batch has as many images, this model calls layers with "
                "what belongs to no image, and cannot have one adapter per image."
            )
        return x.reshape(self.num_images, -1, x.shape[-1])

    def poisoned_copy(self) -> MixedBatch:
        """The same batch, poisoned; what it computes is its own."""
        poisoned = copy.copy(self)
        poisoned.poisoned, poisoned._banks = True, {}
        return poisoned

    def poison(self, x: Tensor) -> Tensor:
        """`x`; in a poisoned batch with NaN in the rows of images 0, 2, 4..."""
        if self.poisoned:
            self.by_image(x)  # for its check
            x = x.clone(memory_format=torch.contiguous_format)
            x.view(self.num_images, -1)[::2] = torch.nan
        return x

    def _bank(self, stack: Hashable, device: torch.device, dtype: torch.dtype) -> FactorBank | None:
        """The factors of all images, gathered when a stack is used first."""
        # What is computed without gradients, as by frozen first blocks, passes none on.
        key = (stack, device, dtype, torch.is_grad_enabled())
        if key not in self._banks:
            self._banks[key] = self._make_bank(stack, device, dtype)
        return self._banks[key]

    def _read(self, x: Tensor, U: Tensor) -> Tensor:
        """x (I (x) U), once for all layers that read the same x, as q, k and v do."""
        # A compiler finds equal products by itself. Inference tensors do not tell when they are written to.
        if torch.compiler.is_compiling() or x.is_inference():
            return read_per_image(self.by_image(x).to(U.dtype), U)
        if self._last_read is not None:
            last_x, last_version, last_U, h = self._last_read
            if last_x is x and last_version == x._version and last_U is U:
                return h
        h = read_per_image(self.by_image(x).to(U.dtype), U)
        self._last_read = (x, x._version, U, h)
        return h

    def refuse_checkpointing(self) -> None:
        """Refuse to be computed inside an activation checkpoint, unless the whole call is inside it.

        Raises:
            NotImplementedError: If it is.
        """
        if self._checkpoints is not None and checkpoints_around() > self._checkpoints:
            raise NotImplementedError(
                "One adapter per image does not work with activation checkpointing inside the model: the backward pass "
                "would compute its parts again without the adapters. Switch gradient checkpointing off, call the model "
                "under torch.no_grad(), or put torch.utils.checkpoint around the whole call."
            )


_CURRENT: ContextVar[MixedBatch | None] = ContextVar("fact_peft_mixed_batch", default=None)


@contextmanager
def calling_with(batch: MixedBatch | None) -> Iterator[None]:
    """Within the context, the calls of this thread have this batch; none of them has one if it is None."""
    token = _CURRENT.set(batch)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current_batch(module: nn.Module | None = None) -> MixedBatch | None:
    """The batch that the call in this thread has, if it concerns `module`."""
    batch = _CURRENT.get()
    if batch is None or module is None:
        return batch
    if batch.modules is not None and module not in batch.modules:
        return None
    batch.refuse_checkpointing()
    return batch


def checkpoints_around() -> int:
    """How many functions of activation checkpointing the caller is inside."""
    count = 0
    # A compiler keeps track of what it computes again by itself.
    frame: FrameType | None = None if torch.compiler.is_compiling() else sys._getframe()
    while frame is not None:
        count += frame.f_globals.get("__name__") in CHECKPOINTING
        frame = frame.f_back
    return count
