"""Classification tasks on images: folders of NAME-{train,val,test}.parquet, decoded once."""

import hashlib
import io
import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from datasets import ClassLabel, Features
from PIL import Image
from torch import Tensor

CACHE = Path("outputs") / "frontier" / "images"  # of decoded images
SPLITS = ("train", "val", "test")
GROUPS = ("natural", "specialised", "structured")  # the kinds of VTAB
# Of the tasks at hand; kinds.json in the folder of the tasks, {name: kind}, adds to these and goes before them.
KINDS = {
    **dict.fromkeys(("caltech101", "flowers89", "monkeys10", "dtd10", "chars74k"), "natural"),
    **dict.fromkeys(("rsscn7", "gtsrb", "braintumor", "fsdd-digit", "omniglot-chars", "neu6"), "specialised"),
    **dict.fromkeys(("yaleb-azimuth", "rsscn7-scale", "dsprites-orient"), "structured"),
}


class Labelled(NamedTuple):
    """Images (N, channels, height, width) of bytes and their labels (N,)."""

    images: Tensor
    labels: Tensor

    def __getitem__(self, index: Tensor | slice) -> "Labelled":  # type: ignore[override]
        return Labelled(self.images[index], self.labels[index])


class Task(NamedTuple):
    train: Labelled
    val: Labelled
    test: Labelled
    num_labels: int


def task_names(folder: Path) -> list[str]:
    """Names of the tasks that have all three files in `folder`.

    Raises:
        ValueError: If there is none.
    """
    names = sorted(file.name.removesuffix("-train.parquet") for file in folder.glob("*-train.parquet"))
    complete = [name for name in names if all((folder / f"{name}-{split}.parquet").exists() for split in SPLITS)]
    if not complete:
        raise ValueError(f"{folder} has no task; each needs the files NAME-train, NAME-val and NAME-test.parquet.")
    return complete


def kinds(folder: Path) -> dict[str, str]:
    """The kind of each task by name."""
    file = folder / "kinds.json"
    return {**KINDS, **(json.loads(file.read_text()) if file.exists() else {})}


def read_task(folder: Path, name: str, image_size: int, cache: Path) -> Task:
    """The splits of a task with images resized to a square of `image_size` without cropping.

    Args:
        folder: Of the parquet files, with the columns ``image`` (``{"bytes": ...}``) and ``label``.
        name: Of the task.
        image_size: In pixels.
        cache: Folder where decoded images are kept.

    Raises:
        ValueError: If a label lies outside the classes.
    """
    train, val, test = (decoded(folder / f"{name}-{split}.parquet", image_size, cache) for split in SPLITS)
    label = Features.from_arrow_schema(pq.read_schema(folder / f"{name}-train.parquet"))["label"]
    num_labels = label.num_classes if isinstance(label, ClassLabel) else int(train.labels.max()) + 1
    for split, images in zip(SPLITS, (train, val, test), strict=True):
        if not 0 <= int(images.labels.min()) <= int(images.labels.max()) < num_labels:
            raise ValueError(
                f"{folder / name}-{split}.parquet has the labels {int(images.labels.min())} to "
                f"{int(images.labels.max())}, outside 0 to {num_labels - 1}; check the column label."
            )
    return Task(train, val, test, num_labels)


def decoded(file: Path, image_size: int, cache: Path) -> Labelled:
    """The images of one file, from the cache if they were decoded before."""
    content = hashlib.sha256(file.read_bytes()).hexdigest()[:12]
    kept = cache / f"{file.stem}-{image_size}px-{content}.pt"
    if not kept.exists():
        table = pq.read_table(file, columns=["image", "label"])
        pixels = [decode(cell["bytes"], image_size) for cell in table["image"].to_pylist()]
        images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous()
        kept.parent.mkdir(parents=True, exist_ok=True)
        part = kept.with_suffix(".part")
        torch.save((images, torch.tensor(table["label"].to_pylist())), part)
        part.replace(kept)
    return Labelled(*torch.load(kept))


def decode(encoded: bytes, image_size: int) -> np.ndarray:
    """(size, size, 3) bytes."""
    with Image.open(io.BytesIO(encoded)) as image:
        return np.asarray(image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC))
