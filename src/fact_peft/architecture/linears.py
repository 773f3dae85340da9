"""The linear layers of a model by name and shape, whatever PEFT has wrapped around them.

Some of them make queries, keys and values in one: layers called ``qkv``, as in timm, SAM and Hiera (``Wqkv`` and
``to_qkv`` elsewhere), and the ``in_proj`` of ``nn.MultiheadAttention``. Their outputs are the queries, then the keys,
then the values, unless the attention keeps the three head by head or has fewer heads of keys and values. A part of
such a layer cannot be adapted alone.
"""

from collections.abc import Iterator, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..method.tensorization import PARTS
from .multihead import IN_PROJ, can_open, in_proj_shape

FUSED = ("qkv", "Wqkv", "to_qkv")
# Attributes of attentions that keep q, k and v head by head: in MaxViT, and in LeViT and its relatives.
HEAD_BY_HEAD = ("head_first", "key_dim")


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
    if isinstance(base, Conv1D):
        # The weight itself may be sharded or quantised.
        return base.nx, base.nf
    return None


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
    """Put other modules in all places where modules are, except inside the others themselves."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            replacement = replacements.get(child) if child is not None else None
            if replacement is not None and replacement is not parent:
                setattr(parent, name, replacement)


def find_linears(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, int]]:
    """Shapes of all linear layers below `module`, in order.

    The bare parameter in which ``nn.MultiheadAttention`` has its q, k and v is one of them, under the name of the layer
    that it becomes, ``in_proj``. One with three weights of different widths instead, or a subclass, is left alone.
    """
    shapes = {}
    functional: set[str] = set()
    for name, child in walk(module, prefix):
        if isinstance(child, nn.MultiheadAttention) and not can_open(child):
            functional.update(f"{name}.{child_name}" for child_name, _ in walk(child))
        elif isinstance(child, nn.MultiheadAttention):
            shapes[f"{name}.{IN_PROJ}"] = in_proj_shape(child)
        shape = linear_shape(child)
        if shape is not None and name not in functional and not isinstance(child, AuxiliaryTrainingWrapper):
            shapes[name] = shape
    return shapes


def part_names(layer: str, parts: str = PARTS) -> list[str]:
    """Names of parts of a fused layer; the name of the layer if `parts` is empty, which means all of it."""
    return [f"{layer}.{part}" for part in parts] or [layer]


def is_fused(model: nn.Module, name: str) -> bool:
    """Whether the linear layer `name` makes queries, keys and values in one."""
    parent, _, child = name.rpartition(".")
    return child in FUSED or (child == IN_PROJ and isinstance(model.get_submodule(parent), nn.MultiheadAttention))


def check_order(model: nn.Module, parts: Mapping[str, str]) -> None:
    """Refuse fused layers whose outputs are not the queries, then the keys, then the values, all of one width.

    Args:
        model: Their model.
        parts: Which parts are wanted, by layer.

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
