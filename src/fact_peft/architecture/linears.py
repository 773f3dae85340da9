"""The linear layers of a model by name and shape, whatever PEFT has wrapped around them."""

from collections.abc import Iterator, Mapping

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

from .multihead import IN_PROJ, can_open, in_proj_shape


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
    """Names and modules below `module`, in order and each once, without the insides of what PEFT has wrapped."""
    seen = set() if seen is None else seen
    for name, child in module.named_children():
        full_name = f"{prefix}.{name}" if prefix else name
        if child in seen:
            continue
        seen.add(child)
        yield full_name, child
        if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from walk(child, full_name, seen)


def replace_everywhere(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put other modules in all places where modules are, except inside the others themselves."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child in replacements and replacements[child] is not parent:
                setattr(parent, name, replacements[child])


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
