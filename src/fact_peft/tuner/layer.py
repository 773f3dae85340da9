"""The adapted linear layer: a frozen layer plus the increments from its slices of the shared stacks."""

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from peft.utils.quantization_utils import (
    ForwardOnlyQuantizationBackend,
    QuantizationBackend,
    resolve_quantization_backend,
)
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

from ..adapter.config import FacTConfig
from ..architecture.linears import linear_shape
from ..method.decomposition import contract, core_grid, core_matrix, expand, increment, low_rank_pair
from ..method.fused_linear import autocast_dtype, fused_linear, is_fusable, without_autocast
from ..method.tensorization import Slices
from ..upstream import active_ddp_module, current_graph_task
from .factors import FacTLayer, FacTStack, ordinary_tensors, warn_if_alone
from .mixed_batch import MixedBatch, PerImageWeight, current_batch


def find_quantization(base_layer: nn.Module, **quantization: Any) -> QuantizationBackend | None:
    """PEFT's backend for reading and writing a quantised weight; None if the layer is not quantised."""
    try:
        return resolve_quantization_backend(base_layer, **quantization)
    except ValueError:
        # The weight was quantised by hand with torchao. PEFT cannot merge into it, but it can be trained on.
        return ForwardOnlyQuantizationBackend("torchao (not loaded with a TorchAoConfig)")


class FacTLinear(nn.Module, FacTLayer):
    """``y = base_layer(x) + x dW`` with ``dW = s (I (x) U) Core (I (x) V)^T`` summed over the active adapters.

    The layer has no parameters of its own. It knows the stack of every adapter and its slices there, and reads the
    factors when it is called.

    Args:
        base_layer: ``nn.Linear``, quantised or not, or transformers' ``Conv1D``. It is frozen and kept inside.
        quantization: What PEFT needs to quantise a merged weight again.
    """

    other_param_names = ("fact_slices", "fact_stacks")
    # Called with the adapted weight when code reads it. (For calls of the layer, nn.Module has hooks.)
    weight_hook: Callable[[Tensor], Tensor] | None = None

    def __init__(self, base_layer: nn.Module, **quantization: Any) -> None:
        super().__init__()
        self.base_layer = base_layer
        shape = linear_shape(base_layer)
        assert shape is not None
        self.in_features, self.out_features = shape
        self.fan_in_fan_out = isinstance(base_layer, Conv1D)  # which stores its weight as (in, out)
        self.quantization_backend = find_quantization(base_layer, **quantization)
        self.fact_slices: dict[str, Slices] = {}
        # A plain dict hides the stacks from nn.Module, so that only the model registers their factors.
        self.fact_stacks: dict[str, FacTStack] = {}
        # The factors and scales that have been merged, by adapter, with the values they had then.
        self.merged_factors: dict[str, tuple[Mapping[str, Tensor], float]] = {}
        self._disable_adapters = False
        self._active_adapter = []
        self._recomputed_under_ddp = False

    def update_layer(self, adapter_name: str, slices: Slices, stack: FacTStack) -> None:
        """Give an adapter the `slices` of `stack`, and move the stack to the device of its first layer."""
        self.fact_slices[adapter_name] = slices
        self.fact_stacks[adapter_name] = stack
        self._move_adapter_to_device_of_base_layer(adapter_name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if not hasattr(self.base_layer, "_hf_hook"):  # an offloaded model is saved part by part
            for adapter_name, slices in self.fact_slices.items():
                warn_if_alone(adapter_name, slices, self.fact_stacks[adapter_name], prefix)

    @property
    def merged_adapters(self) -> list[str]:  # type: ignore[override]
        """Adapters that are merged, in the order in which they were merged."""
        return list(self.merged_factors)

    def terms(self, adapter_name: str, factors: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """U (d, r), the core matrix (a r, b r) and V (e, r) of an adapter, from the stack's factors or from others."""
        self._check_reduced_once()
        stack, slices = self.fact_stacks[adapter_name], self.fact_slices[adapter_name]
        factors = stack.factors(adapter_name) if factors is None else factors
        with without_autocast(factors["U"]):  # the gradients of Tucker's cores, which are products, overflow float16
            cores = stack.decomposition(adapter_name).cores(factors, slices.first, slices.count)
            core = core_matrix(core_grid(cores, slices))
        return factors["U"], core, factors["V"]

    def _check_reduced_once(self) -> None:
        """Refuse reentrant checkpointing under DDP, where the replicas would diverge.

        Every checkpointed segment then has its own backward pass, and DDP reduces the gradients of the shared factors
        after the first one. Such a segment is called first without gradients, and again inside the backward pass.
        """
        if torch.compiler.is_compiling():
            return
        if current_graph_task() == -1:  # not inside a backward pass
            ddp = active_ddp_module()
            self._recomputed_under_ddp = ddp is not None and not ddp.static_graph and not torch.is_grad_enabled()
        elif self._recomputed_under_ddp and torch.is_grad_enabled():
            raise RuntimeError(
                "Reentrant activation checkpointing under DistributedDataParallel would reduce the gradients of FacT's "
                "shared factors before they are complete; pass use_reentrant=False to checkpointing, or static_graph="
                "True to DistributedDataParallel."
            )

    def _precise_terms(
        self, adapter_name: str, factors: Mapping[str, Tensor] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        U, core, V = self.terms(adapter_name, factors)
        dtype = torch.promote_types(U.dtype, torch.float32)
        return U.to(dtype), core.to(dtype), V.to(dtype)

    def _get_available_adapters(self) -> set[str]:
        return set(self.fact_slices)

    def _config(self, adapter_name: str) -> FacTConfig:
        return self.fact_stacks[adapter_name].configs[adapter_name]

    def _applied_adapters(self, batch: MixedBatch | None) -> list[str]:
        """The adapters of this layer that apply to all images of the call."""
        names = self.active_adapters if batch is None else [] if batch.shared is None else [batch.shared]
        return [name for name in names if name in self.fact_slices]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """(..., in_features) to (..., out_features), with the active adapters, or with the adapter of each image."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        if self.disable_adapters or self.merged:
            return self.base_layer(x, *args, **kwargs)
        batch = current_batch(self)
        applied = self._applied_adapters(batch)
        if len(applied) == 1 and not args and not kwargs and is_fusable(self.base_layer):
            return self._forward_fused(x, applied[0])
        y = self.base_layer(x, *args, **kwargs)
        if self.quantization_backend is not None:
            y = self.quantization_backend.maybe_clone_base_result(y)
        if batch is not None and self in batch.slices:
            return batch.add(self.base_layer, x, y, batch.slices[self])
        for adapter_name in applied:
            y = self._add_increment(x, y, adapter_name)
        return y

    def _forward_fused(self, x: Tensor, adapter_name: str) -> Tensor:
        """x W^T + b + x dW in one function with few passes over activations; see `fused_linear`."""
        base_layer: Any = self.base_layer
        weight, bias = base_layer.weight, base_layer.bias
        config, noise, dtype = self._config(adapter_name), None, autocast_dtype(x)
        if dtype is not None:
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        U, core, V = (term.to(x.device) for term in self.terms(adapter_name))
        if self.training and config.fact_dropout > 0:
            noise = nn.functional.dropout(x.new_ones(x.shape[:-1].numel(), core.shape[1]), config.fact_dropout)
        return fused_linear(x, weight, bias, U, core, V, config.scaling, noise)

    def _add_increment(self, x: Tensor, y: Tensor, adapter_name: str) -> Tensor:
        """y + x dW, in the precision of the activations or of autocast."""
        config = self._config(adapter_name)
        U, core, V = (term.to(x.device) for term in self.terms(adapter_name))
        h = contract(x, U.to(x.dtype), core.to(x.dtype))
        h = nn.functional.dropout(h, config.fact_dropout, self.training)
        return expand(h.to(y.dtype), V.to(y.dtype), config.scaling, onto=y)

    @property
    def weight(self) -> Tensor:
        """The adapted weight, for code that reads it instead of calling the layer, as timm's EVA, BEiT and Swin v2 do.

        It is differentiable in the factors and has no dropout. In a mixed batch it is a `PerImageWeight`. A sharded or
        quantised weight is returned without increments, since most code reads only its dtype or device.

        While an adapter is active and not merged, every access computes a new tensor, and what is written into it is
        lost; write to ``base_layer.weight``.
        """
        if self.disable_adapters and self.merged:
            self.unmerge()
        base_layer: Any = self.get_base_layer()  # not super().weight, which the compiler cannot follow
        weight: Tensor = base_layer.qweight if hasattr(base_layer, "qweight") else base_layer.weight
        can_add = self.quantization_backend is None and self.is_whole(weight)
        if self.disable_adapters or self.merged or not can_add:
            return weight
        batch = current_batch(self)
        if batch is not None and self in batch.slices:
            return PerImageWeight.of(weight, batch, base_layer, batch.slices[self])
        for adapter_name in self._applied_adapters(batch):
            weight = weight + self._delta_weight(adapter_name).to(weight)
        return weight if self.weight_hook is None else self.weight_hook(weight)

    def is_whole(self, weight: Tensor) -> bool:
        """Whether a weight is not sharded. Sharded ones are flat (FSDP1, ZeRO-3) or DTensors (FSDP2, TP)."""
        shape = (self.in_features, self.out_features) if self.fan_in_fan_out else (self.out_features, self.in_features)
        return weight.shape == shape and not isinstance(weight, DTensor)

    @torch.no_grad()
    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """The increment in the orientation of the base weight, in float32 or better, on the device of the factors."""
        return self._delta_weight(adapter_name)

    def _delta_weight(
        self, adapter_name: str, factors: Mapping[str, Tensor] | None = None, scale: float | None = None
    ) -> Tensor:
        scale = self._config(adapter_name).scaling if scale is None else scale
        delta = increment(*self._precise_terms(adapter_name, factors), scale)
        return delta if self.fan_in_fan_out else delta.t()

    @torch.no_grad()
    def low_rank_pair(self, adapter_name: str) -> tuple[Tensor, Tensor]:
        """Matrices A (q, in_features) and B (out_features, q) such that B A is the increment of an ``nn.Linear``."""
        A, B = low_rank_pair(*self._precise_terms(adapter_name), self._config(adapter_name).scaling)
        # Copied because B may be V itself, which all layers share.
        return A.clone(memory_format=torch.contiguous_format), B.clone(memory_format=torch.contiguous_format)

    @ordinary_tensors()
    def merged_weight(self, adapter_name: str, check: bool = False, weight: Tensor | None = None) -> Tensor:
        """The base weight, or `weight`, plus the increment.

        It is added in float32 or better, then cast back, and with `check` finite.
        """
        merged = self._weight_plus(self._delta_weight(adapter_name), weight)
        if check and not torch.isfinite(merged).all():
            raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")
        return merged

    def _weight_plus(self, delta: Tensor, weight: Tensor | None = None) -> Tensor:
        weight = self.get_base_weight() if weight is None else weight
        return (weight + delta.to(weight.device)).to(weight.dtype).contiguous()

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the increments of adapters to the base weight. A quantised weight is quantised again, which rounds.

        Args:
            safe_merge: Whether to raise, before the weight is changed, if the result is not finite.
            adapter_names: The adapters to merge; None for the active ones.

        Raises:
            TypeError: If the weight is quantised in a way that cannot be undone.
            ValueError: With `safe_merge`, if the merged weight would hold NaN or infinity.
        """
        for adapter_name in check_adapters_to_merge(self, adapter_names):
            if adapter_name not in self.fact_slices:
                continue
            weight = self.merged_weight(adapter_name, check=safe_merge)
            if self.quantization_backend is not None:
                warnings.warn(
                    f"Merging into {self.quantization_backend.backend_name} weights quantises W + dW again: the output "
                    "changes by its rounding, and unmerging does not restore the weights exactly.",
                    stacklevel=2,
                )
            self.set_base_weight(weight)
            copies = self.fact_stacks[adapter_name].merge_in(adapter_name)
            self.merged_factors[adapter_name] = copies, self._config(adapter_name).scaling

    @ordinary_tensors()
    def unmerge(self) -> None:
        """Subtract what was merged, also if an adapter's factors or scale have changed since."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
        for adapter_name in reversed(self.merged_adapters):
            added = self._delta_weight(adapter_name, *self.merged_factors[adapter_name])
            self.set_base_weight(self._weight_plus(-added))
            del self.merged_factors[adapter_name]
            self.fact_stacks[adapter_name].take_out(adapter_name)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """If this is the first layer of a stack, move the factors there, and cast them if its weight is of floats."""
        if adapter_name not in self.fact_slices or self.fact_slices[adapter_name].first > 0:
            return
        base_device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        target = device if device is not None else base_device
        if target is not None and target.type != "meta":
            is_float = dtype is not None and dtype.is_floating_point
            self.fact_stacks[adapter_name].place(adapter_name, target, dtype if is_float else None)

    def extra_repr(self) -> str:
        return ", ".join(
            f"{name}: slices {owned.first}-{owned.first + owned.count - 1} of {owned.stack}"
            + (f" for {owned.parts}" if owned.parts else "")
            for name, owned in self.fact_slices.items()
        )
