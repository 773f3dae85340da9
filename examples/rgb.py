"""Convert images of any mode to RGB."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB with 8 bits per channel. 16-bit greys are scaled to 8 bits, where Pillow would clip them.

    Raises:
        ValueError: If the range of the pixels is unknown: floats, or integers outside [0, 65535].
    """
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image)
        if 0 <= pixels.min() and pixels.max() <= 65535:
            image = Image.fromarray((pixels // 257).astype("uint8"))
    if image.mode in ("I", "F"):
        raise ValueError(
            f"An image of mode {image.mode!r} has pixels from {image.getextrema()[0]} to {image.getextrema()[1]}, and "
            "nothing says which of them is white. Save the images with 8 or 16 bits a channel."
        )
    return image.convert("RGB")
