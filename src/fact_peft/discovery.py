"""What FacT adapts when the user names nothing: the linear layers of the transformer blocks, and the classifier.

Found by structure, since names differ from model to model and from release to release.
"""

from collections import Counter
from collections.abc import Iterator

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn
from transformers.pytorch_utils import Conv1D

# Linear layers with a side below this share of the block's width do not carry the token stream: position-bias MLPs,
# gates and routers.
MIN_SHARE_OF_WIDTH = 1 / 16


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


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Names and modules below `module`, in order, without the insides of what PEFT has wrapped."""
    for name, child in module.named_children():
        full_name = f"{prefix}.{name}" if prefix else name
        yield full_name, child
        if not isinstance(child, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            yield from walk(child, full_name)


def find_linears(module: nn.Module, prefix: str = "") -> dict[str, tuple[int, int]]:
    """Shapes of all linear layers below `module` that are called as modules.

    ``nn.MultiheadAttention`` reads the weight of its output projection without calling it: an adapter there would do
    nothing, so it is left out.
    """
    functional = {
        f"{name}.{child_name}"
        for name, child in walk(module, prefix)
        if isinstance(child, nn.MultiheadAttention)
        for child_name, _ in walk(child)
    }
    shapes = {
        name: linear_shape(child)
        for name, child in walk(module, prefix)
        if name not in functional and not isinstance(child, AuxiliaryTrainingWrapper)
    }
    return {name: shape for name, shape in shapes.items() if shape is not None}


def is_block(module: nn.Module) -> bool:
    """A transformer block has a normalisation layer and at least two linear layers, and is not itself one of them."""
    has_norm = any("norm" in type(child).__name__.lower() for _, child in walk(module))
    return has_norm and len(find_linears(module)) >= 2


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated transformer blocks of a model by name.

    These are the children of the innermost lists whose members are all blocks of one class; a list of stages is passed
    over for the lists of blocks inside its stages, and with it what lies between them, such as patch merging.
    """
    candidates: dict[str, nn.Module] = {}
    for name, module in walk(model):
        if not isinstance(module, (nn.ModuleList, nn.Sequential)):
            continue
        members = {f"{name}.{index}": member for index, member in module.named_children()}
        if len({type(member) for member in members.values()}) == 1 and all(map(is_block, members.values())):
            candidates.update(members)
    return {
        name: block
        for name, block in candidates.items()
        if not any(other.startswith(f"{name}.") for other in candidates)
    }


def token_linears(block: nn.Module, name: str) -> dict[str, tuple[int, int]]:
    """The linear layers of one block that carry the token stream.

    The width of the block is the side most common among its linear layers. A group of linear layers with one parent
    belongs to the stream if one of them reads or writes that width; single layers much narrower do not.
    """
    linears = find_linears(block, name)
    width = Counter(side for shape in linears.values() for side in shape).most_common(1)[0][0]
    parents = {layer.rpartition(".")[0] for layer, shape in linears.items() if width in shape}
    return {
        layer: shape
        for layer, shape in linears.items()
        if layer.rpartition(".")[0] in parents and min(shape) >= width * MIN_SHARE_OF_WIDTH
    }


def find_block_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shapes (in_features, out_features) of the linear layers inside the repeated blocks of `model`, by name.

    Never the head, patch embedding or patch merging, which lie outside the blocks; empty if the model has no blocks.
    """
    blocks = find_blocks(model)
    return {
        layer: shape for name, block in blocks.items() for layer, shape in token_linears(block, name).items()
    }


def find_classifiers(model: nn.Module) -> list[str]:
    """Names of the classification heads of `model`; empty if it is not a classification model.

    On a transformers ``...For...Classification`` model these are the top-level modules outside the backbone with a
    linear layer of `num_labels` outputs; on a timm model what ``get_classifier()`` returns.
    """
    for prefix in ("", "timm_model"):  # the second is the one inside transformers' TimmWrapper
        wrapped = getattr(model, prefix, None) if prefix else model
        if callable(getattr(wrapped, "get_classifier", None)):
            heads = wrapped.get_classifier()
            heads = heads if isinstance(heads, (tuple, list)) else [heads]
            return [
                f"{prefix}.{name}" if prefix else name
                for name, module in walk(wrapped)
                if any(module is head for head in heads) and linear_shape(module) is not None
            ]
    if "Classification" not in type(model).__name__:
        return []
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    heads = []
    for name, child in model.named_children():
        shapes = [linear_shape(child), *find_linears(base_of(child)).values()]
        if not find_blocks(child) and any(shape is not None and shape[1] == num_labels for shape in shapes):
            heads.append(name)
    return heads
