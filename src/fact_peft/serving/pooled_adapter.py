"""One adapter as the pool holds it: checked, and never changed. Loading it again makes another one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from ..method.decomposition import increment_norms
from .adapter_spec import AdapterSpec, spec_of
from .pooled_model import PooledModel


@dataclass(frozen=True, eq=False)
class PooledAdapter:
    """What an adapter is beside its numbers, which lie in an `AdapterCache`.

    Attributes:
        spec: Names and shapes of its numbers.
        scale: The scale s.
        labels: The class names.
        num_labels: The number of its logits.
        num_bytes: What its numbers take.
    """

    spec: AdapterSpec
    scale: float
    labels: list[str] | None
    num_labels: int
    num_bytes: int


def read(source: Any, revision: str | None, token: str | bool | None) -> Adapter:
    """An adapter from a folder, the Hub, or memory: a config and what `get_peft_model_state_dict` gives.

    Raises:
        ValueError: If `source` is no adapter of FacT.
    """
    if isinstance(source, Adapter):
        return source
    if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], FacTConfig):
        return Adapter.from_state_dict(source[0], source[1])
    if isinstance(source, (str, Path)):
        return Adapter.read(source, revision, token)
    raise ValueError(
        f"source is a {type(source).__name__}; pass a folder, a name on the Hub, an Adapter, or a pair of FacTConfig "
        "and state dict."
    )


def pooled(name: str, adapter: Adapter, model: PooledModel, dtype: torch.dtype) -> tuple[PooledAdapter, Tensor]:
    """What the pool keeps of an adapter, and its numbers as one vector in host memory.

    Raises:
        ValueError: If it cannot be pooled; says the adapter and why.
    """
    config = adapter.config
    reasons = objections(adapter, model)
    if not reasons:
        shapes = tuple((key, tuple(tensor.shape)) for key, tensor in adapter.others.items())
        spec = spec_of(tuple(config.layout or ()), config.share, config.decomposition, config.rank, shapes)
        tensors = {(stack, letter): t for stack, group in adapter.factors.items() for letter, t in group.items()}
        vector = spec.join(tensors | {("", key): tensor for key, tensor in adapter.others.items()}, dtype)
        if not torch.isfinite(vector).all():
            reasons.append(f"it holds NaN, infinity, or numbers too large for {dtype}")
    if reasons:
        raise ValueError(f"Adapter {name!r} cannot be pooled: {'; '.join(reasons)}.")
    shape = spec.heads.get(f"{list(model.heads)[-1]}.weight")
    num_labels, labels = (model.num_labels, model.labels) if shape is None else (shape[0], config.labels)
    if labels is not None and len(labels) != num_labels:
        raise ValueError(f"Adapter {name!r} cannot be pooled: it has {len(labels)} labels for {num_labels} logits.")
    return PooledAdapter(spec, config.scaling, labels, num_labels, vector.nbytes), vector


def objections(adapter: Adapter, model: PooledModel) -> list[str]:
    """Why an adapter does not belong on a model, by its names and shapes."""
    config, reasons = adapter.config, []
    for layer, owned in adapter.slices.items():
        own = model.slices.get(layer)
        if own is None:
            reasons.append(f"it adapts {layer}, which is no linear layer that this model calls outside its head")
        elif (owned.in_features, owned.out_features) != (own.in_features, own.out_features):
            reasons.append(
                f"its layer {layer} is {owned.in_features}x{owned.out_features}, but {own.in_features}x"
                f"{own.out_features} in this model"
            )
        if reasons:
            return [*reasons, "it was trained on another backbone"]
    if config.bias != "none":
        reasons.append(f"it has trained biases (bias={config.bias!r}) of layers that all adapters share")
    for key, tensor in adapter.others.items():
        head, _, kind = key.rpartition(".")
        base = getattr(model.heads.get(head), kind, None)
        if not isinstance(base, Tensor) or kind not in ("weight", "bias"):
            if config.bias == "none" or kind != "bias":
                reasons.append(f"it has trained {key}, which is not part of the head ({', '.join(model.heads)})")
        elif tensor.shape[1:] != base.shape[1:] or tensor.dim() != base.dim():
            reasons.append(f"its {key} is {list(tensor.shape)}, but {list(base.shape)} in this model")
    for head, base in model.heads.items():
        kinds = {kind for kind in ("weight", "bias") if getattr(base, kind) is not None}
        given = {kind for kind in kinds if f"{head}.{kind}" in adapter.others}
        if given and given != kinds:
            reasons.append(f"of its head {head} only {', '.join(given)} is there")
        outputs = {len(adapter.others[f"{head}.{kind}"]) for kind in given}
        if len(outputs) > 1:
            reasons.append(f"weight and bias of its head {head} have different numbers of outputs")
    return reasons


def norms_of(adapter: PooledAdapter, vector: Tensor) -> dict[str, float]:
    """Frobenius norm of dW, scale included, by layer name."""
    spec = adapter.spec
    tensors = {key: tensor[0] for key, tensor in spec.split(vector.cpu().double()[None]).items()}
    return increment_norms({stack: spec.terms(tensors, stack) for stack in spec.factors}, spec.slices, adapter.scale)
