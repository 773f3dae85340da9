"""A look at an adapter without its base model: what it holds, its bytes on disk, and where in the network it acts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..adapter.adapter import Adapter
from ..adapter.config import FacTConfig
from ..adapter.names import for_terminal
from ..adapter.validation import PREFIX
from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import split_at_block

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class TaskBytes:
    """Bytes that a task takes on disk, in the two files that an adapter is loaded from.

    Attributes:
        factors: The factors, scales of packed numbers included.
        others: What is trained beside them: the head, biases.
        header: Names and shapes in the safetensors file.
        config: ``adapter_config.json``.
    """

    factors: int
    others: int
    header: int
    config: int

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
    """The adapter in a few lines of text, in which names that somebody else chose are quoted for a terminal.

    Args:
        adapter: The adapter.
        folder: Where it was read from; None leaves out the bytes.
    """
    config = adapter.config
    sizes = {stack: sum(factor.numel() for factor in factors.values()) for stack, factors in adapter.factors.items()}
    shared = "" if config.share == "model" else ", U and V per block"
    lines = [
        f"method      {DECOMPOSITIONS[config.decomposition].title}, rank {config.rank}, scale {config.scaling:g}"
        + shared,
        f"base        {config.base_model_name_or_path or 'not recorded'}",
        f"parameters  {adapter.num_factor_parameters:,} in the factors, {adapter.num_other_parameters:,} in the head "
        "and other trained modules",
        f"storage     {storage_in_words(config)}",
    ]
    if folder is not None:
        lines.append(f"bytes       {task_bytes(adapter, folder)}")
    for stack, size in sizes.items():
        count = sum(slices.count for slices in adapter.slices.values() if slices.stack == stack)
        shapes = ", ".join(f"{letter} {list(factor.shape)}" for letter, factor in adapter.factors[stack].items())
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
    """The norms as a map.

    Args:
        norms: Frobenius norms by layer name, as `Adapter.increment_norms` gives them.

    Returns:
        Names of the blocks, names of the matrices, and the norms (blocks, matrices), NaN where a block lacks a matrix
        or a norm is not finite.
    """
    located = {split_at_block(name): norm for name, norm in norms.items()}
    blocks = list(dict.fromkeys((container, index) for container, index, _ in located))
    matrices = list(dict.fromkeys(path for _, _, path in located))
    grid = torch.full((len(blocks), len(matrices)), torch.nan, dtype=torch.float64)
    for (container, index, path), norm in located.items():
        grid[blocks.index((container, index)), matrices.index(path)] = norm
    return [f"{container}.{index}" for container, index in blocks], matrices, grid


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
    axes.set_yticks(
        range(len(blocks)), blocks if len(containers) > 1 else [b.rpartition(".")[2] for b in blocks], parse_math=False
    )
    axes.set_ylabel("block" if len(containers) > 1 else f"block of {containers.pop()}", parse_math=False)
    axes.set_xticks(range(len(matrices)), matrices, rotation=30, ha="right", parse_math=False)
    axes.set_title("Frobenius norm of dW")
    axes.figure.colorbar(picture, ax=axes)


def draw_increments(norms: dict[str, float], file: str | Path) -> None:
    """Save the map of `plot_increments`, in the format of the file's ending, such as ``.png``."""
    from matplotlib.figure import Figure  # wanted for pictures only

    num_blocks = len({split_at_block(name)[:2] for name in norms})
    figure = Figure(figsize=(8, 2 + 0.3 * num_blocks), layout="constrained")
    plot_increments(norms, figure.subplots())
    figure.savefig(file, dpi=150)
