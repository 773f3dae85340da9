"""Labelled images named by text files, one "path label" a line, as VTAB-1K and the few-shot splits are published."""

import shutil
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import hf_hub_download
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

NORMALIZATIONS: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}


def read_list(file: Path, folder: Path, num_classes: int) -> list[tuple[Path, int]]:
    """Image files and labels that `file` lists.

    Args:
        file: The list; the last word of a line is the label, what stands before it a path.
        folder: What the paths are relative to.
        num_classes: Labels are 0 to ``num_classes - 1``.

    Raises:
        FileNotFoundError: If the list or an image it names does not exist.
        ValueError: If the list is empty, a line is not a path and a label, or a label is outside the classes.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing; check the folder, each task has its lists in one of its own.")
    images = []
    for number, line in enumerate(file.read_text().splitlines(), start=1):
        path, _, label = line.strip().rpartition(" ")
        if not path or not label.isdecimal():
            raise ValueError(f"{file}, line {number}: {line!r} is not a path and a label, such as 'images/0.jpg 3'.")
        if int(label) >= num_classes:
            raise ValueError(f"{file}, line {number}: label {label} is outside the classes 0 to {num_classes - 1}.")
        if not (folder / path).is_file():
            raise FileNotFoundError(f"{file}, line {number}: the image {folder / path} does not exist.")
        images.append((folder / path, int(label)))
    if not images:
        raise ValueError(f"{file} is empty; it should have a line 'path label' for each image.")
    return images


class ImageList(Dataset[tuple[Tensor, int]]):
    """Images resized to a square without cropping, uint8 (3, size, size), and their labels."""

    def __init__(self, images: list[tuple[Path, int]], size: int) -> None:
        self.images = images
        self.size = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.images[index]
        try:
            with Image.open(path) as image:
                pixels = image.convert("RGB").resize((self.size, self.size), Image.Resampling.BICUBIC)
        except OSError as error:
            raise OSError(f"{path} cannot be read as an image: {error}") from error
        return torch.from_numpy(np.array(pixels)).permute(2, 0, 1), label


def in_memory(loader: DataLoader) -> tuple[Tensor, Tensor]:
    """All images of a loader, uint8 (N, 3, size, size), and labels (N,)."""
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def normalize(images: Tensor, normalization: str) -> Tensor:
    """float32 pixels from uint8 ones: scaled to [0, 1], then shifted and scaled per channel."""
    mean, std = (torch.tensor(values, device=images.device).view(3, 1, 1) for values in NORMALIZATIONS[normalization])
    return (images.float() / 255 - mean) / std


def from_hub(repo_id: str, archive: str, folder: Path) -> Path:
    """Download an archive of a Hub dataset and extract it into `folder`, once; returns the folder its contents are in.

    An archive that holds one folder and nothing else is entered.
    """
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.unpack_archive(hf_hub_download(repo_id, archive, repo_type="dataset"), part)
        part.rename(folder)
    entries = list(folder.iterdir())
    return entries[0] if len(entries) == 1 and entries[0].is_dir() else folder
