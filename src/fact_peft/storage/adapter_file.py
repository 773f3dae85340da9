"""The folder of an adapter: is its file whole, checked before anything is done with it; and how one is written."""

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor


def write_adapter(folder: str | os.PathLike[str], config: PeftConfig, state_dict: Mapping[str, Tensor]) -> None:
    """Save an adapter of any method as ``PeftModel.from_pretrained`` loads it, without a model at hand."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    tensors = {name: value.detach().contiguous() for name, value in state_dict.items()}
    save_file(tensors, Path(folder, SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
    config.save_pretrained(str(folder))


def check_adapter_folder(folder: Path) -> None:
    """Refuse a local adapter folder whose weights are damaged; a folder without any, or a Hub id, passes.

    Args:
        folder: Where ``adapter_config.json`` lies.

    Raises:
        ValueError: If the file is cut off, carries another name, or holds numbers that are not finite.
    """
    file = folder / SAFETENSORS_WEIGHTS_NAME
    if file.is_file():
        check_adapter_file(file)
    elif folder.is_dir() and not (folder / WEIGHTS_NAME).is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if others:
            raise ValueError(
                f"{folder} has no {SAFETENSORS_WEIGHTS_NAME} but {', '.join(others)}: "
                f"the adapter file was probably renamed; call it {SAFETENSORS_WEIGHTS_NAME} again."
            )


def check_adapter_file(file: Path) -> None:
    """Read every tensor of a safetensors file once; adapters are kilobytes.

    Raises:
        ValueError: If the file cannot be read to its end or holds numbers that are not finite.
    """
    try:
        with safe_open(file, framework="pt") as tensors:
            broken = [key for key in tensors.keys() if not torch.isfinite(tensors.get_tensor(key)).all()]
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a whole safetensors file ({error}): "
            "the copy or the save was probably cut off; save or download the adapter again."
        ) from error
    if broken:
        raise ValueError(
            f"{file} holds NaN or infinity in {', '.join(broken)}: training probably diverged; "
            "go back to an earlier checkpoint, or train with a smaller learning rate or scale."
        )
