"""What FacT adapts when the user names nothing: the linear layers of the transformer blocks, found by structure."""

import re
from collections import Counter
from collections.abc import Iterable

from torch import nn
from transformers import PreTrainedModel

from .linears import find_linears, walk

# Linear layers with a side below this share of the block's width do not carry the token stream: position-bias MLPs,
# gates and routers.
MIN_SHARE_OF_WIDTH = 1 / 16


def is_block(module: nn.Module) -> bool:
    """Whether a module contains a normalisation layer and at least two linear layers, as transformer blocks do."""
    has_norm = any("norm" in type(child).__name__.lower() for _, child in walk(module))
    return has_norm and len(find_linears(module)) >= 2


def stack_name(name: str) -> str:
    """A name without its numbers, in which alone the stages and blocks of a backbone differ."""
    return re.sub(r"\d+", "*", name)


def find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """The repeated transformer blocks of a model by name.

    These are the members of the innermost lists of modules that satisfy `is_block` and whose class repeats in the list
    (some models alternate two classes). Of a list of stages, only the lists of blocks inside its stages count, so that
    patch merging between the stages is left out. Blocks that make up a head are left out too, see `drop_heads`.
    """
    lists = {
        name: dict(module.named_children())
        for name, module in walk(model)
        if isinstance(module, (nn.ModuleList, nn.Sequential))
    }
    count = Counter((stack_name(name), type(member)) for name, members in lists.items() for member in members.values())
    candidates = {
        f"{name}.{index}": member
        for name, members in lists.items()
        for index, member in members.items()
        if (count[stack_name(name), type(member)] > 1 or len(members) == 1) and is_block(member)
    }
    innermost = {
        name: block
        for name, block in candidates.items()
        if not any(other.startswith(f"{name}.") for other in candidates)
    }
    return drop_heads(model, innermost)


def drop_heads(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, nn.Module]:
    """`blocks` without stacks of blocks that are narrower and have fewer weights than another stack of their model.

    Examples are SAM's mask decoder, the decoder of a masked autoencoder and the predictor of V-JEPA: small transformers
    on top of the pretrained one that serve a task or pre-training only. A stack inside a `PreTrainedModel` of its own,
    such as a tower of CLIP or Whisper's encoder, is compared only with stacks of that model.
    """
    named_modules = [("", model), *((f"{name}.", module) for name, module in walk(model))]
    submodels = [prefix for prefix, module in named_modules if isinstance(module, PreTrainedModel)]

    def stack_of(name: str) -> tuple[str, str]:
        return max(filter(name.startswith, submodels), key=len, default=f"{name}."), stack_name(name)

    widths: Counter[tuple[str, str]] = Counter()
    weights: Counter[tuple[str, str]] = Counter()
    for name, block in blocks.items():
        shapes = find_linears(block).values()
        widths[stack_of(name)] = max(widths[stack_of(name)], stream_width(shapes))
        weights[stack_of(name)] += sum(in_features * out_features for in_features, out_features in shapes)
    heads = {
        stack
        for stack in widths
        for other in widths
        if other[0].startswith(stack[0]) and widths[stack] < widths[other] and weights[stack] < weights[other]
    }
    return {name: block for name, block in blocks.items() if stack_of(name) not in heads}


def stream_width(shapes: Iterable[tuple[int, int]]) -> int:
    """Width of the token stream of a block: the side most common among its linear layers."""
    return Counter(side for shape in shapes for side in shape).most_common(1)[0][0]


def token_linears(block: nn.Module, name: str) -> dict[str, tuple[int, int]]:
    """The linear layers of one block that carry the token stream.

    The linear layers of one parent module belong to the stream if one of them reads or writes its width, except layers
    that are much narrower. A layer directly inside the block that widens a narrower input to the block's width does not
    belong either: Hiera has one on the shortcut into a new stage, as part of its patch merging.
    """
    linears = find_linears(block, name)
    width = stream_width(linears.values())
    parents = {layer.rpartition(".")[0] for layer, shape in linears.items() if width in shape}
    written = {out_features for _, out_features in linears.values()}

    def carries_stream(layer: str, in_features: int, out_features: int) -> bool:
        parent = layer.rpartition(".")[0]
        enters_stage = parent == name and in_features < out_features == width and in_features not in written
        return parent in parents and min(in_features, out_features) >= width * MIN_SHARE_OF_WIDTH and not enters_stage

    return {layer: shape for layer, shape in linears.items() if carries_stream(layer, *shape)}


def find_block_linears(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shapes (in_features, out_features) of the linear layers inside the repeated blocks of `model`, by name."""
    blocks = find_blocks(model)
    return {layer: shape for name, block in blocks.items() for layer, shape in token_linears(block, name).items()}
