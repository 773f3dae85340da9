"""A frozen model whose layers and head take the factors and heads of every image from the batch they compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..architecture.blocks import find_block_linears
from ..architecture.heads import find_classifiers, named_labels
from ..architecture.linears import find_linears
from ..method.decomposition import core_grid
from ..method.fused_linear import autocast_dtype, is_fusable
from ..method.per_image import FactorBank
from ..method.tensorization import Slices, block_of, stack_sizes, tensorize
from ..tuner.call import PerImageCall
from ..tuner.per_image_weight import PerImageWeight


class PooledBatch(PerImageCall):
    """A batch whose images bring their factors and heads.

    Attributes:
        factors: Of every image by stack, with a core for every slice of the network.
        heads: Weight (images, out, in) and bias (images, out) or None, by the head's name.
    """

    def __init__(
        self, num_images: int, factors: dict[str, FactorBank], heads: dict[str, tuple[Tensor, Tensor | None]]
    ) -> None:
        super().__init__(num_images)
        self.factors = factors
        self.heads = heads


# As in `tuner.call`: what a call says belongs to the call. Set outside what is compiled, which may read it only.
_CURRENT: ContextVar[PooledBatch | None] = ContextVar("fact_peft_pooled_batch", default=None)


@contextmanager
def calling_with(batch: PooledBatch | None) -> Iterator[None]:
    """Within the context, networks called by this thread compute `batch`; None is the base model alone."""
    token = _CURRENT.set(batch)
    try:
        yield
    finally:
        _CURRENT.reset(token)


class PooledLinear(nn.Module):
    """``y_i = base_layer(x_i) + x_i dW_i`` for every image i of the batch."""

    def __init__(self, base_layer: nn.Module, slices: Sequence[Slices]) -> None:
        """
        Args:
            base_layer: A linear layer, quantised or not, or transformers' ``Conv1D``.
            slices: Its slices among those of the network and, if it lies in a block, among those of the block.
        """
        super().__init__()
        self.base_layer = base_layer
        self.slices = slices
        self.in_features, self.out_features = slices[0].in_features, slices[0].out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(R, ..., in_features) to (R, ..., out_features), where every image has as many of the R rows."""
        return self._add_increments(x, self.base_layer(x, *args, **kwargs))

    def _add_increments(self, x: Tensor, y: Tensor) -> Tensor:
        batch = _CURRENT.get()
        if batch is None:
            return y
        dtype = autocast_dtype(x) or x.dtype
        in_place = not torch.is_grad_enabled() and is_fusable(self.base_layer)
        for slices in self.slices:
            factors = batch.factors.get(slices.stack)
            if factors is None:
                continue
            if factors.U.dtype != dtype:
                factors = factors.to(x.device, dtype)
            cores = core_grid(factors.cores.narrow(1, slices.first, slices.count), slices)
            y = batch.add(x, y, factors, cores, in_place)
        return y

    @property
    def weight(self) -> Tensor:
        """The frozen weight, or in a batch what stands for every image's own."""
        weight: Any = self.base_layer.weight
        batch = _CURRENT.get()
        adapted = batch is not None and any(slices.stack in batch.factors for slices in self.slices)
        if not adapted or type(self.base_layer) is not nn.Linear:
            return weight
        return PerImageWeight.of(weight, self._add_increments)

    @property
    def bias(self) -> Tensor | None:
        """The frozen bias."""
        bias: Any = self.base_layer.bias
        return bias


class PooledHead(nn.Module):
    """A linear classifier that is another one for every image of the batch."""

    def __init__(self, base_layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """(R, ..., in) to (R, ..., out), out being that of the largest head in the batch."""
        batch = _CURRENT.get()
        if batch is None:
            y: Tensor = self.base_layer(x)
            return y
        weight, bias = batch.heads[self.name]
        rows, weight = batch.by_image(x), weight.mT.to(x.dtype)
        if bias is None:
            return torch.bmm(rows, weight).view(*x.shape[:-1], -1)
        return torch.baddbmm(bias[:, None].to(x.dtype), rows, weight).view(*x.shape[:-1], -1)


class Network:
    """A copy of a model, on the same weights, that computes pooled batches.

    Attributes:
        module: The copy, in evaluation mode.
        slices: The slices of every linear layer outside the heads, by name; those of the blocks come first. Not those
            of ``nn.MultiheadAttention``, which it does not call.
        slices_by_block: Of those in blocks, the slices that they have where every block is a stack of its own.
        num_slices: The number of slices, by stack.
        heads: The classifiers, by name; the last one has an output per label.
        labels: The class names of the model itself.
    """

    def __init__(self, vit: nn.Module) -> None:
        """
        Raises:
            ValueError: If `vit` has adapters, or is not a classifier with linear heads.
        """
        if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in vit.modules()):
            raise ValueError(
                f"vit is a {type(vit).__name__} with adapters in it; pass the model without (unload() takes them out) "
                "and load the adapters into the pool."
            )
        shared = {id(tensor): tensor for tensor in (*vit.parameters(), *vit.buffers())}
        self.module = copy.deepcopy(vit, shared).eval()
        self.labels = named_labels(vit)
        self.heads: dict[str, nn.Linear] = {}
        for name in find_classifiers(vit):
            head = vit.get_submodule(name)
            if type(head) is not nn.Linear:
                raise ValueError(f"The head {name} of vit is a {type(head).__name__}; only linear heads are pooled.")
            self.heads[name] = head
        if not self.heads:
            raise ValueError(f"vit is a {type(vit).__name__} without a classification head; the pool wants one.")
        linears = {**find_block_linears(vit), **find_linears(vit)}
        called = {name: shape for name, shape in linears.items() if self._calls(vit, name)}
        self.slices = tensorize(called)
        in_blocks = {name: shape for name, shape in called.items() if block_of(name)}
        self.slices_by_block = tensorize(in_blocks, share="block")
        self.num_slices = stack_sizes([*self.slices.values(), *self.slices_by_block.values()])
        for name in called:
            owned = [slices[name] for slices in (self.slices, self.slices_by_block) if name in slices]
            self._replace(name, PooledLinear(vit.get_submodule(name), owned))
        for name, head in self.heads.items():
            self._replace(name, PooledHead(head, name))

    def _calls(self, vit: nn.Module, name: str) -> bool:
        """Whether a linear layer is a module outside the heads that is called, as torch's attention does not do."""
        return name not in self.heads and not isinstance(
            vit.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention
        )

    def _replace(self, name: str, module: nn.Module) -> None:
        parent, _, child = name.rpartition(".")
        setattr(self.module.get_submodule(parent), child, module)

    @property
    def reference(self) -> Tensor:
        """A tensor of the device and the precision of the model."""
        return next(iter(self.heads.values())).weight

    @property
    def num_labels(self) -> int:
        """The labels of the model itself."""
        return list(self.heads.values())[-1].out_features
