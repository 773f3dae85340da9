"""A frozen classifier whose layers and head compute each image of a batch with the adapter of that image."""

import copy
from collections.abc import Hashable, Sequence

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..adapter.adapter import Adapter
from ..architecture.blocks import find_block_linears
from ..architecture.heads import find_classifiers, named_labels
from ..architecture.linears import find_linears
from ..method.fused_linear import FactorBank, joined, of_images
from ..method.tensorization import Slices, block_of, stack_sizes, tensorize
from ..tuner.layer import FacTLinear
from ..tuner.mixed_batch import MixedBatch, current_batch
from .pooled_adapter import AdapterSpec, PooledAdapter, StackedAdapters, to_vector


class PooledHead(nn.Module):
    """A linear classifier with a weight and a bias of its own for every image of the batch."""

    def __init__(self, base_layer: nn.Linear, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        """(R, ..., in) to (R, ..., out), where out is that of the largest head in the batch."""
        batch = current_batch()
        if batch is None:
            y: Tensor = self.base_layer(x)
            return y
        return batch.head(batch.poison(x), *batch.heads[self.name])


class PooledModel:
    """A copy of a model on the same weights, in evaluation mode, and what adapters have to do with it."""

    def __init__(self, vit: nn.Module) -> None:
        if any(isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)) for module in vit.modules()):
            raise ValueError(
                f"vit is a {type(vit).__name__} with adapters in it; pass the model without (unload() takes them out) "
                "and load the adapters into the pool."
            )
        shared = {id(tensor): tensor for tensor in (*vit.parameters(), *vit.buffers())}
        self.module = copy.deepcopy(vit, shared).eval()
        self.labels = named_labels(vit)
        self.heads: dict[str, nn.Linear] = {}  # by name; the last one has an output per label
        for name in find_classifiers(vit):
            head = vit.get_submodule(name)
            if type(head) is not nn.Linear:
                raise ValueError(f"The head {name} of vit is a {type(head).__name__}; only linear heads are pooled.")
            self.heads[name] = head
            self.module.set_submodule(name, PooledHead(head, name))
        if not self.heads:
            raise ValueError(f"vit is a {type(vit).__name__} without a classification head; the pool wants one.")
        self.num_labels = list(self.heads.values())[-1].out_features  # of the model itself

        # Every linear layer outside the heads; those of the blocks come first. The projections of nn.MultiheadAttention
        # are left out, since torch never calls them as modules.
        called = {
            name: shape
            for name, shape in {**find_block_linears(vit), **find_linears(vit)}.items()
            if name not in self.heads
            and not isinstance(vit.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention)
        }
        self.slices = tensorize(called)
        by_block = tensorize({name: shape for name, shape in called.items() if block_of(name)}, share="block")
        self.slices_of: dict[str, dict[str, Slices]] = {}  # by stack, of the whole model or of one block, and layer
        self.by_name: dict[str, tuple[nn.Module, dict[Hashable, Slices]]] = {}
        for name in called:
            owned = [slices[name] for slices in (self.slices, by_block) if name in slices]
            for its_slices in owned:
                self.slices_of.setdefault(its_slices.stack, {})[name] = its_slices
            layer = FacTLinear(vit.get_submodule(name))
            self.module.set_submodule(name, layer)
            self.by_name[name] = layer, {its_slices.stack: its_slices for its_slices in owned}
        self.num_slices = stack_sizes([*self.slices.values(), *by_block.values()])  # in each stack

    @property
    def reference(self) -> Tensor:
        """A tensor with the device and the data type of the model."""
        return next(iter(self.heads.values())).weight

    def admit(self, name: str, adapter: Adapter, dtype: torch.dtype) -> tuple[PooledAdapter, Tensor]:
        """Check that an adapter fits the model; return its description, and its numbers in host memory."""
        reasons = self._objections(adapter)
        if not reasons:
            spec, vector = to_vector(adapter, dtype)
            if not torch.isfinite(vector).all():
                reasons.append(f"it holds NaN, infinity, or numbers too large for {dtype}")
        if not reasons:
            shape = spec.heads.get(f"{list(self.heads)[-1]}.weight")
            num_labels, labels = (shape[0], adapter.config.labels) if shape else (self.num_labels, self.labels)
            if labels is not None and len(labels) != num_labels:
                reasons.append(f"it has {len(labels)} labels for {num_labels} logits")
        if reasons:
            raise ValueError(f"Adapter {name!r} cannot be pooled: {'; '.join(reasons)}.")
        return PooledAdapter(spec, adapter.config.scaling, labels, num_labels), vector

    def _objections(self, adapter: Adapter) -> list[str]:
        """Why the names and shapes of an adapter do not fit the model; empty if they do."""
        for layer, theirs in adapter.slices.items():
            ours = self.slices.get(layer)
            if ours is None:
                reason = f"it adapts {layer}, which is no linear layer that this model calls outside its head"
            elif (theirs.in_features, theirs.out_features) != (ours.in_features, ours.out_features):
                reason = (
                    f"its layer {layer} is {theirs.in_features}x{theirs.out_features}, but {ours.in_features}x"
                    f"{ours.out_features} in this model"
                )
            else:
                continue
            return [reason, "it was trained on another backbone"]
        bias, reasons = adapter.config.bias, []
        if bias != "none":
            reasons.append(f"it has trained biases (bias={bias!r}) of layers that all adapters share")
        for key, tensor in adapter.others.items():
            head, _, kind = key.rpartition(".")
            base = getattr(self.heads.get(head), kind, None)
            if isinstance(base, Tensor):
                if tensor.dim() != base.dim() or tensor.shape[1:] != base.shape[1:]:
                    reasons.append(f"its {key} is {list(tensor.shape)}, but {list(base.shape)} in this model")
            elif bias == "none" or kind != "bias":
                reasons.append(f"it has trained {key}, which is not part of the head ({', '.join(self.heads)})")
        for head, base in self.heads.items():
            kinds = [kind for kind in ("weight", "bias") if getattr(base, kind) is not None]
            given = {kind: adapter.others[f"{head}.{kind}"] for kind in kinds if f"{head}.{kind}" in adapter.others}
            if 0 < len(given) < len(kinds):
                reasons.append(f"of its head {head} only {', '.join(given)} is there")
            if len({tensor.shape[:1] for tensor in given.values()}) > 1:
                reasons.append(f"weight and bias of its head {head} have different numbers of outputs")
        return reasons

    def gather(self, owners: Sequence[tuple[PooledAdapter, Tensor] | None], dtype: torch.dtype) -> MixedBatch:
        """The factors and heads of a batch that is multiplied in `dtype`. Adapters of one spec are stacked together.

        `owners` has the adapter of every image with its vector, or None for the base model; not all are None. Ranks and
        numbers of labels are raised to the next power of two, so that a compiled model sees few shapes.
        """
        vectors_by_spec: dict[AdapterSpec, dict[PooledAdapter, Tensor]] = {}
        for adapter, vector in filter(None, owners):
            vectors_by_spec.setdefault(adapter.spec, {})[adapter] = vector
        in_order = [adapter for vectors in vectors_by_spec.values() for adapter in vectors]
        place_of = {adapter: place for place, adapter in enumerate([*in_order, None])}
        places = [place_of[owner and owner[0]] for owner in owners]
        with_base = len(in_order) in places
        device = self.reference.device
        groups = [StackedAdapters(spec, vectors, device) for spec, vectors in vectors_by_spec.items()]

        rank = next_power_of_two(max(spec.rank for spec in vectors_by_spec))
        banks = {}
        for stack in dict.fromkeys(stack for spec in vectors_by_spec for stack in spec.stacks):
            parts = [group.bank(stack, self.slices_of[stack]) for group in groups] + [FactorBank.empty(1)] * with_base
            bank = FactorBank.join(parts, self.num_slices[stack], rank)
            banks[stack] = bank.to(device, dtype).of_images(places)

        def bank_in(stack: str, device: torch.device, dtype: torch.dtype) -> FactorBank | None:
            return banks[stack].to(device, dtype) if stack in banks else None

        def of_heads(key: str, frozen: Tensor) -> Tensor:
            parts = [group.head(key, frozen) for group in groups]
            num_outputs = next_power_of_two(max(len(frozen), *(part.shape[1] for part in parts)))
            together = joined(parts + [frozen[None]] * with_base, num_outputs, *frozen.shape[1:])
            return of_images(together.to(dtype), places)

        heads = {
            name: (
                of_heads(f"{name}.weight", head.weight),
                None if head.bias is None else of_heads(f"{name}.bias", head.bias),
            )
            for name, head in self.heads.items()
        }
        # A layer that no adapter of the batch adapts may be called with what belongs to no image, such as positions.
        adapted = {name for spec in vectors_by_spec for name in spec.slices}
        slices = {layer: owned for name, (layer, owned) in self.by_name.items() if name in adapted}
        return MixedBatch(places, bank_in, slices=slices, heads=heads)


def next_power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
