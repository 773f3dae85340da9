"""A frozen model whose layers and head take the factors and heads of every image from the batch they compute."""

from __future__ import annotations

import copy
from collections.abc import Hashable, Sequence
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..architecture.blocks import find_block_linears
from ..architecture.heads import find_classifiers, named_labels
from ..architecture.linears import find_linears
from ..method.tensorization import Slices, block_of, stack_sizes, tensorize
from ..tuner.mixed_batch import PerImageWeight, current_batch


class PooledLinear(nn.Module):
    """``y_i = base_layer(x_i) + x_i dW_i`` for every image i of the batch."""

    def __init__(self, base_layer: nn.Module, slices: Sequence[Slices]) -> None:
        """
        Args:
            base_layer: A linear layer, quantised or not, or transformers' ``Conv1D``.
            slices: Its slices among those of the model and, if it lies in a block, among those of the block.
        """
        super().__init__()
        self.base_layer = base_layer
        self.slices: dict[Hashable, Slices] = {owned.stack: owned for owned in slices}
        self.in_features, self.out_features = slices[0].in_features, slices[0].out_features

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(R, ..., in_features) to (R, ..., out_features), where every image has as many of the R rows."""
        y: Tensor = self.base_layer(x, *args, **kwargs)
        batch = current_batch()
        return y if batch is None else batch.add(self.base_layer, x, y, self.slices)

    @property
    def weight(self) -> Tensor:
        """The frozen weight, or in a batch what stands for every image's own."""
        weight: Any = self.base_layer.weight
        batch = current_batch()
        if batch is None or type(self.base_layer) is not nn.Linear:
            return weight
        return PerImageWeight.of(weight, batch, self.base_layer, self.slices)

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
        batch = current_batch()
        if batch is None:
            y: Tensor = self.base_layer(x)
            return y
        return batch.head(batch.poison(x), *batch.heads[self.name])


class PooledModel:
    """A copy of a model, on the same weights, that computes pooled batches.

    Attributes:
        module: The copy, in evaluation mode.
        slices: The slices of every linear layer outside the heads, by name; those of the blocks come first. Not those
            of ``nn.MultiheadAttention``, which it does not call.
        slices_by_block: Of those in blocks, the slices that they have where every block is a stack of its own.
        slices_of: The slices of every stack by layer name.
        num_slices: Their number.
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
        self.slices_of: dict[str, dict[str, Slices]] = {}
        for name, its_slices in [*self.slices.items(), *self.slices_by_block.items()]:
            self.slices_of.setdefault(its_slices.stack, {})[name] = its_slices
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
