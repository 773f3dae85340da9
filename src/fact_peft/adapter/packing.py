"""Tensors in 8, 4 or 2 bits a number: one tensor of bytes that describes itself.

A group of consecutive numbers shares a scale, and a code q of b bits stands for

    x = scale * (q + 1/2)        q from -2^(b-1) to 2^(b-1) - 1

which is symmetric and uses every code. (No code stands for zero: a group of zeros has the scale 0.) The bytes of a
packed tensor are, little-endian,

    "FacT", version, bits b, numbers in a group, number of dimensions        4 + 4 bytes
    CRC-32 of all that follows                                               4 bytes
    dimensions                                                               4 bytes each
    scales, bfloat16, one a group in row-major order, the last may be short  2 bytes each
    codes + 2^(b-1), the first in the lowest bits of a byte                  b bits each, unused bits are zero

The checksum refuses bytes that were computed with, such as the mean of several files. Scales are bfloat16, since a
float16 holds nothing below 6e-8 and the 8-bit scales of small factors come near that.
"""

from __future__ import annotations

import math
import struct
import zlib

import torch
from torch import Tensor

MAGIC, VERSION, GROUP = b"FacT", 2, 64
WIDTHS = (8, 4, 2)
MAX_DIMENSIONS = 8
PREAMBLE = struct.Struct("<4sBBBBI")
LARGEST = torch.finfo(torch.float32).max
# Fractions of the scale that reaches the largest number of a group. Clipping may cost less than coarse steps for all.
CLIPPING = torch.linspace(1, 0.3, 29, device="cpu").tolist()


def pack(tensor: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """The bytes of a tensor, with the scales of least squared error among `CLIPPING`.

    Args:
        tensor: Finite floats of any shape.
        bits: A number: 8, 4 or 2.
        group: Numbers that share a scale, at most 255.

    Returns:
        The bytes, (n,) of uint8, on the CPU. What `unpack` gave is packed to the bytes it came from.
    """
    rows, scales = grouped(tensor.cpu(), bits, group)
    half = 2 ** (bits - 1)
    codes = (quantize(rows, scales, bits) + (half - 0.5)).flatten()[: tensor.numel()].to(torch.uint8)
    body = struct.pack(f"<{tensor.dim()}I", *tensor.shape) + b"".join(
        part.numpy().tobytes() for part in (scales.bfloat16().view(torch.uint8), join_bits(codes, bits))
    )
    preamble = PREAMBLE.pack(MAGIC, VERSION, bits, group, tensor.dim(), zlib.crc32(body))
    return torch.frombuffer(bytearray(preamble + body), dtype=torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The float32 tensor, on the CPU, that `pack` stored.

    Raises:
        ValueError: If these are not the bytes of a packed tensor of this version, whole and without surplus.
    """
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


def rounded(tensor: Tensor, bits: int, group: int = GROUP) -> Tensor:
    """What `unpack` gives of what `pack` makes of a tensor, in float32, without leaving the tensor's device."""
    rows, scales = grouped(tensor, bits, group)
    return multiplied(quantize(rows, scales, bits), scales).flatten()[: tensor.numel()].view(tensor.shape)


def is_packed(tensor: Tensor) -> bool:
    """Whether a tensor begins as the bytes of a packed one do."""
    return tensor.dtype == torch.uint8 and tensor.dim() == 1 and tensor[: len(MAGIC)].tolist() == list(MAGIC)


def read_preamble(packed: Tensor) -> tuple[int, int, tuple[int, ...]]:
    """Bits, numbers in a group and shape of a packed tensor.

    Raises:
        ValueError: If it does not begin as one, or is of another version.
    """
    if not is_packed(packed) or len(packed) < PREAMBLE.size:
        raise ValueError(f"no packed tensor, which begins with {MAGIC.decode()}")
    _, version, bits, group, num_dimensions, checksum = PREAMBLE.unpack(bytes(packed[: PREAMBLE.size].tolist()))
    if version != VERSION:
        raise ValueError(f"version {version} of the layout, of which this fact_peft knows {VERSION}")
    if bits not in WIDTHS or group == 0 or num_dimensions > MAX_DIMENSIONS:
        raise ValueError(f"{num_dimensions} dimensions, {bits} bits in groups of {group}; known are {WIDTHS} bits")
    if checksum != zlib.crc32(packed[PREAMBLE.size :].cpu().contiguous().numpy().tobytes()):
        raise ValueError("the checksum is wrong")
    dimensions = bytes(packed[PREAMBLE.size : PREAMBLE.size + 4 * num_dimensions].tolist())
    if len(dimensions) < 4 * num_dimensions:
        raise ValueError("fewer bytes than its dimensions take")
    return bits, group, struct.unpack(f"<{num_dimensions}I", dimensions)


def grouped(tensor: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor]:
    """The numbers of a tensor by group (n, group), in float32, with zeros behind the last; and their scales (n,)."""
    numbers = tensor.detach().float().flatten()
    rows, present = (padded(each, group).view(-1, group) for each in (numbers, torch.ones_like(numbers)))
    return rows, best_scales(rows, present, bits)


def best_scales(rows: Tensor, present: Tensor, bits: int) -> Tensor:
    """The scale (n,) of each row (n, group), a bfloat16, of least squared error where `present` (n, group) is one."""
    reaching = rows.abs().amax(1) / (2 ** (bits - 1) - 0.5)
    least, best = torch.full_like(reaching, torch.inf), reaching
    for ratio in CLIPPING:
        scales = (ratio * reaching).bfloat16().float()
        error = (present * (rows - scales[:, None] * quantize(rows, scales, bits))).square().sum(1)
        best, least = torch.where(error < least, scales, best), torch.minimum(error, least)
    return best


def quantize(rows: Tensor, scales: Tensor, bits: int) -> Tensor:
    """The nearest levels q + 1/2 (n, group) of the rows."""
    half = 2 ** (bits - 1)
    steps = torch.where(scales > 0, scales, 1)[:, None]  # of a row of zeros any code will do
    return (rows / steps).floor().clamp(-half, half - 1) + 0.5


def multiplied(levels: Tensor, scales: Tensor) -> Tensor:
    """Levels (n, group) times their scales (n,), which rounding may have brought beyond the largest float32."""
    return (levels * scales[:, None]).clamp(-LARGEST, LARGEST)


def padded(numbers: Tensor, multiple: int) -> Tensor:
    """`numbers` (n,) with zeros behind, to a multiple of so many."""
    return torch.nn.functional.pad(numbers, (0, -len(numbers) % multiple))


def join_bits(codes: Tensor, bits: int) -> Tensor:
    """Codes (n,) of so many bits as bytes."""
    per_byte = 8 // bits
    shifts = torch.arange(per_byte, dtype=torch.uint8, device=codes.device) * bits
    return (padded(codes, per_byte).view(-1, per_byte) << shifts).sum(1, dtype=torch.uint8)


def split_bits(data: Tensor, bits: int) -> Tensor:
    """The codes in bytes, those in unused bits included."""
    shifts = torch.arange(8 // bits, dtype=torch.uint8, device=data.device) * bits
    return ((data[:, None] >> shifts) & (2**bits - 1)).flatten()
