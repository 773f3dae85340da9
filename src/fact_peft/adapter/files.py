"""The files of an adapter: where they are, how they are read, and how a folder gets new ones."""

import json
import os
import pickle
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError
from peft import PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .names import is_hub_id

WEIGHTS_NAMES = (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME)
STAGING = ".saving-"
ABANDONED_AFTER = 3600.0  # seconds, when what a killed process left is removed by the next save


def find_folder(
    source: str | Path, files: list[str], revision: str | None = None, token: str | bool | None = None
) -> Path:
    """The local folder of an adapter: `source` itself, or that into which `files` of a repository are downloaded."""
    folder = Path(source)
    if folder.exists():
        return folder
    if not is_hub_id(str(source)):
        raise ValueError(f"{str(source)!r} is neither a folder nor a name on the Hub.")
    return Path(snapshot_download(str(source), revision=revision, token=token, allow_patterns=files))


def weights_files(adapter: str, subfolder: str | None = None, **download: Any) -> list[Path]:
    """The files from which PEFT or transformers may load the weights of an adapter; empty if there are none yet.

    `adapter` is a folder, or a name on the Hub from which ``hf_hub_download`` fetches the file.
    """
    folder = Path(adapter, subfolder or "")
    if (folder / CONFIG_NAME).is_file():
        files = [folder / name for name in WEIGHTS_NAMES if (folder / name).is_file()]
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if others and not files:
            raise ValueError(
                f"{folder} has no {SAFETENSORS_WEIGHTS_NAME} but {', '.join(others)}: "
                f"the adapter file was probably renamed; call it {SAFETENSORS_WEIGHTS_NAME} again."
            )
        return files
    for name in WEIGHTS_NAMES:
        with suppress(EntryNotFoundError):
            return [Path(hf_hub_download(adapter, name, subfolder=subfolder, **download))]
    return []


def read_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and tensors of an adapter file, one at a time."""
    try:
        if file.name == WEIGHTS_NAME:
            for key, tensor in torch.load(file, map_location="cpu", weights_only=True).items():
                if not isinstance(key, str) or not isinstance(tensor, Tensor):
                    raise RuntimeError(f"{key!r} is not the name of a tensor")
                yield key, tensor
        else:
            with safe_open(file, framework="pt", device="cpu") as tensors:
                for key in tensors.keys():
                    yield key, tensors.get_tensor(key)
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError, pickle.UnpicklingError) as error:
        kind = "PyTorch" if file.name == WEIGHTS_NAME else "safetensors"
        raise ValueError(
            f"{file} ({file.stat().st_size} bytes) is not a whole {kind} file ({error}): "
            "the copy or the save was probably cut off; save or download the adapter again."
        ) from error


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a safetensors file; empty if it has none or cannot be read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return tensors.metadata() or {}
    except (SafetensorError, OSError):
        return {}


def write_files(
    folder: Path, config: PeftConfig, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write the two files of an adapter of any method, as ``PeftModel.from_pretrained`` loads them."""
    contiguous = {name: value.detach().contiguous() for name, value in tensors.items()}
    file = folder / SAFETENSORS_WEIGHTS_NAME
    save_file(contiguous, file, metadata={"format": "pt", **(metadata or {})})
    sort_metadata(file)
    config.save_pretrained(str(folder))


def sort_metadata(file: Path) -> None:
    """Sort the metadata of a file, which safetensors writes in random order, so that equal adapters are equal files."""
    with file.open("r+b") as opened:
        size = int.from_bytes(opened.read(8), "little")
        header = json.loads(opened.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        opened.seek(8)
        opened.write(text.ljust(size))


@contextmanager
def replacing_files(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a new folder to write files into; when the block ends, each replaces the file of its name in `folder`.

    All files are written before the first of them is renamed, and the config is renamed last. A process that is killed
    before the first rename leaves the old files. Between two renames it leaves files of two saves, which `check_pair`
    detects. Several processes may save at once, since each writes into a folder of its own.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    for abandoned in Path(folder).glob(f"{STAGING}*"):
        with suppress(FileNotFoundError):  # another process has finished
            if time.time() - abandoned.stat().st_mtime > ABANDONED_AFTER:
                shutil.rmtree(abandoned, ignore_errors=True)
    staging = Path(mkdtemp(prefix=STAGING, dir=folder))
    try:
        yield staging
        names = sorted((path.name for path in staging.iterdir()), key=lambda name: (name == CONFIG_NAME, name))
        for name in names:
            flush(staging / name)
        for name in names:
            os.replace(staging / name, Path(folder, name))
        flush(Path(folder))
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk; on Windows only files can be flushed."""
    if path.is_dir() and os.name == "nt":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
