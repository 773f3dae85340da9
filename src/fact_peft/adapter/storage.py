"""Data types on disk: from the numbers of an adapter to the tensors of its file, and back.

The integer types pack a tensor into one tensor of bytes that describes itself. 64 consecutive numbers form a group and
share a scale, and a code q of b bits stands for

    x = scale * (q + 1/2)        q from -2^(b-1) to 2^(b-1) - 1

which is symmetric and uses every code. (No code stands for zero: a group of zeros has the scale 0.) The bytes of a
packed tensor are, little-endian,

    "FacT", version, bits b, numbers in a group, number of dimensions        4 + 4 bytes
    CRC-32 of all that follows                                               4 bytes
    dimensions                                                               4 bytes each
    scales, bfloat16, one a group in row-major order, the last may be short  2 bytes each
    codes + 2^(b-1), the first in the lowest bits of a byte                  b bits each, unused bits are zero

The checksum detects bytes on which somebody computed, such as the mean of several files. Scales are bfloat16, since the
8-bit scales of small factors come near 6e-8, below which a float16 holds nothing.
"""

import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .names import for_terminal

MAGIC, VERSION, GROUP = b"FacT", 2, 64
WIDTHS = (8, 4, 2)
MAX_DIMENSIONS = 8
PREAMBLE = struct.Struct("<4sBBBBI")
LARGEST = torch.finfo(torch.float32).max
# Fractions of the scale that reaches the largest number of a group. Clipping may cost less than coarse steps for all.
CLIPPING = torch.linspace(1, 0.3, 29, device="cpu").tolist()
STORAGES = ("float32", "float16", "bfloat16", *(f"int{bits}" for bits in WIDTHS))
_EXACT: ContextVar[bool] = ContextVar("fact_peft_exact_numbers", default=False)


def bits_of(storage: str | None) -> int | None:
    """Bits per number of an integer storage; None for a float storage."""
    return int(storage.removeprefix("int")) if storage and storage.startswith("int") else None


@contextmanager
def exact_numbers() -> Iterator[None]:
    """Within the context, `to_storage` leaves numbers as they are in this thread."""
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


def pack(tensor: Tensor, bits: int) -> Tensor:
    """Pack finite floats of any shape into bytes, a uint8 tensor (n,) on the CPU.

    The result of `unpack` is packed into the bytes that it came from.
    """
    levels, scales = quantize(tensor.cpu(), bits)
    codes = (levels + (2 ** (bits - 1) - 0.5)).flatten()[: tensor.numel()].to(torch.uint8)
    body = struct.pack(f"<{tensor.dim()}I", *tensor.shape) + b"".join(
        part.numpy().tobytes() for part in (scales.bfloat16().view(torch.uint8), join_bits(codes, bits))
    )
    preamble = PREAMBLE.pack(MAGIC, VERSION, bits, GROUP, tensor.dim(), zlib.crc32(body))
    return torch.frombuffer(bytearray(preamble + body), dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The float32 tensor, on the CPU, that `pack` stored; a ValueError if the bytes are not exactly those of one."""
    data = packed.detach().cpu().contiguous()
    bits, group, shape = read_preamble(data)
    count = math.prod(shape)
    start = PREAMBLE.size + 4 * len(shape)
    num_scales, num_codes = -(-count // group), -(-count * bits // 8)
    if len(data) != start + 2 * num_scales + num_codes:
        raise ValueError(
            f"{len(data)} bytes where {list(shape)} numbers of {bits} bits in groups of {group} take "
            f"{start + 2 * num_scales + num_codes}"
        )
    scales = data[start : start + 2 * num_scales].clone().view(torch.bfloat16).float()
    if not torch.isfinite(scales).all() or (scales < 0).any():
        raise ValueError("scales that are negative or not finite")
    codes = split_bits(data[start + 2 * num_scales :], bits)
    if codes[count:].any():
        raise ValueError("bits set behind the last number")
    levels = codes[:count].float() - (2 ** (bits - 1) - 0.5)
    return multiplied(padded(levels, group).view(-1, group), scales).flatten()[:count].view(shape)


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor begins as the bytes of a packed one do."""
    return tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor[: len(MAGIC)].tolist() == list(MAGIC)


def read_preamble(packed: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Bits, numbers in a group and shape of a packed tensor."""
    if not is_packed(packed) or len(packed) < PREAMBLE.size:
        raise ValueError(f"no packed tensor, which begins with {MAGIC.decode()}")
    _, version, bits, group, num_dimensions, checksum = PREAMBLE.unpack(bytes(packed[: PREAMBLE.size].tolist()))
    if version != VERSION:
        raise ValueError(f"version {version} of the layout, of which this fact_peft knows {VERSION}")
    if bits not in WIDTHS or group == 0 or num_dimensions > MAX_DIMENSIONS:
        raise ValueError(f"{num_dimensions} dimensions, {bits} bits in groups of {group}; known are {WIDTHS} bits")
    body = packed[PREAMBLE.size :].cpu().contiguous().numpy().tobytes()
    if checksum != zlib.crc32(body):
        raise ValueError("the checksum is wrong")
    if len(body) < 4 * num_dimensions:
        raise ValueError("fewer bytes than its dimensions take")
    return bits, group, struct.unpack_from(f"<{num_dimensions}I", body)


def quantize(tensor: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """The levels q + 1/2 of a tensor by group (n, GROUP), with zeros behind the last, and their scales (n,).

    Each scale is a bfloat16, of the least squared error that a ratio of `CLIPPING` gives.
    """
    numbers = tensor.detach().float().flatten()
    rows, present = (padded(each, GROUP).view(-1, GROUP) for each in (numbers, torch.ones_like(numbers)))
    reaching = rows.abs().amax(1) / (2 ** (bits - 1) - 0.5)
    least, best = torch.full_like(reaching, torch.inf), reaching
    for ratio in CLIPPING:
        scales = (ratio * reaching).bfloat16().float()
        error = (present * (rows - scales[:, None] * nearest_levels(rows, scales, bits))).square().sum(1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return nearest_levels(rows, best, bits), best


def nearest_levels(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The levels q + 1/2 (n, group) that are nearest to rows (n, group) with scales (n,)."""
    half = 2 ** (bits - 1)
    steps = torch.where(scales > 0, scales, 1)[:, None]  # any code will do for a row of zeros
    return (rows / steps).floor().clamp(-half, half - 1) + 0.5


def multiplied(levels: Tensor, scales: Tensor) -> Tensor:
    """Levels (n, group) times their scales (n,), which rounding may have brought beyond the largest float32."""
    return (levels * scales[:, None]).clamp(-LARGEST, LARGEST)


def padded(numbers: Tensor, multiple: int) -> Tensor:
    """`numbers` (n,) followed by zeros, so that their count is a multiple of `multiple`."""
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % multiple))


def join_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) of `bits` bits each as bytes."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=codes.device) * bits
    return (padded(codes, per_byte).view(-1, per_byte) << shifts).sum(1, dtype=torch.uint8)


def split_bits(data: Tensor, bits: int) -> Tensor:
    """The codes in bytes, including those in unused bits."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=data.device) * bits
    return ((data[:, None] >> shifts) & (2**bits - 1)).flatten()


def to_storage(name: str, tensor: Tensor, storage: str | None) -> Tensor:
    """A tensor as it is saved in `storage`, one of `STORAGES`.

    Integers stay as they are, and so do tensors that hold NaN or infinity: these are masks, or are refused when they
    are loaded. Tensors without numbers stay too, such as those that ZeRO-3 keeps on other processes.
    """
    if storage is None or _EXACT.get() or not tensor.is_floating_point():
        return tensor
    if tensor.is_meta or tensor.numel() == 0 or not is_finite(tensor):
        return tensor
    bits = bits_of(storage)
    if bits and tensor.dim() > 1:
        return pack(tensor, bits)
    cast = tensor.to(torch.float16 if bits else getattr(torch, storage))
    if not is_finite(cast):
        raise ValueError(
            f"{name} holds numbers up to {tensor.abs().max().item():.3g}, which do not fit {cast.dtype}; save it with "
            "storage='bfloat16', or train with a smaller learning rate."
        )
    return cast


def from_storage(name: str, tensor: Tensor) -> Tensor:
    """A saved tensor as floats."""
    if not is_packed(tensor):
        return tensor
    try:
        return unpack(tensor)
    except ValueError as error:
        raise ValueError(
            f"{for_terminal(name)} is packed in a way that cannot be read: {error}. The file is damaged, was computed "
            "from several packed files, or is of a newer fact_peft: save or download the adapter again, or update "
            "fact_peft."
        ) from error


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor of any data type holds NaN."""
    return tensor.is_floating_point() and bool(checkable(tensor).isnan().any())


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor of any data type are finite."""
    return not tensor.is_floating_point() or bool(checkable(tensor).isfinite().all())


def checkable(tensor: Tensor) -> Tensor:
    """The tensor in a data type that has ``isnan`` in torch, which float8 has not."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
