"""Images of any mode as RGB."""

import numpy as np
from PIL import Image


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB, 8 bits a channel. The 65,536 greys of a 16-bit image are scaled to 256; Pillow clips them.

    Raises:
        ValueError: If the pixels are floats, or integers outside [0, 65535], whose range is unknown.
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
