"""The masks that a SAM predicts for boxes, their Dice scores, and pictures of them."""

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from peft import PeftModel
from PIL import Image as PILImage
from rgb import to_rgb
from sam.data import Row, Rows, mask_of, objects
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import SamModel, SamProcessor

Model = SamModel | PeftModel


def loss_of(logits: Tensor, truth: Tensor) -> Tensor:
    """Binary cross-entropy plus 1 - Dice, averaged over objects. Both arguments are (B, N, height, width)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * truth).sum((-2, -1)) + 1
    soft_dice = overlap / (probability.sum((-2, -1)) + truth.sum((-2, -1)) + 1)
    return F.binary_cross_entropy_with_logits(logits, truth) + (1 - soft_dice).mean()


@torch.no_grad()
def predict(model: Model, row: Row, processor: SamProcessor) -> Tensor:
    """Logits (N, height, width) of the masks predicted for the boxes of N objects. Positive means inside."""
    _, boxes = objects(mask_of(row))
    model.eval()
    inputs = processor(images=to_rgb(row["image"]), input_boxes=[boxes.tolist()], return_tensors="pt")
    embeddings = model.get_image_embeddings(inputs["pixel_values"].to(model.device))
    logits = [
        model(image_embeddings=embeddings, input_boxes=some.to(model.device), multimask_output=False).pred_masks.cpu()
        for some in inputs["input_boxes"].float().split(64, dim=1)
    ]
    (masks,) = processor.image_processor.post_process_masks(
        torch.cat(logits, dim=1), inputs["original_sizes"], inputs["reshaped_input_sizes"], binarize=False
    )
    return masks[:, 0]


def truth_of(row: Row) -> Tensor:
    """True masks (N, height, width) of the objects in the order of `predict`."""
    mask = mask_of(row)
    return torch.as_tensor(mask == objects(mask)[0][:, None, None])


def dice(model: Model, rows: Rows, processor: SamProcessor) -> list[float]:
    """Dice of every object of all rows, 2 |A and B| / (|A| + |B|): 1 if prediction A and truth B are the same."""
    scores = []
    for row in tqdm(rows, "testing", leave=False):
        found, truth = predict(model, row, processor) > 0, truth_of(row)
        scores += (2 * (found & truth).sum((1, 2)) / (found.sum((1, 2)) + truth.sum((1, 2)))).tolist()
    return scores


def overlay(image: PILImage.Image, masks: Tensor) -> np.ndarray:
    """The image in grey, and each mask on it in a colour of its own."""
    drawn = np.asarray(to_rgb(image).convert("L").convert("RGB")) / 255 * 0.6
    for index, mask in enumerate(masks.numpy()):
        drawn[mask] = 0.25 * drawn[mask] + 0.75 * np.array(colormaps["tab10"](index % 10)[:3])
    return drawn


def draw(models: dict[str, Model], rows: Rows, processor: SamProcessor, file: Path) -> None:
    """Held-out images with their boxes, their true masks, and those that each model finds, with the mean Dice."""
    figure = Figure(figsize=(1.9 * len(rows), 2.0 * (2 + len(models))), layout="constrained")
    grid = figure.subplots(2 + len(models), len(rows), squeeze=False)
    for column, row in enumerate(rows):
        grid[0, column].imshow(to_rgb(row["image"]))
        for index, (left, top, right, bottom) in enumerate(objects(mask_of(row))[1]):
            corner, colour = (left - 0.5, top - 0.5), colormaps["tab10"](index % 10)
            box = Rectangle(corner, right - left, bottom - top, fill=False, edgecolor=colour)
            grid[0, column].add_patch(box)
        grid[1, column].imshow(overlay(row["image"], truth_of(row)))
        for line, model in enumerate(models.values(), start=2):
            grid[line, column].imshow(overlay(row["image"], predict(model, row, processor) > 0))
            grid[line, column].set_xlabel(f"Dice {np.mean(dice(model, [row], processor)):.2f}")
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
    for axes, title in zip(grid[:, 0], ("image and boxes", "truth", *models), strict=True):
        axes.set_ylabel(title)
    figure.savefig(file, dpi=120)
