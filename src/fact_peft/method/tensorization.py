"""Which slices of which stack each linear layer owns, computed from names and shapes alone.

FacT stacks the weight increments of a network into one tensor of equal slices and factorizes that tensor. A weight of
``in = a * d`` inputs and ``out = b * d`` outputs is cut into ``a * b`` slices of ``d x d``; all slices of one width
``d``, from whatever layer, form one stack. A ViT has one width, hence one stack; Swin has one per stage (the paper's
"partitioned tensorization"). A weight of which neither side divides the other is a single rectangular slice, stacked
with all others of its shape.

The order of the slices in a stack is the order of the layers in the model, and within a layer row-major over
(input block, output block).

A fused layer computes queries, keys and values at once: its outputs are those of q, then of k, then of v. If only some
of the three are adapted, only their output blocks have slices. With ``share="block"`` every transformer block has its
own stacks.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from types import MappingProxyType

# More than any model has. A layout of a few characters could otherwise list more layers than fit into memory.
MAX_LAYERS = 100_000
PARTS = "qkv"  # the parts of a fused layer, in the order of its outputs
WHOLE: Mapping[str, str] = MappingProxyType({})  # every layer is adapted as a whole


@dataclass(frozen=True)
class Slices:
    """The slices of one linear layer."""

    stack: str  # the shape of its slices, such as "768x768"; with share="block" also the block: "768x768@blocks-3"
    in_width: int  # inputs of one slice
    out_width: int  # outputs of one slice
    first: int  # position of the layer's first slice in the stack
    num_in_blocks: int  # slices along the input of the layer, the a of in = a * d
    num_out_blocks: int  # slices along its output, the b of out = b * d
    parts: str = ""  # which of q, k and v have slices, such as "qv"; empty if the whole layer has

    @property
    def out_blocks(self) -> list[int]:
        """The output blocks that have slices, in order."""
        blocks_per_part = self.num_out_blocks // len(PARTS)
        return [j for j in range(self.num_out_blocks) if not self.parts or PARTS[j // blocks_per_part] in self.parts]

    @property
    def count(self) -> int:
        """Number of slices."""
        num_owned = self.num_out_blocks // len(PARTS) * len(self.parts) if self.parts else self.num_out_blocks
        return self.num_in_blocks * num_owned

    @property
    def places(self) -> list[int | None]:
        """Position in the stack of every block, row-major over (input block, output block); None without a slice."""
        position, owned = iter(range(self.first, self.first + self.count)), self.out_blocks
        blocks = product(range(self.num_in_blocks), range(self.num_out_blocks))
        return [next(position) if j in owned else None for _, j in blocks]

    @property
    def in_features(self) -> int:
        return self.num_in_blocks * self.in_width

    @property
    def out_features(self) -> int:
        return self.num_out_blocks * self.out_width


def slice_shape(in_features: int, out_features: int) -> tuple[int, int]:
    """Shape (inputs, outputs) of the slices of a linear layer: square if one side divides the other, else its own."""
    short, long = sorted((in_features, out_features))
    return (short, short) if long % short == 0 else (in_features, out_features)


def tensorize(
    linear_shapes: Mapping[str, tuple[int, int]], parts: Mapping[str, str] = WHOLE, share: str = "model"
) -> dict[str, Slices]:
    """The slices of every linear layer, by layer name.

    `linear_shapes` has (in_features, out_features) by layer name, in the order of the model, and `parts` which of q, k
    and v are adapted, such as ``"qv"``, of each layer that is adapted in part. `share` is that of `FacTConfig`.
    """
    sizes: Counter[str] = Counter()
    blocks: dict[str, str] = {}
    slices = {}
    for name, (in_features, out_features) in linear_shapes.items():
        in_width, out_width = slice_shape(in_features, out_features)
        if name in parts and out_features // out_width % len(PARTS):
            raise ValueError(
                f"{name} has {in_features} inputs and {out_features} outputs, whose slices of {in_width}x{out_width} "
                "do not fall into q, k and v; adapt all of it, or leave it out."
            )
        stack = f"{in_width}x{out_width}"
        if share == "block":
            block = block_of(name)
            stack = f"{stack}@{block.replace('.', '-')}"
            if not block or blocks.setdefault(stack, block) != block:
                raise ValueError(
                    f"share='block' needs layers that lie in blocks of distinct names, but {name} lies in "
                    + (f"{block!r}, hardly another name than {blocks[stack]!r}" if block else "none")
                    + "; leave it out with exclude_modules, or take share='model'."
                )
        slices[name] = Slices(
            stack=stack,
            in_width=in_width,
            out_width=out_width,
            first=sizes[stack],
            num_in_blocks=in_features // in_width,
            num_out_blocks=out_features // out_width,
            parts=parts.get(name, ""),
        )
        sizes[stack] += slices[name].count
    return slices


@lru_cache(maxsize=8)
def slices_of(layout: tuple[str, ...], share: str = "model") -> Mapping[str, Slices]:
    """`tensorize` of a layout from `describe_layout`. It is cached because thousands of adapters share a layout."""
    return MappingProxyType(tensorize(*read_layout(layout), share))


def stack_sizes(slices: Iterable[Slices]) -> dict[str, int]:
    """Number of slices in each stack."""
    sizes: Counter[str] = Counter()
    for owned in slices:
        sizes[owned.stack] += owned.count
    return sizes


def split_at_block(name: str) -> tuple[str, str, str]:
    """Split a layer's name ``"<container>.<index>.<path>"`` at its last index that is followed by a path.

    Container and index are empty if the layer is outside all blocks.
    """
    match = re.fullmatch(r"(.*)\.(\d+)\.(.*?\D.*)", f".{name}")
    container, index, path = match.groups() if match else ("", "", f".{name}")
    return container[1:], index, path.removeprefix(".")


def block_of(name: str) -> str:
    """Name of the transformer block of a layer, read from the layer's own name. Empty if there is none.

    The block's name ends with the last index, as in ``blocks.3.attn.qkv``. Without an index it ends with the last part
    that ends in a digit, as in torchvision's ``encoder_layer_3.self_attention.in_proj``.
    """
    container, index, _ = split_at_block(name)
    numbered = re.fullmatch(r"(.*\d)\.(.*?\D.*)", name)
    return ".".join(part for part in (container, index) if part) or (numbered[1] if numbered else "")


def describe_layout(linear_shapes: Mapping[str, tuple[int, int]], parts: Mapping[str, str] = WHOLE) -> list[str]:
    """Describe which layers are adapted, in order; the arguments are those of `tensorize`.

    Equal consecutive blocks share one line, so twelve blocks of a ViT read
    ``"vit.layers.0-11: attention.q_proj 768x768, ..., mlp.fc1 768x3072, mlp.fc2 3072x768"``. A fused layer of which
    only q and v are adapted reads ``"attn.qkv 768x2304[qv/qkv]"``. Two models get the same description exactly when
    every slice belongs to the same layer in both. `read_layout` is the inverse.
    """
    located = []
    for name, (in_features, out_features) in linear_shapes.items():
        container, index, path = split_at_block(name)
        part = f"[{parts[name]}/{PARTS}]" if name in parts else ""
        located.append((container, index, f"{path} {in_features}x{out_features}{part}"))
    lines: list[str] = []
    first, expected = "", None  # the first block of the current line, and the block that would continue the line
    for (container, index), group in groupby(located, key=lambda item: item[:2]):
        layers = ", ".join(layer for _, _, layer in group)
        if (container, index, layers) == expected:
            lines.pop()
        else:
            first = index
        indices = first if first == index else f"{first}-{index}"
        where = ".".join(part for part in (container, indices) if part)
        lines.append(f"{where}: {layers}" if where else layers)
        expected = (container, str(int(index) + 1), layers) if index else None
    return lines


def read_layout(lines: Iterable[str]) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """The inverse of `describe_layout`: (in_features, out_features) by layer name, in order, and the parts by name."""
    linear_shapes: dict[str, tuple[int, int]] = {}
    parts: dict[str, str] = {}
    for line in lines:
        where, _, layers = line.rpartition(": ")
        located = re.fullmatch(r"(?:(.*)\.)?([0-9]{1,9})(?:-([0-9]{1,9}))?", where, re.DOTALL)
        shaped = [
            re.fullmatch(r"(.+) ([1-9][0-9]{0,8})x([1-9][0-9]{0,8})(?:\[(q|k|v|qk|qv|kv)/qkv\])?", layer, re.DOTALL)
            for layer in layers.split(", ")
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
            for path, in_features, out_features, part in (match.groups() for match in shaped if match):
                name = ".".join(piece for piece in (container, str(block), path) if piece)
                if name in linear_shapes:
                    raise ValueError(f"layout lists {name!r} twice; take the layout from where the adapter was saved.")
                linear_shapes[name] = (int(in_features), int(out_features))
                if part:
                    parts[name] = part
    return linear_shapes, parts
