"""What the service serves without arguments: a small ViT and three adapters, trained on scikit-learn's digits.

Training takes half a minute on two CPU cores. It is done once, and the results are kept in the folder.
"""

import sys
from pathlib import Path

import torch
from peft import get_peft_model
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor
from transformers import PreTrainedModel, ViTConfig, ViTForImageClassification, ViTImageProcessor, set_seed
from transformers.utils import logging

from fact_peft import FacTConfig, save_image_classifier

sys.path.append(str(Path(__file__).parents[1]))
from quickstart import accuracy, train

NUM_TRAINING = 1300
# For every adapter, its class names and the class of each digit from 0 to 9.
TASKS = {
    "digit": ("zero one two three four five six seven eight nine".split(), list(range(10))),
    "parity": (["even", "odd"], [0, 1] * 5),
    "holes": (["no hole", "one hole", "two holes"], [1, 0, 0, 0, 0, 0, 1, 0, 2, 1]),
}


def prepare(folder: Path, epochs: int = 10) -> Path:
    """Make ``backbone/``, ``adapters/`` and ``images/`` to try them with in `folder`, unless they are there.

    Returns:
        The folder of the backbone.
    """
    if (folder / "images").is_dir():
        return folder / "backbone"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(0)
    torch.set_num_threads(1)
    pictures, digits = draw()
    processor = ViTImageProcessor(
        size={"height": 16, "width": 16}, do_convert_rgb=False, image_mean=[0.5], image_std=[0.5]
    )
    images = processor(pictures, return_tensors="pt")["pixel_values"]
    vit = pretrained(images[:NUM_TRAINING], digits[:NUM_TRAINING], epochs)
    vit.save_pretrained(folder / "backbone")
    processor.save_pretrained(folder / "backbone")
    for name, (labels, classes) in TASKS.items():
        base = ViTForImageClassification.from_pretrained(
            folder / "backbone", num_labels=len(labels), ignore_mismatched_sizes=True
        )
        model = get_peft_model(base, FacTConfig(rank=4, labels=labels))
        targets = torch.tensor(classes)[digits]
        train(model, images[:NUM_TRAINING], targets[:NUM_TRAINING], 1e-2, epochs, 50, name)
        save_image_classifier(model, processor, folder / "adapters" / name)
        right = accuracy(model, images[NUM_TRAINING:], targets[NUM_TRAINING:])
        print(f"Trained the adapter {name!r}: {right:.1f} % of {len(images) - NUM_TRAINING} other digits are right.")
    (folder / "images").mkdir()
    for index in range(NUM_TRAINING, NUM_TRAINING + 10):
        pictures[index].save(folder / "images" / f"{digits[index]}-{index}.png")
    return folder / "backbone"


def draw() -> tuple[list[Image.Image], Tensor]:
    """Images of the digits, light on dark, enlarged to 64 x 64 pixels, and their labels."""
    pixels, digits = load_digits(return_X_y=True)
    small = (pixels.reshape(-1, 8, 8) / 16 * 255).astype("uint8")
    return [Image.fromarray(image).resize((64, 64), Image.Resampling.BICUBIC) for image in small], torch.tensor(digits)


def pretrained(images: Tensor, labels: Tensor, epochs: int) -> PreTrainedModel:
    """A ViT trained to classify digits. The service does not use its head, since every adapter has its own."""
    config = ViTConfig(
        image_size=16,
        patch_size=4,
        num_channels=1,
        hidden_size=64,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="relu",
        num_labels=10,
    )
    vit = ViTForImageClassification(config)
    train(vit, images, labels, 1e-3, epochs, 50, "pretraining")
    return vit
