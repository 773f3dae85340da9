"""Classification tasks on 32 x 32 colour images, made by rule from photographs (CIFAR-10) and digits (MNIST).

The photographs and digits of the three splits of a task are disjoint. The rules are of the structured kind: what they
ask for is not what the backbone was pretrained on.
"""

import io
from collections.abc import Callable
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Generator, Tensor
from torch.nn.functional import avg_pool2d, pad

from benchmarks.frontier.tasks import Labelled, Task

SIDE = 32
DIGIT = 14  # side of a pasted digit, half of MNIST's
CHANNEL_ORDERS = tuple(permutations(range(3)))


def read_images(file: Path, mode: str) -> Labelled:
    """The images of a parquet file with the columns ``image`` (``{"bytes": ...}``) and ``label``, in a PIL mode."""
    table = pd.read_parquet(file)
    arrays = [np.asarray(Image.open(io.BytesIO(cell["bytes"])).convert(mode)) for cell in table["image"]]
    images = torch.from_numpy(np.stack(arrays))
    images = images.unsqueeze(1) if images.ndim == 3 else images.permute(0, 3, 1, 2)
    return Labelled(images.contiguous(), torch.tensor(table["label"].to_numpy()))


def digit_class(photos: Labelled, digits: Labelled, generator: Generator) -> Labelled:
    """Which digit: the digits alone, padded and in grey."""
    margin = (SIDE - digits.images.shape[-1]) // 2
    return Labelled(pad(digits.images, (margin,) * 4).expand(-1, 3, -1, -1).contiguous(), digits.labels)


def rotation(photos: Labelled, digits: Labelled, generator: Generator) -> Labelled:
    """By how many quarter turns a photograph is rotated."""
    turns = torch.randint(4, (len(photos.labels),), generator=generator)
    rotated = [image.rot90(turn, dims=(1, 2)) for image, turn in zip(photos.images, turns.tolist(), strict=True)]
    return Labelled(torch.stack(rotated), turns)


def channel_order(photos: Labelled, digits: Labelled, generator: Generator) -> Labelled:
    """In which of the six orders the colour channels of a photograph are."""
    orders = torch.randint(len(CHANNEL_ORDERS), (len(photos.labels),), generator=generator)
    permuted = [image[list(CHANNEL_ORDERS[k])] for image, k in zip(photos.images, orders.tolist(), strict=True)]
    return Labelled(torch.stack(permuted), orders)


def paste(photo: Tensor, digit: Tensor, quadrant: int, generator: Generator) -> Tensor:
    """The photograph (3, 32, 32) with a white digit (1, 28, 28), halved in size, somewhere in a quadrant (0-3)."""
    room = SIDE // 2 - DIGIT
    down, right = torch.randint(room + 1, (2,), generator=generator).tolist()
    top, left = SIDE // 2 * (quadrant // 2) + down, SIDE // 2 * (quadrant % 2) + right
    opacity = avg_pool2d(digit.float(), 2) / 255
    pasted = photo.clone()
    window = pasted[:, top : top + DIGIT, left : left + DIGIT]
    window.copy_((window * (1 - opacity) + 255 * opacity).round())
    return pasted


def quadrant(photos: Labelled, digits: Labelled, generator: Generator) -> Labelled:
    """In which quadrant of a photograph a digit is."""
    quadrants = torch.randint(4, (len(photos.labels),), generator=generator)
    which = torch.randint(len(digits.labels), (len(photos.labels),), generator=generator)
    pasted = [
        paste(photo, digits.images[digit], place, generator)
        for photo, digit, place in zip(photos.images, which.tolist(), quadrants.tolist(), strict=True)
    ]
    return Labelled(torch.stack(pasted), quadrants)


def count(photos: Labelled, digits: Labelled, generator: Generator) -> Labelled:
    """How many digits, none to four, are on a photograph, each in a quadrant of its own."""
    counts = torch.randint(5, (len(photos.labels),), generator=generator)
    images = []
    for photo, number in zip(photos.images, counts.tolist(), strict=True):
        for place in torch.randperm(4, generator=generator)[:number].tolist():
            digit = digits.images[torch.randint(len(digits.labels), (), generator=generator)]
            photo = paste(photo, digit, place, generator)
        images.append(photo)
    return Labelled(torch.stack(images), counts)


# What to ask, and how many answers there are.
TASKS: dict[str, tuple[Callable[[Labelled, Labelled, Generator], Labelled], int]] = {
    "mnist": (digit_class, 10),
    "rotation": (rotation, 4),
    "quadrant": (quadrant, 4),
    "count": (count, 5),
    "channels": (channel_order, len(CHANNEL_ORDERS)),
}


def make_task(
    name: str, photos: Labelled, digits: Labelled, test_digits: Labelled, sizes: tuple[int, int, int]
) -> Task:
    """A task with splits of the given sizes (train, val, test), the same at every call.

    Args:
        name: One of `TASKS`.
        photos: At least ``sum(sizes)`` photographs that the backbone has not seen.
        digits: Digits for training and validation.
        test_digits: Digits for the test split.
        sizes: Number of images of the three splits.

    Raises:
        ValueError: If there are too few photographs or digits.
    """
    num_train, num_val, num_test = sizes
    for what, have, need in (
        ("photographs", len(photos.labels), sum(sizes)),
        ("digits", len(digits.labels), num_train + num_val),
        ("test digits", len(test_digits.labels), num_test),
    ):
        if have < need:
            raise ValueError(f"sizes={sizes} need {need} {what}, but there are {have}; ask for smaller splits.")
    generator = torch.Generator().manual_seed(0)
    photos = photos[torch.randperm(len(photos.labels), generator=generator)]
    digits = digits[torch.randperm(len(digits.labels), generator=generator)]
    test_digits = test_digits[torch.randperm(len(test_digits.labels), generator=generator)]
    build, num_labels = TASKS[name]
    held_out = slice(num_train, num_train + num_val)
    train = build(photos[:num_train], digits[:num_train], generator)
    val = build(photos[held_out], digits[held_out], generator)
    test = build(photos[held_out.stop : sum(sizes)], test_digits[:num_test], generator)
    return Task(train, val, test, num_labels)
