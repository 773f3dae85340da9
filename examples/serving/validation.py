"""Checks of requests. A refusal has an HTTP status and a sentence that gives the reason."""

import asyncio
import hmac
import io
import re
from collections.abc import AsyncIterator, Collection, Sequence

import numpy as np
from PIL import Image, ImageOps
from starlette.datastructures import Headers, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

FORMATS = ("JPEG", "PNG", "WEBP")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}")
MAX_ADAPTERS = 64
MAX_ASPECT = 100  # longer side of an image divided by its shorter side


class Refused(Exception):
    """A request that is answered with `status` and `reason`."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


def check_name(name: str) -> str:
    """Check the name of an adapter, which is never a path, so that it cannot lead outside the service's folders."""
    if not NAME.fullmatch(name):
        raise Refused(
            422,
            f"{name[:100]!r} cannot name an adapter: use 1 to 96 letters, digits, '.', '_' and '-', "
            "beginning with a letter or digit.",
        )
    return name


def check_adapters(names: Sequence[str], known: Collection[str]) -> list[str]:
    """The adapters of one image, without repetitions."""
    if not 0 < len(names) <= MAX_ADAPTERS:
        raise Refused(
            422, f"The request names {len(names)} adapters: give 1 to {MAX_ADAPTERS}, as ?adapter=NAME&adapter=NAME."
        )
    unknown = [name for name in names if check_name(name) not in known]
    if unknown:
        raise Refused(404, f"No adapter is called {', '.join(map(repr, unknown))}; GET /adapters lists all.")
    return list(dict.fromkeys(names))


def check_token(given: str | None, token: str | None) -> None:
    """Check the bearer token of a request, in a time that does not depend on the tokens."""
    if token and not hmac.compare_digest((given or "").encode(), token.encode()):
        raise Refused(401, "Changing adapters needs the header 'Authorization: Bearer TOKEN' with the right token.")


async def limited(chunks: AsyncIterator[bytes], content_length: str | None, limit: int) -> AsyncIterator[bytes]:
    """Pass on a body of at most `limit` bytes. A longer one is refused by its header, or as soon as it is too long."""
    too_long = Refused(413, f"The request is longer than {limit:,} bytes.")
    if content_length and content_length.isdecimal() and int(content_length) > limit:
        raise too_long
    length = 0
    async for chunk in chunks:
        length += len(chunk)
        if length > limit:
            raise too_long
        yield chunk


async def read_body(request: Request, limit: int, seconds: float) -> bytes:
    """The bytes of a request, or of the file in its form.

    Raises:
        Refused: If there are more than `limit`, they take longer than `seconds`, or the form has no ``file``.
    """
    chunks = limited(request.stream(), request.headers.get("content-length"), limit)
    is_form = request.headers.get("content-type", "").startswith("multipart/form-data")
    try:
        return await asyncio.wait_for(read_form(request.headers, chunks) if is_form else joined(chunks), seconds)
    except asyncio.TimeoutError:  # TimeoutError alone is not enough in Python 3.10
        raise Refused(408, f"The request did not arrive within {seconds:g} seconds.") from None


async def joined(chunks: AsyncIterator[bytes]) -> bytes:
    return b"".join([chunk async for chunk in chunks])


async def read_form(headers: Headers, chunks: AsyncIterator[bytes]) -> bytes:
    """The file that ``curl -F file=@image.png`` sends."""
    try:
        form = await MultiPartParser(headers, chunks, max_files=1, max_fields=10).parse()
    except MultiPartException as error:
        raise Refused(422, f"The form cannot be read: {error.message}") from error
    try:
        file = form.get("file")
        if not isinstance(file, UploadFile):
            raise Refused(422, "The form has no file called 'file': send the image as file=@image.png.")
        return await file.read()
    finally:
        await form.close()


def decode_image(data: bytes, max_pixels: int) -> Image.Image:
    """Decode an image and turn it upright. Its size is checked in the header, before any pixel is decoded."""
    if not data:
        raise Refused(422, "The image is empty: send the bytes of an image file.")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:  # of Pillow's larger limits
        raise Refused(413, f"The image is too large: {error}") from error
    except Exception as error:  # decoders fail in many ways, all caused by the file
        raise Refused(415, f"The image is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image.") from error
    if image.width * image.height > max_pixels:
        raise Refused(
            413, f"The image has {image.width} x {image.height} pixels; at most {max_pixels:,} are decoded. Shrink it."
        )
    if max(image.size) > MAX_ASPECT * min(image.size):
        # Resizing the shorter side to the model's 224 pixels would make the longer one millions of pixels long.
        raise Refused(
            413, f"The image has {image.width} x {image.height} pixels; one side may be {MAX_ASPECT} times the other."
        )
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode.startswith("I"):  # 16-bit greys, which Pillow would clip: scaled as for training, in rgb.py
            image = Image.fromarray(np.clip(np.asarray(image) // 257, 0, 255).astype("uint8"))
        return image
    except Exception as error:
        raise Refused(422, f"The {image.format} image cannot be decoded ({error}): it was probably cut off.") from error
