"""What an adapter file may hold: the factors of its layout, its trained modules and its biases.

Any other tensor would be copied over frozen weights of the base model, or over another adapter.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig
from torch import Tensor
from transformers.utils import IMAGE_PROCESSOR_NAME

from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import stack_sizes
from .files import STAGING, read_metadata, read_tensors, weights_files
from .names import PREFIX, factor_key, first_few, is_of_inner_adapter
from .storage import bits_of, from_storage, has_nan, is_finite, is_packed, read_preamble

if TYPE_CHECKING:
    from .config import FacTConfig

# What PEFT puts around a layer or a head. Tensors of these names would be loaded into parts of other adapters or of the
# base model.
WRAPPED = {"base_layer", "modules_to_save", "original_module"}
# The fields of a config that determine what the numbers of a file mean.
MEANING = "rank decomposition scale share layout bias modules_to_save labels storage head_storage".split()

Factors = dict[str, dict[str, Tensor]]  # by stack and paper letter


def factor_shapes(config: FacTConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Shapes of the factors of an adapter, by stack and paper letter."""
    shapes, layers = DECOMPOSITIONS[config.decomposition].shapes, config.slices.values()
    sizes = stack_sizes(layers)
    return {own.stack: shapes(own.in_width, own.out_width, sizes[own.stack], config.rank) for own in layers}


def sort_tensors(
    config: FacTConfig, tensors: Iterable[tuple[str, Tensor]], source: str
) -> tuple[Factors, dict[str, Tensor]]:
    """The factors by stack and paper letter, and all other trained tensors by name, as floats.

    `tensors` have the names that PEFT saves them under; error messages say that they come from `source`.
    """
    if config.layout is None:
        raise ValueError(
            f"The config of {source} has no layout, so what its numbers mean is not known: it was probably made by "
            "hand; save the adapter again with save_pretrained."
        )
    places = {
        factor_key(stack, letter): (stack, letter, shape)
        for stack, shapes in factor_shapes(config).items()
        for letter, shape in shapes.items()
    }
    factors: Factors = defaultdict(dict)
    others: dict[str, Tensor] = {}
    foreign, broken, misfits = [], [], []
    for key, saved in tensors:
        name = key.removeprefix(PREFIX)
        tensor = from_storage(f"{source}: {key}", saved)
        if name in places:
            stack, letter, shape = places.pop(name)
            factors[stack][letter] = tensor
            misfits += packing_misfits(key, saved, config.storage)
            if not tensor.is_floating_point():
                misfits.append(f"{key} is of {tensor.dtype}, not of floats")
            elif not is_finite(tensor):
                broken.append(key)
            elif tuple(tensor.shape) != shape:
                misfits.append(f"{key} is {tuple(tensor.shape)} in the file, {shape} by the config")
        elif is_trained(config, name) or is_of_inner_adapter(name):
            others[name] = tensor
            misfits += packing_misfits(key, saved, config.storage_of_heads)
            if has_nan(tensor):  # a causal mask among the buffers holds infinity
                broken.append(key)
        else:
            foreign.append(key)
    misfits += [f"{PREFIX}{name} is missing in the file" for name in places]
    if broken:
        raise ValueError(
            f"{source} holds NaN or infinity in {first_few(broken)}: training probably diverged; "
            "go back to an earlier checkpoint, or train with a smaller learning rate or scale."
        )
    if foreign:
        raise ValueError(
            f"{source} holds what is no part of the adapter: {first_few(foreign)}. An adapter consists of the factors "
            f"of its layout, its modules_to_save ({config.modules_to_save}) and its biases ({config.bias!r}); anything "
            "else would replace weights of the base model. Take the file from where it was saved; to train an "
            "embedding, name it in modules_to_save."
        )
    if misfits:
        raise ValueError(
            f"{source} does not fit its config (rank={config.rank}, decomposition={config.decomposition!r}): "
            f"{first_few(misfits, separator='; ')}. Take both files from where the adapter was saved."
        )
    return dict(factors), others


def is_trained(config: FacTConfig, name: str) -> bool:
    """Whether a tensor of this name belongs to the modules or biases that an adapter trains, apart from its factors."""
    *path, last = name.split(".")
    if last == "bias" and config.bias == "all":
        return True
    if last == "bias" and config.bias == "fact_only" and path[-1:] == ["base_layer"]:
        return ".".join(path[:-1]) in config.slices
    owners = (".".join(path[:end]) for end in range(1, len(path) + 1))
    heads = tuple(config.modules_to_save or [])
    return WRAPPED.isdisjoint(path) and any(owner.endswith(heads) for owner in owners)


def packing_misfits(key: str, tensor: Tensor, storage: str | None) -> list[str]:
    """How the bits of a saved tensor differ from the storage in the config. Floats fit every storage."""
    bits = bits_of(storage)
    if is_packed(tensor):
        found = read_preamble(tensor)[0]
        return [] if found == bits else [f"{key} is packed as int{found} in the file, {storage} by the config"]
    if bits and tensor.dtype == torch.uint8 and tensor.dim() == 1:
        return [f"{key} is {len(tensor)} bytes that are no packed tensor, {storage} by the config"]
    return []


def check_saved_weights(
    config: FacTConfig, adapter: str, subfolder: str | None = None, **download: Any
) -> frozenset[str] | None:
    """Check the weights beside a saved config, on disk or on the Hub, as `sort_tensors` and `check_pair` do.

    Returned are the names of the trained tensors other than the factors; None if there are no weights.
    """
    others = None
    for file in weights_files(adapter, subfolder, **download):
        check_pair(config, file)
        others = frozenset(sort_tensors(config, read_tensors(file), str(file))[1])
    return others


def digest(config: FacTConfig) -> str:
    """A digest of the fields in `MEANING`."""
    fields = config.to_dict()
    meaning = json.dumps([fields[name] for name in MEANING])
    return hashlib.sha256(meaning.encode()).hexdigest()[:16]


def record(config: FacTConfig, folder: Path) -> dict[str, str]:
    """The digests of the files that are saved with the weights, which the weights record."""
    digests = {"config": digest(config), IMAGE_PROCESSOR_NAME: file_digest(folder / IMAGE_PROCESSOR_NAME)}
    return {name: value for name, value in digests.items() if value}


def file_digest(file: Path) -> str:
    """Digest of the bytes of a file; empty if there is none."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:16] if file.is_file() else ""


def check_pair(config: FacTConfig, file: Path) -> None:
    """Refuse weights beside a config or image processor of another save, as an interrupted save may leave them.

    Weights that PEFT wrote have no record and are not checked.
    """
    recorded, folder = read_metadata(file), file.parent
    if "config" not in recorded:
        return
    other_config = recorded["config"] != digest(config)
    other_processor = recorded.get(IMAGE_PROCESSOR_NAME) not in (None, file_digest(folder / IMAGE_PROCESSOR_NAME))
    rest = rest_of_save(folder, recorded) if other_config or other_processor else None
    # Without the rest of a save, it was the user who changed the image processor.
    if other_config or (other_processor and rest):
        repair = (
            f"Complete the save with: mv '{rest}'/* '{folder}'"
            if rest
            else "Take all files from one save; to change a field of a saved adapter, use Adapter.read, replace, write"
        )
        raise ValueError(
            f"{file} and the files beside it are of two different saves: a save was interrupted, or one file was "
            f"edited or copied alone. {repair}."
        )


def rest_of_save(folder: Path, recorded: Mapping[str, str]) -> Path | None:
    """The folder in which an interrupted save left the other files of the weights in `folder`, or None."""
    for staging in folder.glob(f"{STAGING}*"):
        try:
            config: Any = PeftConfig.from_pretrained(str(staging))
            of_this_save = digest(config) == recorded["config"]
        except (ValueError, OSError, TypeError, KeyError, AttributeError):  # empty, or of another method
            continue
        if of_this_save and file_digest(staging / IMAGE_PROCESSOR_NAME) in ("", recorded.get(IMAGE_PROCESSOR_NAME)):
            return staging
    return None
