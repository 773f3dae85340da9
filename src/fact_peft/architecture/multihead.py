"""``nn.MultiheadAttention`` with its q, k and v projections as a linear layer.

It keeps them in one bare parameter and hands that to a function or a kernel, together with the weight of its output
projection, which it never calls. Opened, it has a child `in_proj` in place of the parameter and reads the child's
weight wherever it read its own; so whatever is put around the child, and around `out_proj`, need only have a weight.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

IN_PROJ = "in_proj"


class OpenAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that reads weight and bias of q, k and v from its child `in_proj`."""

    in_proj: nn.Module

    @property
    def in_proj_weight(self) -> Any:  # type: ignore[override]
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Any:  # type: ignore[override]
        return self.in_proj.bias


def can_open(module: nn.Module) -> bool:
    """Whether `module` is an ``nn.MultiheadAttention``, opened or not, with q, k and v in one parameter."""
    return type(module) in (nn.MultiheadAttention, OpenAttention) and bool(module._qkv_same_embed_dim)


def in_proj_shape(attention: nn.MultiheadAttention) -> tuple[int, int]:
    """(in_features, out_features) of the q, k and v projections in one."""
    return attention.embed_dim, 3 * attention.embed_dim


def open_attentions(model: nn.Module, layers: Iterable[str]) -> None:
    """Open, in place, every attention of which `layers` names the `in_proj`."""
    for name in layers:
        parent, _, child = name.rpartition(".")
        attention = model.get_submodule(parent)
        if child == IN_PROJ and type(attention) is nn.MultiheadAttention:
            open_attention(attention)


def open_attention(attention: nn.MultiheadAttention) -> None:
    weight: nn.Parameter = attention.in_proj_weight
    bias: nn.Parameter | None = attention.in_proj_bias
    linear = nn.Linear(*in_proj_shape(attention), bias=bias is not None, device="meta").train(attention.training)
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    del attention.in_proj_weight, attention.in_proj_bias
    out_proj = attention._modules.pop("out_proj")  # to come after in_proj, as q, k and v come before it
    attention.__class__ = OpenAttention
    attention._modules.update({IN_PROJ: linear, "out_proj": out_proj})


def close_attentions(model: nn.Module) -> None:
    """Make every opened attention of `model` what it was."""
    for module in model.modules():
        if isinstance(module, OpenAttention):
            parameters = {f"in_proj_{name}": module.in_proj._parameters[name] for name in ("weight", "bias")}
            del module.in_proj
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
            for name, parameter in parameters.items():
                module.register_parameter(name, parameter)
