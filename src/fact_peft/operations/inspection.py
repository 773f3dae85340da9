"""A look at a saved adapter without its base model: what is in the folder, and where in the network it acts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ..method.decomposition import DECOMPOSITIONS, core_grid, core_matrix, increment_norm
from ..method.tensorization import Slices, split_at_block
from ..storage.adapter_file import read_tensors
from ..storage.hub import is_hub_id
from ..storage.quoting import for_terminal
from ..tuner.config import FacTConfig
from ..tuner.factors import FACTORS
from ..tuner.stored import from_storage

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class SavedAdapter:
    """What a folder holds.

    Attributes:
        folder: Where it lies.
        config: Its configuration.
        factors: The factors under their paper letters, by stack.
        others: All other trained tensors by name: the head, biases.
    """

    folder: Path
    config: FacTConfig
    factors: dict[str, dict[str, Tensor]]
    others: dict[str, Tensor]

    @property
    def slices(self) -> Mapping[str, Slices]:
        """The slices of every adapted layer, by the layer's name."""
        return self.config.slices


def read_adapter(adapter: str | Path, revision: str | None = None, token: str | bool | None = None) -> SavedAdapter:
    """Read an adapter.

    Args:
        adapter: Its folder, or its name on the Hub, from where it is downloaded.
        revision: Branch, tag or commit of the repository on the Hub.
        token: Hub token.

    Raises:
        ValueError: If it is an adapter of another method, or its file is damaged, renamed or missing.
    """
    folder = Path(adapter)
    if not folder.exists():
        if not is_hub_id(str(adapter)):
            raise ValueError(f"{str(adapter)!r} is neither a folder nor a name on the Hub.")
        files = [CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME]
        folder = Path(snapshot_download(str(adapter), revision=revision, token=token, allow_patterns=files))
    if not (folder / CONFIG_NAME).is_file():
        raise ValueError(f"{folder} has no {CONFIG_NAME}; pass the folder that an adapter was saved in.")
    try:
        config = PeftConfig.from_pretrained(str(folder))  # which checks the adapter file, see registration.py
    except (TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{folder / CONFIG_NAME} is not the config of an adapter ({type(error).__name__}: {error}); take it from "
            "where the adapter was saved."
        ) from error
    if not isinstance(config, FacTConfig):
        raise ValueError(f"{adapter} is not a FacT adapter but one of {config.peft_type}; only FacT's are read here.")
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if not file.is_file():
        raise ValueError(f"{folder} has no {SAFETENSORS_WEIGHTS_NAME}; save the adapter there with save_pretrained.")
    return SavedAdapter(folder, config, *split_tensors(read_tensors(file)))


def split_tensors(tensors: Iterable[tuple[str, Tensor]]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """The factors by stack and paper letter, and all other tensors by name, of what an adapter is saved as.

    As floats, whatever they are stored in.
    """
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    others = {}
    for key, saved in tensors:
        tensor = from_storage(key, saved)
        owner, _, name = key.rpartition(".")
        container, _, stack = owner.rpartition(".")
        if name.startswith("fact_") and container.rpartition(".")[2] == FACTORS:
            factors[stack][name.removeprefix("fact_")] = tensor
        else:
            others[key.removeprefix("base_model.model.")] = tensor
    return dict(factors), others


@dataclass(frozen=True)
class TaskBytes:
    """What a task takes on disk, in bytes: the files that an adapter is loaded from.

    Attributes:
        factors: Of the factors' numbers, scales included.
        others: Of what is trained beside them, the head before all.
        header: Of names and shapes in the safetensors file.
        config: Of adapter_config.json.
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


def task_bytes(folder: Path) -> TaskBytes:
    """What the adapter in a folder takes."""
    file = folder / SAFETENSORS_WEIGHTS_NAME
    factors = others = 0
    for key, tensor in read_tensors(file):
        if ".fact_" in key:
            factors += tensor.nbytes
        else:
            others += tensor.nbytes
    return TaskBytes(factors, others, file.stat().st_size - factors - others, (folder / CONFIG_NAME).stat().st_size)


def storage_in_words(config: FacTConfig) -> str:
    """In what the factors and the head of an adapter are saved."""
    return f"{config.storage or 'as trained'}, head {config.storage_of_heads or 'as trained'}"


def increment_norms(adapter: SavedAdapter) -> dict[str, float]:
    """Frobenius norm of dW, scale included, by layer name. Costs r-sized products only."""
    norms = {}
    for name, slices in adapter.slices.items():
        factors = {letter: factor.double() for letter, factor in adapter.factors[slices.stack].items()}
        cores = DECOMPOSITIONS[adapter.config.decomposition].cores(factors, slices.first, slices.count)
        core = core_matrix(core_grid(cores, slices))
        norms[name] = increment_norm(factors["U"], core, factors["V"], adapter.config.scale)
    return norms


def describe(adapter: SavedAdapter) -> str:
    """The adapter in a few lines of text, in which names that somebody else wrote are quoted for a terminal."""
    config = adapter.config
    sizes = {stack: sum(factor.numel() for factor in factors.values()) for stack, factors in adapter.factors.items()}
    files = {name: (adapter.folder / name).stat().st_size for name in (SAFETENSORS_WEIGHTS_NAME, CONFIG_NAME)}
    shared = "" if config.share == "model" else ", U and V per block"
    lines = [
        f"method      {DECOMPOSITIONS[config.decomposition].title}, rank {config.rank}, scale {config.scale:g}{shared}",
        f"base        {config.base_model_name_or_path or 'not recorded'}",
        f"parameters  {sum(sizes.values()):,} in the factors, "
        f"{sum(tensor.numel() for tensor in adapter.others.values()):,} in what is trained beside them",
        f"storage     {storage_in_words(config)}",
        "bytes       " + ", ".join(f"{size:,} {name}" for name, size in files.items()),
        f"a task      {task_bytes(adapter.folder)}",
    ]
    for stack, size in sizes.items():
        count = sum(slices.count for slices in adapter.slices.values() if slices.stack == stack)
        shapes = ", ".join(f"{letter} {list(factor.shape)}" for letter, factor in adapter.factors[stack].items())
        lines.append(f"stack       {count} slices of {stack}, {size:,} parameters: {shapes}")
    lines += [f"layers      {line}" for line in config.layout or []]
    lines += [f"beside      {name} {list(tensor.shape)}" for name, tensor in adapter.others.items()]
    if config.labels:
        lines.append(f"labels      {len(config.labels)}: {', '.join(config.labels)}")
    norms = increment_norms(adapter)
    if norms:
        least, most = min(norms, key=norms.__getitem__), max(norms, key=norms.__getitem__)
        lines.append(f"||dW||      {norms[least]:.3g} ({least}) to {norms[most]:.3g} ({most})")
    return "\n".join(map(for_terminal, lines))


def increment_map(norms: dict[str, float]) -> tuple[list[str], list[str], Tensor]:
    """The norms as a map.

    Args:
        norms: Frobenius norms by layer name, as `increment_norms` gives them.

    Returns:
        Names of the blocks, names of the matrices, and the norms (blocks, matrices), NaN where a block lacks a matrix.
    """
    located = {split_at_block(name): norm for name, norm in norms.items()}
    blocks = list(dict.fromkeys((container, index) for container, index, _ in located))
    matrices = list(dict.fromkeys(path for _, _, path in located))
    grid = torch.full((len(blocks), len(matrices)), torch.nan)
    for (container, index, path), norm in located.items():
        grid[blocks.index((container, index)), matrices.index(path)] = norm
    return [f"{container}.{index}" for container, index in blocks], matrices, grid


def plot_increments(norms: dict[str, float], axes: Axes) -> None:
    """Draw ||dW|| as a map of blocks (rows) by matrices (columns).

    Args:
        norms: Frobenius norms by layer name, as `increment_norms` gives them.
        axes: Where to; its figure gets a colour bar.
    """
    blocks, matrices, grid = increment_map(norms)
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
