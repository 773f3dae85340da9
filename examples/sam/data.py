"""Read and check images with masks for a SAM, and compute a box for every object."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from datasets import Dataset, Image, load_dataset
from rgb import to_rgb
from torch import Tensor
from transformers import SamProcessor

Row = dict[str, Any]  # "image" and "mask", both PIL images
Rows = Sequence[Row] | Dataset


def read_dataset(
    name: str, data_dir: str | None = None, image_column: str = "image", mask_column: str = "mask", seed: int = 0
) -> tuple[Dataset, Dataset]:
    """Rows to train on, and held-out rows. Images with an empty mask are left out.

    Args:
        name: Hub name, folder, or builder such as imagefolder.
        data_dir: Folder of the files for a builder.
        image_column: Column of the images.
        mask_column: Column of the masks.
        seed: Seed of the split if the dataset has no test or validation split, else of the order of the held-out rows.

    Raises:
        ValueError: If a column is missing.
    """
    splits = load_dataset(name, data_dir=data_dir)
    columns = {image_column: "image", mask_column: "mask"}
    features = splits["train"].features
    missing = [name for name in columns if not isinstance(features.get(name), Image)]
    if missing:
        raise ValueError(
            f"{name} has no column of images {' and '.join(map(repr, missing))}; it has {features}. Name the columns "
            "with --image_column and --mask_column."
        )
    splits = splits.select_columns(list(columns)).rename_columns(columns).cast_column("image", Image())
    splits = splits.filter(lambda row: bool(mask_of(row).any()), desc="looking for masks")
    held_out = next((splits[name] for name in ("test", "validation") if name in splits), None)
    if held_out is None:
        parts = splits["train"].train_test_split(0.2, seed=seed)
        return parts["train"], parts["test"]
    return splits["train"], held_out.shuffle(seed=seed)


def at_most(count: int | None, rows: Rows) -> Rows:
    if count is None or count >= len(rows):
        return rows
    return rows.select(range(count)) if isinstance(rows, Dataset) else rows[:count]


def mask_of(row: Row) -> np.ndarray:
    """The mask (height, width) of a row, int32.

    Raises:
        ValueError: If the mask has colours, or another size than the image.
    """
    mask = np.asarray(row["mask"])
    if mask.ndim == 3 and (mask[..., :3] == mask[..., :1]).all():  # grey, stored as colours
        mask = mask[..., 0]
    if mask.shape != row["image"].size[::-1]:
        raise ValueError(
            f"A mask is {mask.shape}, its image {row['image'].size[::-1]} (height, width). A mask needs the size of "
            "its image and one channel: 0 for the background and another number for every object; convert masks that "
            "show objects in colours."
        )
    return mask.astype("int32")


def objects(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers (N,) of the objects in a mask, and their boxes (N, 4) in pixels: left, top, right, bottom."""
    numbers = np.unique(mask[mask != 0])
    places = [np.nonzero(mask == number) for number in numbers]
    boxes = [[x.min(), y.min(), x.max() + 1, y.max() + 1] for y, x in places]
    return numbers, np.array(boxes, dtype=float)


class Batches:
    """Makes batches of images with the same number of boxes each, and the true masks of the objects in the boxes.

    Args:
        processor: Processor of the model, which scales images, boxes and masks.
        boxes_per_image: Number of objects drawn from every image. If it has fewer, some are drawn more than once.
    """

    def __init__(self, processor: SamProcessor, boxes_per_image: int) -> None:
        self.processor = processor
        self.boxes_per_image = boxes_per_image

    def __call__(self, rows: list[Row]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs of the model, and the masks at the size of its output, (images, boxes, height, width)."""
        masks, numbers, boxes = [mask_of(row) for row in rows], [], []
        for mask in masks:
            found, places = objects(mask)
            order = torch.randperm(len(found)).repeat(-(-self.boxes_per_image // len(found)))
            chosen = order[: self.boxes_per_image].numpy()
            numbers.append(found[chosen])
            # Shifted by up to a tenth of their sides, since boxes drawn by people are not exact.
            sides = np.tile(places[chosen, 2:] - places[chosen, :2], 2)
            boxes.append(places[chosen] + sides * (torch.rand(sides.shape).numpy() - 0.5) / 5)
        inputs = self.processor(
            images=[to_rgb(row["image"]) for row in rows],
            segmentation_maps=masks,
            input_boxes=[box.tolist() for box in boxes],
            return_tensors="pt",
        )
        truth = inputs["labels"][:, None] == torch.as_tensor(np.stack(numbers))[:, :, None, None]
        return {"pixel_values": inputs["pixel_values"], "input_boxes": inputs["input_boxes"].float()}, truth.float()
