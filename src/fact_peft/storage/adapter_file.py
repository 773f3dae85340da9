"""The files of an adapter: read whole before anything is done with them; and how they are written."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .replacing import replacing_files


def write_adapter(folder: str | os.PathLike[str], config: PeftConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Save an adapter of any method as ``PeftModel.from_pretrained`` loads it, without a model at hand."""
    tensors = {name: value.detach().contiguous() for name, value in state_dict.items()}
    with replacing_files(folder) as incoming:
        save_file(tensors, incoming / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
        config.save_pretrained(str(incoming))


def adapter_files(adapter: str, subfolder: str | None = None, **download: Any) -> list[Path]:
    """The files that PEFT or transformers may load the weights of an adapter from; none if there are none yet.

    Args:
        adapter: A local folder, or a name on the Hub, from where the file is downloaded.
        subfolder: Where in there ``adapter_config.json`` lies.
        download: For ``hf_hub_download``.

    Raises:
        ValueError: If a local folder has a safetensors file, but of another name.
    """
    folder = Path(adapter, subfolder or "")
    if (folder / CONFIG_NAME).is_file():
        files = [folder / name for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME) if (folder / name).is_file()]
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if others and not files:
            raise ValueError(
                f"{folder} has no {SAFETENSORS_WEIGHTS_NAME} but {', '.join(others)}: "
                f"the adapter file was probably renamed; call it {SAFETENSORS_WEIGHTS_NAME} again."
            )
        return files
    for name in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
        try:
            return [Path(hf_hub_download(adapter, name, subfolder=subfolder, **download))]
        except EntryNotFoundError:
            continue
    return []


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of an adapter file, one at a time.

    Raises:
        ValueError: If the file cannot be read to its end.
    """
    try:
        if file.name == WEIGHTS_NAME:
            yield from torch.load(file, map_location="cpu", weights_only=True).items()
        else:
            with safe_open(file, framework="pt") as tensors:
                for key in tensors.keys():
                    yield key, tensors.get_tensor(key)
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        kind = "PyTorch" if file.name == WEIGHTS_NAME else "safetensors"
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a whole {kind} file ({error}): "
            "the copy or the save was probably cut off; save or download the adapter again."
        ) from error


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor of any type holds NaN."""
    return tensor.is_floating_point() and bool(as_checkable(tensor).isnan().any())


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor of any type are finite."""
    return not tensor.is_floating_point() or bool(as_checkable(tensor).isfinite().all())


def as_checkable(tensor: Tensor) -> Tensor:
    """The tensor in a type for which torch knows NaN, which it does not for float8."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
