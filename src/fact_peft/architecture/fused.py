"""Layers that make queries, keys and values in one, and whether their outputs are q, k and v one behind the other.

They are known by their names, ``qkv`` as in timm, SAM and Hiera (``Wqkv`` and ``to_qkv`` of others), or as the
``in_proj`` of ``nn.MultiheadAttention``. Some of that name keep the three head by head, or give keys and values fewer
heads; of these no part can be had.
"""

from collections.abc import Mapping

from torch import nn

from ..method.tensorization import PARTS
from .linears import find_linears
from .multihead import IN_PROJ

FUSED = ("qkv", "Wqkv", "to_qkv")
# Attributes by which attentions say that they keep q, k and v head by head: that of MaxViT, that of LeViT and its kin.
HEAD_BY_HEAD = ("head_first", "key_dim")


def part_names(layer: str, parts: str = PARTS) -> list[str]:
    """What parts of a fused layer are called; the name of the layer if `parts` is empty, which stands for all of it."""
    return [f"{layer}.{part}" for part in parts] or [layer]


def is_fused(model: nn.Module, name: str) -> bool:
    """Whether the linear layer `name` makes queries, keys and values in one."""
    parent, _, child = name.rpartition(".")
    return child in FUSED or (child == IN_PROJ and isinstance(model.get_submodule(parent), nn.MultiheadAttention))


def check_order(model: nn.Module, parts: Mapping[str, str]) -> None:
    """Refuse fused layers whose outputs are not q, k and v, one behind the other and equally many.

    Args:
        model: Their model.
        parts: Which parts are wanted, by layer.

    Raises:
        ValueError: If a layer is known to have another order; or if nothing near it reads as many features as a third
            of its outputs, as the projection behind an attention does.
    """
    linears = find_linears(model)
    for name in parts:
        parent = name.rpartition(".")[0]
        attention = model.get_submodule(parent)
        around = parent.rpartition(".")[0]
        read = {shape[0] for layer, shape in linears.items() if layer != name and layer.startswith(around)}
        sign = next((attribute for attribute in HEAD_BY_HEAD if getattr(attention, attribute, False)), None)
        if sign is None and linears[name][1] in {len(PARTS) * width for width in read}:
            continue
        because = f"it has a {sign}" if sign else f"nothing beside it reads a third of its {linears[name][1]} outputs"
        raise ValueError(
            f"{name} of {type(attention).__name__} does not give q, k and v one behind the other ({because}), so that "
            f"{', '.join(part_names(name, parts[name]))} cannot be adapted alone; adapt all of it, or leave it out."
        )
