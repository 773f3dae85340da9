"""From the layers that a checkpoint of another implementation describes to an adapter.

The readers, one file for each kind of model, take the tensors they know out of a checkpoint and return `SourceLayer`s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..adapter.config import FacTConfig
from ..adapter.names import PREFIX, factor_key
from ..architecture.linears import part_names
from ..method.tensorization import describe_layout, tensorize

Share = Literal["model", "block"]


@dataclass(frozen=True)
class SourceLayer:
    """One linear layer of another implementation: y = x (W + dW), where slice k of dW is s U Sigma_k V^T.

    Attributes:
        in_features: Inputs of the layer.
        out_features: Its outputs.
        U: (d, r), shared by all layers of its stack.
        V: (e, r), shared by all layers of its stack.
        cores: Sigma_k (slices, r, r), row-major over (input block, output block).
        parts: Which of q, k and v have slices; empty if all of the layer has.
    """

    in_features: int
    out_features: int
    U: Tensor
    V: Tensor
    cores: Tensor
    parts: str = ""


def take(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Remove and return a tensor of a checkpoint.

    Raises:
        ValueError: If it is missing.
    """
    if name not in tensors:
        raise ValueError(f"{name} is missing in the checkpoint; was it saved by the code that it is converted from?")
    return tensors.pop(name)


def take_below(tensors: dict[str, Tensor], *modules: str) -> dict[str, Tensor]:
    """Remove and return all tensors of some modules."""
    return {name: tensors.pop(name) for name in list(tensors) if name.partition(".")[0] in modules}


def cores_of(weight: Tensor) -> Tensor:
    """The cores (a b, r, r) that are kept as the weight (b r, a r) of one ``nn.Linear`` between U and V."""
    rank = min(weight.shape)
    blocks = weight.unflatten(0, (-1, rank)).unflatten(2, (-1, rank))  # (b, outputs, a, inputs)
    return blocks.permute(2, 0, 3, 1).flatten(0, 1)


def assemble(
    layers: Mapping[str, SourceLayer], scale: float, heads: Mapping[str, Tensor], share: Share = "model"
) -> tuple[FacTConfig, dict[str, Tensor]]:
    """The tensor-train adapter with the increments of `layers`.

    Args:
        layers: By their names in the model, in its order.
        scale: The factor s.
        heads: Tensors of the modules trained in full, by name in the model.
        share: As `FacTConfig.share`.

    Returns:
        The config, and the state dict as ``set_peft_model_state_dict`` takes it.

    Raises:
        ValueError: If a factor has a shape that does not fit its layer, or holds NaN or infinity.
    """
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}
    parts = {name: layer.parts for name, layer in layers.items() if layer.parts}
    owners = tensorize(shapes, parts, share)
    rank = next(iter(layers.values())).U.shape[1]
    factors: dict[str, Tensor] = {}
    cores: dict[str, list[Tensor]] = {}
    for name, layer in layers.items():
        owned = owners[name]
        expected = {"U": (owned.in_width, rank), "V": (owned.out_width, rank), "cores": (owned.count, rank, rank)}
        for letter, shape in expected.items():
            factor = getattr(layer, letter)
            if tuple(factor.shape) != shape:
                raise ValueError(f"{name} has {letter} of shape {tuple(factor.shape)}; {shape} is needed.")
            if not torch.isfinite(factor).all():
                raise ValueError(f"{name} has NaN or infinity in {letter}: training probably diverged.")
        factors.update({factor_key(owned.stack, "U"): layer.U, factor_key(owned.stack, "V"): layer.V})
        cores.setdefault(owned.stack, []).append(layer.cores)
    factors.update({factor_key(stack, "Sigma"): torch.cat(slices) for stack, slices in cores.items()})

    def target(name: str) -> str:
        # As a suffix, so that a deeper model is noticed. Blocks with their own U and V may be adapted one by one.
        return ".".join(name.split(".")[-2:]) if share == "model" else name

    config = FacTConfig(
        rank=rank,
        scale=scale,
        init_weights=True,
        fact_dropout=0.1,  # as in all of them
        target_modules={part for name, layer in layers.items() for part in part_names(target(name), layer.parts)},
        share=share,
        modules_to_save=sorted({name.partition(".")[0] for name in heads}),
        layout=describe_layout(shapes, parts),
        inference_mode=True,
    )
    return config, {f"{PREFIX}{name}": value for name, value in {**factors, **heads}.items()}
