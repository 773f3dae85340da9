"""From the cores of a donor's layers to an adapter: the config and the stacked factors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..adapter.config import FacTConfig
from ..adapter.validation import FACTORS
from ..architecture.fused import part_names
from ..method.tensorization import describe_layout, tensorize

PREFIX = "base_model.model."
Share = Literal["model", "block"]


@dataclass(frozen=True)
class DonatedLayer:
    """One linear layer of a donor: y = x (W + dW), where slice k of dW is s U Sigma_k V^T.

    Attributes:
        in_features: Inputs of the layer.
        out_features: Its outputs.
        U: (d, r), of the stack.
        V: (e, r), of the stack.
        cores: Sigma_k (slices, r, r), row-major over (input block, output block).
        parts: Which of q, k and v have slices, if not all of the layer has.
    """

    in_features: int
    out_features: int
    U: Tensor
    V: Tensor
    cores: Tensor
    parts: str = ""


def cores_of(weight: Tensor) -> Tensor:
    """The cores (a b, r, r) that a donor keeps in the weight (b r, a r) of one ``nn.Linear`` between U and V."""
    rank = min(weight.shape)
    blocks = weight.unflatten(0, (-1, rank)).unflatten(2, (-1, rank))  # (b, outputs, a, inputs)
    return blocks.permute(2, 0, 3, 1).flatten(0, 1)


def assemble(
    layers: Mapping[str, DonatedLayer], scale: float, heads: Mapping[str, Tensor], share: Share = "model"
) -> tuple[FacTConfig, dict[str, Tensor]]:
    """The tensor-train adapter with the increments of `layers`.

    Args:
        layers: By their names in the model, in its order.
        scale: The factor s.
        heads: What was trained in full, by name in the model.
        share: Whether all layers have the same U and V, or those of one block.

    Returns:
        The config, and the state dict as ``set_peft_model_state_dict`` takes it.

    Raises:
        ValueError: If a factor has a shape that does not fit its layer, or holds NaN or infinity.
    """
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    parts = {name: layer.parts for name, layer in layers.items() if layer.parts}
    slices = tensorize(shapes, parts, share)
    rank = next(iter(layers.values())).U.shape[1]
    factors: dict[str, Tensor] = {}
    cores: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        owned = slices[name]
        expected = {"U": (owned.in_width, rank), "V": (owned.out_width, rank), "cores": (owned.count, rank, rank)}
        for letter, shape in expected.items():
            factor = getattr(layer, letter)
            if tuple(factor.shape) != shape:
                raise ValueError(f"{name} has {letter} of shape {tuple(factor.shape)}; {shape} is needed.")
            if not torch.isfinite(factor).all():
                raise ValueError(f"{name} has NaN or infinity in {letter}: training probably diverged.")
        stack = f"{PREFIX}{FACTORS}.{owned.stack}"
        factors.update({f"{stack}.fact_U": layer.U, f"{stack}.fact_V": layer.V})
        cores.setdefault(stack, []).append(layer.cores)
    factors.update({f"{stack}.fact_Sigma": torch.cat(parts) for stack, parts in cores.items()})

    def target(name: str) -> str:
        # As a suffix, so that a deeper model is noticed; but blocks that share nothing may be adapted one by one.
        return ".".join(name.split(".")[-2:]) if share == "model" else name

    config = FacTConfig(
        rank=rank,
        scale=scale,
        init_weights=True,
        fact_dropout=0.1,  # of all donors
        target_modules={part for name, layer in layers.items() for part in part_names(target(name), layer.parts)},
        share=share,
        modules_to_save=sorted({name.partition(".")[0] for name in heads}),
        layout=describe_layout(shapes, parts),
        inference_mode=True,
    )
    return config, {**factors, **{f"{PREFIX}{name}": value for name, value in heads.items()}}
