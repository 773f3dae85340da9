"""What an adapter file consists of: the factors of its layout, its trained modules, its biases, and nothing else.

Whatever else it held would be copied over frozen weights of the base model, or over another adapter.
"""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..method.decomposition import DECOMPOSITIONS
from ..method.tensorization import stack_sizes
from ..storage.adapter_file import adapter_files, has_nan, is_finite, read_tensors
from ..storage.packing import is_packed, read_preamble
from ..storage.quoting import for_terminal
from .config import FacTConfig, bits_of
from .factors import FACTORS
from .stored import from_storage

PREFIX = "base_model.model."
# What PEFT puts around a layer or a head. Under these names a file reaches what is not the adapter's.
WRAPPED = {"base_layer", "modules_to_save", "original_module"}


def check_saved_adapter(config: FacTConfig, adapter: str, subfolder: str | None = None, **download: Any) -> None:
    """Read the weights that lie beside a saved config, on disk or on the Hub, and refuse what is not as it should be.

    Raises:
        ValueError: If a file is damaged or renamed, or does not hold what the adapter consists of.
    """
    for file in adapter_files(adapter, subfolder, **download):
        check_contents(config, read_tensors(file), str(file))


def saved_tensors(adapter: str, subfolder: str | None = None, **download: Any) -> dict[str, Tensor]:
    """The tensors of a saved adapter, as floats whatever it is stored in; none if it has no file yet."""
    files = adapter_files(adapter, subfolder, **download)[:1]
    return {name: from_storage(name, tensor) for file in files for name, tensor in read_tensors(file)}


def check_contents(config: FacTConfig, tensors: Iterable[tuple[str, Tensor]], source: str) -> None:
    """Refuse tensors that are not those of an adapter.

    Args:
        config: The adapter's, with its layout.
        tensors: Names and tensors as PEFT saves them.
        source: Where they come from, for the message.

    Raises:
        ValueError: If a factor is missing, of another shape, not of floats or not finite; if anything holds NaN, or is
            packed wrongly or in other bits than the config says; or if there are tensors that belong to neither the
            factors, nor `modules_to_save`, nor the biases.
    """
    if config.layout is None:
        raise ValueError(
            f"The config of {source} has no layout, so what its numbers mean is not known: it was probably made by "
            "hand; save the adapter again with save_pretrained."
        )
    layers, missing = config.slices, factor_shapes(config)
    foreign, broken, misfits = [], [], []
    for key, tensor in tensors:
        name = key.removeprefix(PREFIX)
        shape = missing.pop(name, None)
        floats = from_storage(f"{source}: {key}", tensor)
        misfits += packing_misfits(key, tensor, config.storage_of_heads if shape is None else config.storage)
        tensor = floats
        if shape is None and not is_trained(config, layers, name):
            foreign.append(key)
        elif has_nan(tensor) if shape is None else not is_finite(tensor):  # a causal mask among the buffers has -inf
            broken.append(key)
        elif shape not in (None, tuple(tensor.shape)):
            misfits.append(f"{key} is {tuple(tensor.shape)} in the file, {shape} by the config")
        elif shape is not None and not tensor.is_floating_point():
            misfits.append(f"{key} is of {tensor.dtype}, not of floats")
    misfits += [f"{PREFIX}{name} is missing in the file" for name in missing]
    if broken:
        raise ValueError(
            f"{source} holds NaN or infinity in {listed(broken)}: training probably diverged; "
            "go back to an earlier checkpoint, or train with a smaller learning rate or scale."
        )
    if foreign:
        raise ValueError(
            f"{source} holds what is no part of the adapter: {listed(foreign)}. An adapter consists of the factors of "
            f"its layout, its modules_to_save ({config.modules_to_save}) and its biases ({config.bias!r}); anything "
            "else would replace weights of the base model. Take the file from where it was saved; to train an "
            "embedding, name it in modules_to_save."
        )
    if misfits:
        raise ValueError(
            f"{source} does not fit its config (rank={config.rank}, decomposition={config.decomposition!r}): "
            f"{listed(misfits, '; ')}. Take both files from where the adapter was saved."
        )


def packing_misfits(key: str, tensor: Tensor, storage: str | None) -> list[str]:
    """How the bits of a saved tensor differ from the storage of the config.

    Floats are as good in any: a bias, or what could not be rounded.
    """
    bits = bits_of(storage)
    if is_packed(tensor):
        found = read_preamble(tensor)[0]
        return [] if found == bits else [f"{key} is packed as int{found} in the file, {storage} by the config"]
    if bits and tensor.dtype == torch.uint8 and tensor.dim() == 1:
        return [f"{key} is {len(tensor)} bytes that are no packed tensor, {storage} by the config"]
    return []


def factor_shapes(config: FacTConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of the factors of an adapter by their name in its file, less the prefix of PEFT."""
    slices = config.slices
    shapes = DECOMPOSITIONS[config.decomposition].shapes
    widths = {owned.stack: (owned.in_width, owned.out_width) for owned in slices.values()}
    return {
        f"{FACTORS}.{stack}.fact_{letter}": tuple(shape)
        for stack, size in stack_sizes(slices.values()).items()
        for letter, shape in shapes(*widths[stack], size, config.rank).items()
    }


def is_trained(config: FacTConfig, layers: Container[str], name: str) -> bool:
    """Whether a tensor of this name belongs to the modules or biases that an adapter trains beside its factors."""
    *path, last = name.split(".")
    if last == "bias" and config.bias == "all":
        return True
    if last == "bias" and config.bias == "fact_only" and path[-1:] == ["base_layer"]:
        return ".".join(path[:-1]) in layers
    owners = (".".join(path[:end]) for end in range(1, len(path) + 1))
    heads = tuple(config.modules_to_save or [])
    return WRAPPED.isdisjoint(path) and any(owner.endswith(heads) for owner in owners)


def split_off_foreign(
    model: nn.Module, config: FacTConfig, adapter_name: str, tensors: dict[str, Tensor], biases: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """Sort what is to be loaded into an adapter of `model` by whether it belongs there.

    Args:
        model: The model, with the adapter.
        config: The adapter's config there.
        adapter_name: Its name.
        tensors: What is to be loaded, where PEFT has already renamed what belongs to heads.
        biases: Names of the biases of the model that the adapter trains.

    Returns:
        The tensors of the adapter, and the names of the others. Left out of both is what PEFT saves a second time with
        ``bias="all"``: the biases of a head inside its wrapper, and those of the original head.
    """
    own = set(factor_shapes(config)) | {name.removeprefix(PREFIX) for name in biases if not is_copy(name)}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapper = name.removeprefix("_fsdp_wrapped_module.").removeprefix(PREFIX)  # as PEFT does
            own.update(f"{wrapper}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
    belonging = {name: tensor for name, tensor in tensors.items() if name.removeprefix(PREFIX) in own}
    others = tensors.keys() - belonging.keys()
    return belonging, sorted(name for name in others if not (config.bias == "all" and is_copy(name)))


def is_copy(name: str) -> bool:
    """Whether a name is that of a bias as it lies inside the wrapper of a head."""
    *path, last = name.split(".")
    return last == "bias" and not {"modules_to_save", "original_module"}.isdisjoint(path)


def listed(names: list[str], separator: str = ", ", count: int = 6) -> str:
    """The first few names, fit for a terminal."""
    more = f"{separator}... ({len(names)} in all)" if len(names) > count else ""
    return for_terminal(separator.join(names[:count])) + more
