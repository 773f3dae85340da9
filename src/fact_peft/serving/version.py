"""One adapter as the pool holds it: checked, and never changed. Loading it again makes another version."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..method.decomposition import core_grid, core_matrix, increment_norm
from ..operations.inspection import SavedAdapter, read_adapter, split_tensors
from ..tuner.config import FacTConfig
from .adapter_spec import AdapterSpec, spec_of
from .pooled_model import PooledModel


@dataclass(frozen=True, eq=False)
class Version:
    """What an adapter is beside its numbers, which the pool keeps where there is room.

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


def read(source: Any, revision: str | None, token: str | bool | None) -> SavedAdapter:
    """An adapter from a folder, the Hub, or memory: a config and what `get_peft_model_state_dict` gives.

    Raises:
        ValueError: If `source` is no adapter of FacT.
    """
    if isinstance(source, SavedAdapter):
        return source
    if isinstance(source, (tuple, list)) and len(source) == 2 and isinstance(source[0], FacTConfig):
        return SavedAdapter(Path(), source[0], *split_tensors(source[1].items()))
    if isinstance(source, (str, Path)):
        return read_adapter(source, revision, token)
    raise ValueError(
        f"source is a {type(source).__name__}; pass a folder, a name on the Hub, or a pair of "
        "FacTConfig and state dict."
    )


def checked(name: str, adapter: SavedAdapter, model: PooledModel, dtype: torch.dtype) -> tuple[Version, Tensor]:
    """What the pool keeps of an adapter: the version, and its numbers as one vector in host memory.

    Raises:
        ValueError: If it cannot be pooled; says the adapter and why.
    """
    config = adapter.config
    reasons = list(objections(adapter, model))
    if not reasons:
        heads = {key: tensor for key, tensor in adapter.others.items()}
        shapes = tuple((key, tuple(tensor.shape)) for key, tensor in heads.items())
        spec = spec_of(tuple(config.layout or ()), config.share, config.decomposition, config.rank, shapes)
        tensors = {(stack, letter): t for stack, group in adapter.factors.items() for letter, t in group.items()}
        tensors |= {("", key): tensor for key, tensor in heads.items()}
        reasons += misfits(spec, tensors)
    if not reasons:
        vector = spec.join(tensors, dtype)
        if not torch.isfinite(vector).all():
            reasons.append(f"it holds NaN, infinity, or numbers too large for {dtype}")
    if reasons:
        raise ValueError(f"Adapter {name!r} cannot be pooled: {'; '.join(reasons)}.")
    shape = spec.heads.get(f"{list(model.heads)[-1]}.weight")
    num_labels, labels = (model.num_labels, model.labels) if shape is None else (shape[0], config.labels)
    if labels is not None and len(labels) != num_labels:
        raise ValueError(f"Adapter {name!r} cannot be pooled: it has {len(labels)} labels for {num_labels} logits.")
    return Version(spec, config.scale, labels, num_labels, vector.nbytes), vector


def objections(adapter: SavedAdapter, model: PooledModel) -> list[str]:
    """Why an adapter does not belong on a model, by its names and shapes."""
    config, reasons = adapter.config, []
    if not config.layout:
        return ["its config has no layout, which is settled when an adapter is made and saved with it"]
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


def misfits(spec: AdapterSpec, tensors: dict[tuple[str, str], Tensor]) -> list[str]:
    """How tensors differ from what a spec has."""
    reasons = [f"{stack} {letter} is missing" for stack, letter in spec.shapes.keys() - tensors.keys()]
    reasons += [f"{stack} {letter} is unknown" for stack, letter in tensors.keys() - spec.shapes.keys()]
    return reasons + [
        f"its factor {letter} of {stack} is {list(tensors[stack, letter].shape)} instead of {list(shape)}"
        for (stack, letter), shape in spec.shapes.items()
        if (stack, letter) in tensors and tuple(tensors[stack, letter].shape) != shape
    ]


def increment_norms(version: Version, vector: Tensor) -> dict[str, float]:
    """Frobenius norm of dW, scale included, by layer name."""
    spec = version.spec
    tensors = spec.split(vector.cpu().double()[None])
    terms = {stack: [term[0] for term in spec.terms(tensors, stack)] for stack in spec.factors}
    norms = {}
    for layer, owned in spec.slices.items():
        U, cores, V = terms[owned.stack]
        core = core_matrix(core_grid(cores.narrow(0, owned.first, owned.count), owned))
        norms[layer] = increment_norm(U, core, V, version.scale)
    return norms
