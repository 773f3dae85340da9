"""Inspect an adapter without its base model: its contents, its bytes on disk, and the size of its increments."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from ..adapter.names import PREFIX, for_terminal
from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import block_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TaskBytes:
    """Bytes of the two files of an adapter on disk."""

    factors: int  # scales of packed numbers included
    others: int  # the other trained tensors: head and biases
    header: int  # names and shapes in the safetensors file
    config: int  # adapter_config.json

    @property
    def total(self) -> int:
        return self.factors + self.others + self.header + self.config

    def __str__(self) -> str:
        return (
            f"{self.total:,}: {self.factors:,} factors, {self.others:,} head and others, {self.header:,} names, "
            f"{self.config:,} config"
        )


def task_bytes(adapter: Adapter, folder: Path) -> TaskBytes:
    """The bytes of an adapter in the folder that it was written to."""
    stored = adapter.stored()
    others = sum(stored[f"{PREFIX}{name}"].nbytes for name in adapter.others)
    factors = sum(tensor.nbytes for tensor in stored.values()) - others
    weights, config = (folder / name for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME))
    return TaskBytes(factors, others, weights.stat().st_size - factors - others, config.stat().st_size)


def storage_in_words(config: FacTConfig) -> str:
    """Data types of the factors and of the head on disk."""
    return f"{config.storage or 'as trained'}, head {config.storage_of_heads or 'as trained'}"


def describe(adapter: Adapter, folder: Path | None = None) -> str:
    """Describe an adapter in a few lines of text. Control characters in the names it contains are escaped.

    Args:
        adapter: The adapter.
        folder: Where it was read from; None leaves out the bytes.
    """
    config = adapter.config
    title = DECOMPOSITIONS[config.decomposition].title
    shared = "" if config.share == "model" else ", U and V per block"
    lines = [
        f"method      {title}, rank {config.rank}, scale {config.scaling:g}{shared}",
        f"base        {config.base_model_name_or_path or 'not recorded'}",
        f"parameters  {adapter.num_factor_parameters:,} in the factors, {adapter.num_other_parameters:,} in the head "
        "and other trained modules",
        f"storage     {storage_in_words(config)}",
    ]
    if folder is not None:
        lines.append(f"bytes       {task_bytes(adapter, folder)}")
    for stack, factors in adapter.factors.items():
        count = sum(slices.count for slices in adapter.slices.values() if slices.stack == stack)
        size = sum(factor.numel() for factor in factors.values())
        shapes = ", ".join(f"{letter} {list(factor.shape)}" for letter, factor in factors.items())
        lines.append(f"stack       {count} slices of {stack}, {size:,} parameters: {shapes}")
    lines += [f"layers      {line}" for line in config.layout or []]
    lines += [f"trained     {name} {list(tensor.shape)}" for name, tensor in adapter.others.items()]
    if config.labels:
        lines.append(f"labels      {len(config.labels)}: {', '.join(config.labels)}")
    norms = adapter.increment_norms()
    if norms:
        least, most = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
        lines.append(f"||dW||      {norms[least]:.3g} ({least}) to {norms[most]:.3g} ({most})")
    return "\n".join(map(for_terminal, lines))


def increment_map(norms: dict[str, float]) -> tuple[list[str], list[str], Tensor]:
    """The result of `Adapter.increment_norms` as names of blocks, names of matrices, and norms (blocks, matrices).

    A norm is NaN where a block lacks the matrix.
    """
    located = {(block_of(name), name.removeprefix(f"{block_of(name)}.")): norm for name, norm in norms.items()}
    blocks = list(dict.fromkeys(block for block, _ in located))
    matrices = list(dict.fromkeys(matrix for _, matrix in located))
    grid = torch.full((len(blocks), len(matrices)), torch.nan, dtype=torch.float64)
    for (block, matrix), norm in located.items():
        grid[blocks.index(block), matrices.index(matrix)] = norm
    return blocks, matrices, grid


def plot_increments(norms: dict[str, float], axes: Axes) -> None:
    """Draw ||dW|| as a map of blocks (rows) by matrices (columns).

    Args:
        norms: Frobenius norms by layer name, as `Adapter.increment_norms` gives them.
        axes: Where to draw; its figure gets a colour bar.

    Raises:
        ValueError: If a norm is not finite or too large to be drawn.
    """
    blocks, matrices, grid = increment_map(norms)
    if not torch.tensor(list(norms.values()), dtype=torch.float32).isfinite().all():
        raise ValueError("The increments are too large to be drawn; the factors are probably damaged.")
    picture = axes.imshow(grid.numpy(), aspect="auto", vmin=0)
    containers = {block.rpartition(".")[0] for block in blocks}
    label = "block"
    if len(containers) == 1:
        label, blocks = f"block of {containers.pop()}", [block.rpartition(".")[2] for block in blocks]
    axes.set_yticks(range(len(blocks)), blocks, parse_math=False)
    axes.set_ylabel(label, parse_math=False)
    axes.set_xticks(range(len(matrices)), matrices, rotation=30, ha="right", parse_math=False)
    axes.set_title("Frobenius norm of dW")
    axes.figure.colorbar(picture, ax=axes)


def draw_increments(norms: dict[str, float], file: str | Path) -> None:
    """Save the map of `plot_increments` in the format of the file's suffix, such as ``.png``."""
    from matplotlib.figure import Figure  # not every user of the package has it

    num_blocks = len({block_of(name) for name in norms})
    figure = Figure(figsize=(8, 2 + 0.3 * num_blocks), layout="constrained")
    plot_increments(norms, figure.subplots())
    figure.savefig(file, dpi=150)
