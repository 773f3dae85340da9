"""The default task of examples/image_classification.py, and the small ViT that it adapts."""

from pathlib import Path

import numpy as np
from classification.data import prepared
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits
from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, ViTImageProcessor


def upright_and_shifted_digits() -> tuple[Dataset, DatasetDict]:
    """900 digits to pretrain on, and inverted and rotated other digits, 40 per class to train and validate on."""
    pixels, labels = load_digits(return_X_y=True)
    pixels = (pixels.reshape(-1, 8, 8) * 15).astype("uint8")
    order = np.random.default_rng(0).permutation(len(labels))

    def dataset(rows: np.ndarray, images: np.ndarray) -> Dataset:
        columns = {"image": [PILImage.fromarray(image) for image in images[rows]], "label": labels[rows]}
        return Dataset.from_dict(columns, Features(image=Image(), label=ClassLabel(names=[*map(str, range(10))])))

    shifted = np.ascontiguousarray(np.rot90(255 - pixels, axes=(1, 2)))
    few = np.concatenate([order[900:][labels[order[900:]] == digit][:40] for digit in range(10)])
    test = np.setdiff1d(order[900:], few)
    return dataset(order[:900], pixels), DatasetDict(train=dataset(few, shifted), test=dataset(test, shifted))


def pretrain(folder: Path, upright: Dataset) -> None:
    """Train a small ViT and save it without its head, with its image processor, unless `folder` already exists."""
    if folder.exists():
        return
    shape = {"image_size": 8, "patch_size": 4, "hidden_size": 64, "intermediate_size": 256, "hidden_act": "relu"}
    model = ViTForImageClassification(ViTConfig(num_hidden_layers=4, num_attention_heads=4, num_labels=10, **shape))
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    recipe = TrainingArguments(
        str(folder.parent),
        num_train_epochs=25,
        per_device_train_batch_size=25,
        learning_rate=1e-3,
        weight_decay=1e-4,
        lr_scheduler_type="cosine",
        warmup_steps=0.1,
        max_grad_norm=1e9,
        save_strategy="no",
        logging_strategy="no",
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        report_to="none",
    )
    images = prepared(upright, ("image", "label"), processor, 10)
    trainer = Trainer(model, recipe, train_dataset=images)
    trainer.train()
    if trainer.is_world_process_zero():
        part = folder.with_suffix(".part")
        model.vit.save_pretrained(part)
        processor.save_pretrained(part)
        part.rename(folder)
    recipe.distributed_state.wait_for_everyone()
