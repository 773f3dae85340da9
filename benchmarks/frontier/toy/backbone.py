"""A small vision transformer pretrained on CIFAR-10, for `benchmarks.frontier.toy`."""

import math

import torch
from torch import Tensor
from torch.nn.functional import pad
from tqdm.auto import tqdm
from transformers import ViTConfig, ViTForImageClassification, get_cosine_schedule_with_warmup

from benchmarks.frontier.tasks import Labelled
from benchmarks.frontier.toy.tasks import SIDE

BATCH_SIZE = 100
LEARNING_RATE = 1e-3
MARGIN = 4  # of the random crops, in pixels


def normalise(images: Tensor) -> Tensor:
    """Bytes as the model wants them: float32 in [-1, 1]."""
    return images.float() / 127.5 - 1


def augment(images: Tensor) -> Tensor:
    """Random crops of the padded images (N, 3, 32, 32), each mirrored with probability 1/2."""
    num_images = len(images)
    padded = pad(images, (MARGIN,) * 4)
    rows, columns = torch.randint(2 * MARGIN + 1, (2, num_images, 1)) + torch.arange(SIDE)
    columns = torch.where(torch.rand(num_images, 1) < 0.5, columns.flip(1), columns)
    index = torch.arange(num_images)[:, None, None]
    return padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)


def pretrain(photos: Labelled, epochs: int, width: int, depth: int, patch_size: int) -> ViTForImageClassification:
    """Train from scratch with AdamW and a cosine schedule.

    Args:
        photos: Images (N, 3, 32, 32) of bytes with their classes.
        epochs: Passes over them.
        width: Of the token stream, a multiple of 32, the width of a head.
        depth: Number of transformer blocks.
        patch_size: In pixels.
    """
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=SIDE,
        patch_size=patch_size,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=depth,
        num_attention_heads=width // 32,
        num_labels=int(photos.labels.max()) + 1,
    )
    model = ViTForImageClassification(config)
    num_steps = epochs * math.ceil(len(photos.labels) / BATCH_SIZE)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=0.05, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 20, num_steps)
    with tqdm(total=num_steps, desc="pretraining", mininterval=10) as progress:
        for _ in range(epochs):
            for batch in torch.randperm(len(photos.labels)).split(BATCH_SIZE):
                images = augment(normalise(photos.images[batch]))
                loss = model(pixel_values=images, labels=photos.labels[batch]).loss
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
                progress.update()
            progress.set_postfix(loss=f"{loss.item():.2f}")
    return model.eval()
