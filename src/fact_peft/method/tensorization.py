"""Which slices of which stack each linear layer owns. Pure bookkeeping on names and shapes, no tensors.

FacT stacks the weight increments of a network into one tensor of equal slices and factorizes that tensor. A weight of
``in = a * d`` inputs and ``out = b * d`` outputs is cut into ``a * b`` slices of ``d x d``; all slices of one width
``d``, from whatever layer, form one stack. A ViT has one width, hence one stack; Swin has one per stage (the paper's
"partitioned tensorization"). A weight whose sides do not divide is a single rectangular slice, stacked with all others
of its shape.

The order of the slices in a stack is the order of the layers in the model, and within a layer row-major over
(input block, output block).
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from types import MappingProxyType

# More than any model has. What a few characters of a layout can list would fill the memory.
MAX_LAYERS = 100_000


@dataclass(frozen=True)
class Slices:
    """The slices of one linear layer.

    Attributes:
        stack: Name of the stack that holds them, the shape of its slices, such as ``"768x768"``.
        in_width: Inputs of one slice.
        out_width: Outputs of one slice.
        first: Position of the layer's first slice in the stack.
        num_in_blocks: How many slices lie side by side along the layer's input (the ``a`` of ``in = a * d``).
        num_out_blocks: The same along the output (the ``b`` of ``out = b * d``).
    """

    stack: str
    in_width: int
    out_width: int
    first: int
    num_in_blocks: int
    num_out_blocks: int

    @property
    def count(self) -> int:
        return self.num_in_blocks * self.num_out_blocks

    @property
    def in_features(self) -> int:
        return self.num_in_blocks * self.in_width

    @property
    def out_features(self) -> int:
        return self.num_out_blocks * self.out_width


def slice_shape(in_features: int, out_features: int) -> tuple[int, int]:
    """Shape (inputs, outputs) of the slices of a linear layer: square where its sides divide, else its own."""
    short, long = sorted((in_features, out_features))
    return (short, short) if long % short == 0 else (in_features, out_features)


def tensorize(linear_shapes: Mapping[str, tuple[int, int]]) -> dict[str, Slices]:
    """Give every linear layer its slices.

    Args:
        linear_shapes: (in_features, out_features) by layer name, in the order of the model.

    Returns:
        The slices by layer name, in the same order.
    """
    stack_sizes: dict[str, int] = {}
    slices = {}
    for name, (in_features, out_features) in linear_shapes.items():
        in_width, out_width = slice_shape(in_features, out_features)
        stack = f"{in_width}x{out_width}"
        slices[name] = Slices(
            stack=stack,
            in_width=in_width,
            out_width=out_width,
            first=stack_sizes.get(stack, 0),
            num_in_blocks=in_features // in_width,
            num_out_blocks=out_features // out_width,
        )
        stack_sizes[stack] = slices[name].first + slices[name].count
    return slices


@lru_cache(maxsize=8)
def slices_of(layout: tuple[str, ...]) -> Mapping[str, Slices]:
    """The slices by layer name of a layout that `describe_layout` wrote; kept, since thousands of adapters share one.

    Raises:
        ValueError: As `read_layout`.
    """
    return MappingProxyType(tensorize(read_layout(layout)))


def stack_sizes(slices: Iterable[Slices]) -> dict[str, int]:
    """Number of slices in each stack."""
    sizes: dict[str, int] = {}
    for owned in slices:
        sizes[owned.stack] = sizes.get(owned.stack, 0) + owned.count
    return sizes


def split_at_block(name: str) -> tuple[str, str, str]:
    """Cut a layer's name ``"<container>.<index>.<path>"`` at its last index that has a path behind it.

    Returns:
        Container, index and path; of a layer outside all blocks container and index are empty.
    """
    match = re.fullmatch(r"(.*)\.(\d+)\.(.*?\D.*)", f".{name}")
    container, index, path = match.groups() if match else ("", "", f".{name}")
    return container[1:], index, path.removeprefix(".")


def describe_layout(linear_shapes: Mapping[str, tuple[int, int]]) -> list[str]:
    """Write down which layers a set of stacks was built from, in order and compactly.

    Equal blocks in a row share one line, so twelve blocks of a ViT read
    ``"vit.layers.0-11: attention.q_proj 768x768, ..., mlp.fc1 768x3072, mlp.fc2 3072x768"``. Two models get the same
    description exactly when every slice belongs to the same layer in both; `read_layout` takes it back.
    """
    located = []
    for name, (in_features, out_features) in linear_shapes.items():
        container, index, path = split_at_block(name)
        located.append((container, index, f"{path} {in_features}x{out_features}"))
    blocks = [
        (container, index, ", ".join(layer for _, _, layer in layers))
        for (container, index), layers in groupby(located, key=lambda item: item[:2])
    ]

    lines: list[str] = []
    start = 0
    for end, (container, index, layers) in enumerate(blocks, start=1):
        follows = end < len(blocks) and index != "" and blocks[end] == (container, str(int(index) + 1), layers)
        if follows:
            continue
        first = blocks[start][1]
        indices = first if first == index else f"{first}-{index}"
        where = ".".join(part for part in (container, indices) if part)
        lines.append(f"{where}: {layers}" if where else layers)
        start = end
    return lines


def read_layout(lines: Iterable[str]) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) by layer name, in order, of a layout that `describe_layout` wrote.

    Raises:
        ValueError: If a line is of another form, a layer is listed twice, or there are more than `MAX_LAYERS`.
    """
    linear_shapes: dict[str, tuple[int, int]] = {}
    for line in lines:
        where, _, layers = line.rpartition(": ")
        located = re.fullmatch(r"(?:(.*)\.)?([0-9]{1,9})(?:-([0-9]{1,9}))?", where, re.DOTALL)
        shaped = [
            re.fullmatch(r"(.+) ([1-9][0-9]{0,8})x([1-9][0-9]{0,8})", layer, re.DOTALL) for layer in layers.split(", ")
        ]
        if (where and not located) or not all(shaped):
            raise ValueError(
                f"layout has the line {line[:200]!r}, which is not of the form 'layers.0-11: q_proj 768x768, "
                "fc1 768x3072'; take the layout from where the adapter was saved, or leave it None for a new adapter."
            )
        container, first, last = located.groups() if located else ("", "", "")
        blocks = range(int(first), int(last or first) + 1) if first else [""]
        if len(linear_shapes) + len(blocks) * len(shaped) > MAX_LAYERS:
            raise ValueError(
                f"layout has the line {line[:200]!r} and so more than {MAX_LAYERS:,} layers, which no model has; take "
                "the layout from where the adapter was saved, or leave it None for a new adapter."
            )
        for block in blocks:
            for path, in_features, out_features in (match.groups() for match in shaped if match):
                name = ".".join(part for part in (container, str(block), path) if part)
                if name in linear_shapes:
                    raise ValueError(f"layout lists {name!r} twice; take the layout from where the adapter was saved.")
                linear_shapes[name] = (int(in_features), int(out_features))
    return linear_shapes
