"""The default task of examples/segmentation.py, and the tiny SAM that it adapts."""

import numpy as np
from PIL import Image as PILImage
from PIL import ImageDraw
from sam.data import Row
from sklearn.datasets import load_digits, load_sample_images
from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

SIZE = 48  # of the images made here, in pixels


def scene(background: np.ndarray, stamps: list[np.ndarray], rng: np.random.Generator) -> Row:
    """An image with a stamp in each quarter, and its mask.

    Args:
        background: (SIZE, SIZE, 3), from 0 to 255.
        stamps: Four opacities (SIZE / 2, SIZE / 2), from 0 to 1. Pixels above one half belong to the object.
        rng: Chooses the colours.
    """
    image, mask, half = background.astype(float), np.zeros((SIZE, SIZE), dtype="uint8"), SIZE // 2
    for index, opacity in enumerate(stamps):
        top, left = half * (index // 2), half * (index % 2)
        quarter = np.s_[top : top + half, left : left + half]
        colour = (image[quarter].mean((0, 1)) + rng.uniform(60, 196, 3)) % 256  # never close to the background
        image[quarter] += opacity[..., None] * (colour - image[quarter])
        mask[quarter][opacity > 0.5] = index + 1
    return {"image": PILImage.fromarray(image.astype("uint8")), "mask": PILImage.fromarray(mask)}


def plain_shapes(count: int, rng: np.random.Generator) -> list[Row]:
    """Images of filled ellipses and polygons of one colour on another, with noise."""

    def shape() -> np.ndarray:
        side = SIZE // 2
        drawn = PILImage.new("L", (side, side))
        centre, radii = rng.uniform(0.4, 0.6, 2) * side, rng.uniform(0.15, 0.4, 2) * side
        if rng.random() < 0.5:
            ImageDraw.Draw(drawn).ellipse([*(centre - radii), *(centre + radii)], fill=255)
        else:
            angles = rng.uniform(0, 2 * np.pi) + np.arange(sides := rng.integers(3, 6)) * 2 * np.pi / sides
            corners = centre + radii * np.stack([np.cos(angles), np.sin(angles)], axis=1)
            ImageDraw.Draw(drawn).polygon([tuple(corner) for corner in corners], fill=255)
        return np.asarray(drawn) / 255

    def background() -> np.ndarray:
        return (rng.uniform(0, 256, 3) + rng.normal(0, 10, (SIZE, SIZE, 3))).clip(0, 255)

    return [scene(background(), [shape() for _ in range(4)], rng) for _ in range(count)]


def handwriting(num_train: int, num_test: int, rng: np.random.Generator) -> tuple[list[Row], list[Row]]:
    """Images of digits on photographs, to train on and to test on. The latter have other digits on other halves."""
    digits = load_digits().images.astype("float32") / 16
    digits = digits[rng.permutation(len(digits))]
    photos = load_sample_images().images

    def stamp(digit: np.ndarray) -> np.ndarray:
        side = rng.integers(3 * SIZE // 8, SIZE // 2 + 1)
        opacity = np.zeros((SIZE // 2, SIZE // 2))
        top, left = rng.integers(0, SIZE // 2 - side + 1, 2)
        drawn = PILImage.fromarray(digit).resize((side, side), PILImage.Resampling.BICUBIC)
        opacity[top : top + side, left : left + side] = np.asarray(drawn).clip(0, 1)
        return opacity

    def rows(count: int, first_digit: int, half: int) -> list[Row]:
        made = []
        for index in range(count):
            photo = photos[index % len(photos)]
            photo = np.split(photo[:, : photo.shape[1] // 2 * 2], 2, axis=1)[half]
            zoom = rng.integers(1, 4)  # every so many pixels of the photograph, one is kept
            top, left = (rng.integers(0, side - zoom * SIZE) for side in photo.shape[:2])
            background = photo[top : top + zoom * SIZE : zoom, left : left + zoom * SIZE : zoom]
            first = first_digit + 4 * index
            made.append(scene(background, [stamp(digit) for digit in digits[first : first + 4]], rng))
        return made

    return rows(num_train, 0, half=0), rows(num_test, 4 * num_train, half=1)


def tiny_sam() -> tuple[SamModel, SamProcessor]:
    """An untrained SAM for images of this size, and its processor."""
    config = SamConfig(
        vision_config={
            "hidden_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "mlp_dim": 256,
            "image_size": SIZE,
            "patch_size": 4,
            "window_size": 4,
            "global_attn_indexes": [2],
            "output_channels": 32,
            "num_pos_feats": 16,
            "initializer_range": 0.02,
        },
        prompt_encoder_config={"hidden_size": 32, "image_size": SIZE, "patch_size": 4, "mask_input_channels": 4},
        mask_decoder_config={
            "hidden_size": 32,
            "mlp_dim": 64,
            "num_attention_heads": 4,
            "iou_head_hidden_dim": 32,
        },
    )
    size, longest = {"height": SIZE, "width": SIZE}, {"longest_edge": SIZE}
    processor = SamProcessor(SamImageProcessor(size=longest, pad_size=size, mask_size=longest, mask_pad_size=size))
    model = SamModel(config)
    model.shared_image_embedding.positional_embedding.data.normal_()
    return model, processor
