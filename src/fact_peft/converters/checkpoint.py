"""Reading what others saved: tensors by name, and never code."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


def read_checkpoint(file: str | os.PathLike[str]) -> dict[str, Any]:
    """The contents of a ``torch.save`` or safetensors file. A pickle that holds more than plain data is refused unread.

    Raises:
        ValueError: If the file is missing, damaged, no mapping of names, or could only be read by running code in it.
    """
    path = Path(file)
    if not path.is_file():
        raise ValueError(f"file={str(file)!r} does not exist; pass the checkpoint that the other code saved.")
    if path.suffix == ".safetensors":
        return dict(load_file(path))
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"{path} cannot be read as tensors alone: it is damaged, or its pickle holds objects of other code, which "
            "is never run here. Where you trust it, load it in the code that made it and save its tensors by name, "
            'such as torch.save(checkpoint["model_state"], ...).'
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}; a mapping from names to tensors is needed.")
    return content


def take(tensors: dict[str, Tensor], name: str) -> Tensor:
    """Remove and return a tensor that must be there.

    Raises:
        ValueError: If it is missing.
    """
    if name not in tensors:
        raise ValueError(f"{name} is missing in the checkpoint; was it saved by the code that it is converted from?")
    return tensors.pop(name)


def take_below(tensors: dict[str, Tensor], *modules: str) -> dict[str, Tensor]:
    """Remove and return all tensors of some modules."""
    return {name: tensors.pop(name) for name in list(tensors) if name.partition(".")[0] in modules}
