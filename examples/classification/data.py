"""Read, check and prepare datasets of labelled images."""

from collections.abc import Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, load_dataset
from PIL import Image as PILImage
from rgb import to_rgb
from torch import Tensor
from torch.nn import functional as F
from torchvision.transforms import v2
from transformers import AutoImageProcessor, BaseImageProcessor, TrainingArguments
from transformers.utils import logging

MAX_CLASSES = 100_000


@dataclass
class Task:
    """What to train on.

    Attributes:
        labels: Names of the classes.
        several: Whether an image may have several labels.
        weights: Weights of the classes in the loss; None for equal weights.
        splits: Prepared images: train, validation, maybe test, and plain, which is train without augmentation.
    """

    labels: list[str]
    several: bool
    weights: Tensor | None
    splits: dict[str, Dataset]


def read_splits(name: str, data_dir: str | None = None, data_files: Sequence[str] | None = None) -> DatasetDict:
    """The splits train, validation and test of a dataset, as far as it has them.

    Args:
        name: Hub name, folder, or builder such as imagefolder or parquet.
        data_dir: Folder of the files for a builder.
        data_files: Files for a builder, as ``split=path``.

    Raises:
        ValueError: If there is no train split.
    """
    files = dict(file.split("=", 1) for file in data_files) if data_files else None
    splits = load_dataset(name, data_dir=data_dir, data_files=files)
    if "train" not in splits:
        raise ValueError(f"--dataset {name} has no split 'train' but {', '.join(splits)}.")
    return DatasetDict({name: splits[name] for name in ("train", "validation", "test") if name in splits})


def find_columns(features: Features, image_column: str | None, label_column: str | None) -> tuple[str, str]:
    """Names of the image column and the label column.

    Raises:
        ValueError: If a named column does not exist, or none was named and there is not exactly one candidate.
    """
    images = [name for name, feature in features.items() if isinstance(feature, Image)]
    labels = [name for name, feature in features.items() if isinstance(element(feature), ClassLabel)]
    labels = labels or [name for name in ("label", "labels") if name in features]
    columns = []
    for option, given, candidates in (("image_column", image_column, images), ("label_column", label_column, labels)):
        candidates = [name for name in features if name == given] if given else candidates
        if len(candidates) != 1:
            raise ValueError(
                f"--{option} {given or 'was not given'}: the dataset has {len(candidates)} such columns"
                f"{': ' + ', '.join(candidates) if candidates else ''}. Its columns are {dict(features)}; name one of "
                f"them with --{option}."
            )
        columns += candidates
    return columns[0], columns[1]


def element(feature: Any) -> Any:
    """The feature of one label, of a column of labels or of lists of labels."""
    return feature.feature if isinstance(feature, List) else feature


def class_names(train: Dataset, column: str) -> list[str]:
    """Names of the classes from the dataset, or else from the values of its training labels."""
    feature = train.features[column]
    if isinstance(element(feature), ClassLabel):
        return list(element(feature).names)
    rows = [as_list(row) for row in train[column]]
    values = {value for row in rows for value in row} - {None}
    if all(isinstance(value, str) for value in values):
        return sorted(values)
    if not all(isinstance(value, int) for value in values):
        raise ValueError(
            f"Column {column!r} has labels such as {next(value for value in values if not isinstance(value, int))!r}; "
            "number the classes from 0 without gaps, or use strings."
        )
    if values <= {0, 1} and len({len(row) for row in rows}) == 1 and any(len(row) > len({*row}) for row in rows):
        raise ValueError(
            f"The lists in column {column!r} have one 0 or 1 for each class; list the numbers of the classes that an "
            "image has instead, such as [0, 2] for [1, 0, 1]."
        )
    largest = max(values)
    if largest >= MAX_CLASSES:
        raise ValueError(
            f"The largest label in column {column!r} is {largest:,}, so the head would have more than {MAX_CLASSES:,} "
            "classes; number the classes from 0 without gaps, or use strings."
        )
    return [str(label) for label in range(largest + 1)]


def as_list(labels: Any) -> list[Any]:
    """The labels of a row as a list."""
    return labels if isinstance(labels, list) else [labels]


def with_checked_labels(split: str, dataset: Dataset, column: str, names: list[str]) -> Dataset:
    """The dataset with its labels as indices into `names`.

    Raises:
        ValueError: If a label is not one of these classes.
    """
    labels = [(row, label) for row, labels in enumerate(dataset[column]) for label in as_list(labels)]
    known = {*names, *range(len(names))}
    wrong = [(row, label) for row, label in labels if label not in known]
    if wrong:
        raise ValueError(
            f"{len(wrong)} of {len(labels)} labels of split {split!r} are none of the {len(names)} classes of the head "
            f"({', '.join(names[:5])}{', ...' if len(names) > 5 else ''}); the first is {wrong[0][1]!r} in row "
            f"{wrong[0][0]}. Correct or remove these rows; a test split without labels cannot be used."
        )
    target = ClassLabel(names=names)
    return dataset.cast_column(column, List(target) if isinstance(dataset.features[column], List) else target)


def readable(split: str, dataset: Dataset, column: str, choice: str) -> Dataset:
    """The dataset without the images that cannot be decoded. They are listed in a warning.

    Raises:
        ValueError: If there are any and `choice` is ``"stop"``, or no image is left.
    """

    def reason(image: dict[str, Any]) -> str:
        try:
            with PILImage.open(BytesIO(image["bytes"]) if image["bytes"] else image["path"]) as opened:
                to_rgb(opened)
        except Exception as error:  # whatever a decoder may raise on damaged bytes
            return f"{image['path'] or 'image'}: {error}"
        return ""

    encoded = dataset.select_columns([column]).cast_column(column, Image(decode=False))
    checked = encoded.map(
        lambda row: {"reason": reason(row[column])}, remove_columns=[column], desc=f"checking {split}"
    )
    corrupt = {row: reason for row, reason in enumerate(checked["reason"]) if reason}
    if not corrupt:
        return dataset
    listing = "\n  ".join(f"row {row}, {reason}" for row, reason in list(corrupt.items())[:20])
    message = f"{len(corrupt)} of {len(dataset)} images of split {split!r} cannot be read:\n  {listing}"
    if choice == "stop" or len(corrupt) == len(dataset):
        raise ValueError(f"{message}\nRepair or remove them, or train on the others with --corrupt_images skip.")
    logging.get_logger("transformers").warning("%s\nThey are skipped.", message)
    return dataset.select([row for row in range(len(dataset)) if row not in corrupt])


def prepared(
    dataset: Dataset,
    columns: tuple[str, str],
    processor: BaseImageProcessor,
    num_labels: int,
    augment: str = "none",
    mixup: float = 0.0,
    cutmix: float = 0.0,
) -> Dataset:
    """Rows of pixel_values and labels, processed when they are read.

    Args:
        dataset: A dataset with checked labels.
        columns: Names of the image column and the label column.
        processor: Image processor of the model.
        num_labels: Number of outputs of the head.
        augment: ``"crop"`` for a random resized crop and a flip, ``"randaugment"`` for RandAugment in addition.
        mixup: Alpha of mixup, which mixes the images of a batch and their labels; 0 is off.
        cutmix: Alpha of cutmix. If both are on, each batch uses one of them, chosen at random.
    """
    size = processor(PILImage.new("RGB", (64, 64)), return_tensors="pt")["pixel_values"].shape[-2:]
    steps = [v2.RandomResizedCrop(size), v2.RandomHorizontalFlip()] if augment != "none" else []
    steps += [v2.RandAugment()] if augment == "randaugment" else []
    augmented = v2.Compose([v2.Lambda(to_rgb), *steps])
    as_is = {"do_resize": False, "do_center_crop": False} if steps and hasattr(processor, "do_resize") else {}
    mixes = [
        mix(alpha=alpha, num_classes=num_labels) for mix, alpha in ((v2.MixUp, mixup), (v2.CutMix, cutmix)) if alpha
    ]

    def transform(batch: dict[str, list[Any]]) -> dict[str, Any]:
        images = [augmented(image) for image in batch[columns[0]]]
        pixels, labels = processor(images, return_tensors="pt", **as_is)["pixel_values"], batch[columns[1]]
        if isinstance(labels[0], list):
            several = [F.one_hot(torch.tensor(row, dtype=torch.long), num_labels) for row in labels]
            labels = torch.stack([one_hot.sum(0).clamp(max=1).float() for one_hot in several])
        labels = torch.as_tensor(labels)
        if mixes and len(labels) > 1:
            pixels, labels = v2.RandomChoice(mixes)(pixels, labels)
        return {"pixel_values": list(pixels), "labels": list(labels)}

    return dataset.select_columns(list(columns)).cast_column(columns[0], Image()).with_transform(transform)


def balanced_weights(train: Dataset, column: str, num_labels: int) -> Tensor:
    """The inverse frequency of each class; with several labels per image, absences over presences of each label.

    A class without images has the weight 0, and a label of all images counts as absent from one.
    """
    labels = train[column][:]
    if isinstance(train.features[column], List):
        counts = torch.bincount(torch.tensor([label for row in labels for label in set(row)]), minlength=num_labels)
        return (len(labels) - counts).clamp(min=1) / counts.clamp(min=1)
    counts = torch.bincount(torch.tensor(labels), minlength=num_labels)
    return torch.where(counts > 0, len(labels) / num_labels / counts.clamp(min=1), 0.0)


def read_task(splits: dict[str, Dataset], columns: tuple[str, str], args: Any, training: TrainingArguments) -> Task:
    """Check the data and prepare it for the model.

    Args:
        splits: The result of `read_splits`.
        columns: The result of `find_columns`.
        args: The arguments of examples/image_classification.py.
        training: Its seed is used to split off validation images if the dataset has none.
    """
    labels = class_names(splits["train"], columns[1])
    with training.main_process_first(desc="checking the data"):
        for name, split in splits.items():
            split = with_checked_labels(name, split, columns[1], labels)
            splits[name] = readable(name, split, columns[0], args.corrupt_images)
    several = isinstance(splits["train"].features[columns[1]], List)
    if "validation" not in splits:
        parts = splits["train"].train_test_split(
            args.validation_fraction, seed=training.seed, stratify_by_column=None if several else columns[1]
        )
        splits |= {"train": parts["train"], "validation": parts["test"]}
    weights = balanced_weights(splits["train"], columns[1], len(labels)) if args.class_weights else None
    how = (columns, AutoImageProcessor.from_pretrained(args.model), len(labels))
    data = {name: prepared(split, *how) for name, split in {**splits, "plain": splits["train"]}.items()}
    data["train"] = prepared(splits["train"], *how, args.augment or "crop", args.mixup, args.cutmix)
    return Task(labels, several, weights, data)
