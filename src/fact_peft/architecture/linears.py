"""The linear layers of a model by name and shape, whatever PEFT has wrapped around them.

Some compute queries, keys and values together: layers called ``qkv``, as in timm, SAM and Hiera (``Wqkv`` and
``to_qkv`` elsewhere), and ``nn.MultiheadAttention``. Their outputs are the queries, then the keys, then the values,
unless the attention stores the three head by head or has fewer heads of keys and values. A part of such a layer cannot
be adapted alone.

``nn.MultiheadAttention`` keeps its q, k and v projections in one bare parameter. It passes this parameter to a function
or a kernel, together with the weight of its output projection, which it never calls. `open_attentions` replaces the
parameter by a child `in_proj`, whose weight the attention then reads. Whatever is put around `in_proj` or `out_proj`
therefore only needs an attribute `weight`.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..method.tensorization import PARTS

IN_PROJ = "in_proj"
FUSED = ("qkv", "Wqkv", "to_qkv")
# Attributes of attentions that store q, k and v head by head: in MaxViT, and in LeViT and its relatives.
HEAD_BY_HEAD = ("head_first", "key_dim")


class OpenAttention(nn.MultiheadAttention):
    """``nn.MultiheadAttention`` that reads weight and bias of q, k and v from its child `in_proj`."""

    in_proj: nn.Module

    @property
    def in_proj_weight(self) -> Any:  # type: ignore[override]
        return self.in_proj.weight

    @property
    def in_proj_bias(self) -> Any:  # type: ignore[override]
        return self.in_proj.bias


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside a `PeftModel`; any other model itself."""
    return model.get_base_model() if isinstance(model, PeftModel) else model


def uncompiled(model: nn.Module) -> nn.Module:
    """The model inside one that ``torch.compile`` has returned; any other model itself."""
    compiled: nn.Module = getattr(model, "_orig_mod", model)
    return compiled


def base_of(module: nn.Module) -> nn.Module:
    """The module of the original model below what PEFT has wrapped around it, or the module itself."""
    if isinstance(module, AuxiliaryTrainingWrapper):
        return module.original_module
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear layer, adapted or not; None for any other module."""
    base = base_of(module)
    if isinstance(base, nn.Linear):
        return base.in_features, base.out_features
    # Not the shape of the weight, which may be sharded or quantised.
    return (base.nx, base.nf) if isinstance(base, Conv1D) else None


def walk(module: nn.Module, prefix: str = "", seen: set[nn.Module] | None = None) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules below `module`, in order, without the insides of what PEFT has wrapped.

    As in ``named_modules``, a module at several places has the name of the first.
    """
    seen = set() if seen is None else seen
    for name, child in module.named_children():
        if child in seen:
            continue
        seen.add(child)
        full_name = f"{prefix}.{name}" if prefix else name
        yield full_name, child
        if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from walk(child, full_name, seen)


def replace_everywhere(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Replace modules of `model` wherever they occur, except inside their own replacements."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            replacement = replacements.get(child) if child is not None else None
            if replacement is not None and replacement is not parent:
                setattr(parent, name, replacement)


def find_linears(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, int]]:
    """Shapes of all linear layers below `module`, in order.

    The q, k and v of ``nn.MultiheadAttention`` are one of them, named ``in_proj`` as the layer that
    `open_attentions` makes. An attention with q, k and v of different widths, or a subclass, is left out.
    """
    shapes = {}
    never_called: set[str] = set()
    for name, child in walk(module, prefix):
        if isinstance(child, nn.MultiheadAttention):
            if type(child) in (nn.MultiheadAttention, OpenAttention) and child._qkv_same_embed_dim:
                shapes[f"{name}.{IN_PROJ}"] = child.embed_dim, 3 * child.embed_dim
            else:
                never_called.update(f"{name}.{child_name}" for child_name, _ in walk(child))
        shape = linear_shape(child)
        if shape is not None and name not in never_called and not isinstance(child, AuxiliaryTrainingWrapper):
            shapes[name] = shape
    return shapes


def part_names(layer: str, parts: str = PARTS) -> list[str]:
    """Names of parts of a fused layer; the name of the layer if `parts` is empty, which means all of it."""
    return [f"{layer}.{part}" for part in parts] or [layer]


def is_fused(model: nn.Module, name: str) -> bool:
    """Whether the linear layer `name` computes queries, keys and values together."""
    parent, _, child = name.rpartition(".")
    return child in FUSED or (child == IN_PROJ and isinstance(model.get_submodule(parent), nn.MultiheadAttention))


def check_order(model: nn.Module, parts: Mapping[str, str]) -> None:
    """Refuse to adapt `parts` of fused layers whose outputs are not q, then k, then v, all of one width.

    Raises:
        ValueError: If a layer is known to have another order, or if no layer of its block reads a third of its outputs,
            as the projection behind an attention does.
    """
    linears = find_linears(model)
    for name in parts:
        parent = name.rpartition(".")[0]
        attention = model.get_submodule(parent)
        block = parent.rpartition(".")[0]
        around = f"{block}." if block else ""  # with the dot, since blocks.10 begins with blocks.1
        read = {shape[0] for layer, shape in linears.items() if layer != name and layer.startswith(around)}
        sign = next((attribute for attribute in HEAD_BY_HEAD if getattr(attention, attribute, False)), None)
        if sign is None and linears[name][1] in {len(PARTS) * width for width in read}:
            continue
        because = f"it has a {sign}" if sign else f"no layer near it reads a third of its {linears[name][1]} outputs"
        raise ValueError(
            f"{name} of {type(attention).__name__} does not put out q, then k, then v ({because}), so "
            f"{', '.join(part_names(name, parts[name]))} cannot be adapted alone; adapt all of it, or leave it out."
        )


def open_attentions(model: nn.Module, layers: Iterable[str]) -> None:
    """Open, in place, every attention whose `in_proj` is among the names `layers`."""
    for name in layers:
        parent, _, child = name.rpartition(".")
        attention = model.get_submodule(parent)
        if child != IN_PROJ or type(attention) is not nn.MultiheadAttention:
            continue
        width, bias = attention.embed_dim, attention.in_proj_bias
        linear = nn.Linear(width, 3 * width, bias=bias is not None, device="meta").train(attention.training)
        linear.weight = attention.in_proj_weight
        if bias is not None:
            linear.bias = bias
        del attention.in_proj_weight, attention.in_proj_bias
        out_proj = attention._modules.pop("out_proj")  # put back after in_proj, in the order of computation
        attention.__class__ = OpenAttention
        attention._modules.update({IN_PROJ: linear, "out_proj": out_proj})


def close_attentions(model: nn.Module) -> None:
    """Turn every opened attention of `model` back into what it was."""
    for module in model.modules():
        if isinstance(module, OpenAttention):
            parameters = {f"in_proj_{name}": module.in_proj._parameters[name] for name in ("weight", "bias")}
            del module.in_proj
            module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
            for name, parameter in parameters.items():
                module.register_parameter(name, parameter)
