"""What belongs to one call of a model: which adapter each image of its batch has.

The layers of a model are shared by all who call it, also at the same time. So what one call says is not written on
them: it is in a context variable, of which every thread (and every asynchronous task) has its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from ..method.decomposition import core_grid
from ..method.per_image import FactorBank, bank, read_per_image, write_per_image
from ..method.tensorization import Slices
from .factors import FacTStack

BASE = "__base__"  # PEFT's name for no adapter


class PerImageCall:
    """What the layers share while they compute one batch in which every image has factors of its own."""

    def __init__(self, num_images: int) -> None:
        self.num_images = num_images
        self._last_read: tuple[Tensor, int, Tensor, Tensor] | None = None

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

    def add(self, x: Tensor, y: Tensor, factors: FactorBank, cores: Tensor, in_place: bool) -> Tensor:
        """y + x dW, for every image its own dW.

        Args:
            x: Input of a layer, (R, ..., in).
            y: Its output without adapters, (R, ..., out).
            factors: U and V of every image, in the precision to multiply in.
            cores: Its cores of the layer's slices, (images, a, b, r, r).
            in_place: Write the sum into `y`, if it is contiguous.
        """
        h = self._read(x, factors.U)
        added = write_per_image(h, cores, factors.V, self.by_image(y), in_place and y.is_contiguous())
        return added.view(y.shape)

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


class MixedBatch(PerImageCall):
    """A batch of which every image names an adapter of the model."""

    def __init__(self, names: Sequence[str], modules: frozenset[nn.Module], has_labels: bool = False) -> None:
        """
        Args:
            names: The adapter of every image.
            modules: The layers and heads of the model that is called. Others, such as those of a second model called
                inside the first, are none of this batch's business.
            has_labels: Whether the model will want to compute a loss.
        """
        super().__init__(len(names))
        self.names = list(names)
        self.modules = modules
        self.has_labels = has_labels
        self.distinct = list(dict.fromkeys(names))
        self._banks: dict[tuple[FacTStack, torch.device, torch.dtype], FactorBank] = {}

    @property
    def shared(self) -> str | None:
        """The adapter of the images if all have the same one."""
        return self.distinct[0] if len(self.distinct) == 1 else None

    def index(self, device: torch.device) -> Tensor:
        """The place in `distinct` of every image's adapter."""
        places = {name: place for place, name in enumerate(self.distinct)}
        return torch.tensor([places[name] for name in self.names], device=device)

    def factors(self, stack: FacTStack, device: torch.device, dtype: torch.dtype) -> FactorBank:
        """The factors of all images, gathered when a stack is used first."""
        key = (stack, device, dtype)
        if key not in self._banks:
            adapters = [stack.terms(name) if name in stack.fact_U else None for name in self.distinct]
            scales = [stack.scale(name) if name in stack.fact_U else 0.0 for name in self.distinct]
            gathered = bank(adapters, scales).to(device, dtype)
            in_order = len(self.distinct) == len(self.names)
            self._banks[key] = gathered if in_order else gathered[self.index(device)]
        return self._banks[key]

    def cores(self, factors: FactorBank, stack: FacTStack, slices: Mapping[str, Slices]) -> Tensor:
        """The cores (images, a, b, r, r) of one layer, of which each adapter has its `slices`."""
        owned = [slices.get(name) for name in self.distinct if name in stack.fact_U]
        if owned[0] is not None and len(set(owned)) == 1:  # all adapters have the same slices, or none
            return core_grid(factors.cores.narrow(1, owned[0].first, owned[0].count), owned[0])
        absent = factors.cores.shape[1] - 1  # the slice of zeros
        places = {name: [absent if place is None else place for place in mine.places] for name, mine in slices.items()}
        layer = next(iter(slices.values()))
        nowhere = [absent] * len(layer.places)
        index = torch.tensor([places.get(name, nowhere) for name in self.names], device=factors.cores.device)
        images = torch.arange(len(self.names), device=factors.cores.device)
        return factors.cores[images[:, None], index].unflatten(1, (layer.num_in_blocks, layer.num_out_blocks))


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
    return batch if batch is None or module is None or module in batch.modules else None
