"""Data types on disk: from the numbers of an adapter to the tensors of its file, and back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from .names import for_terminal
from .packing import WIDTHS, is_packed, pack, unpack

STORAGES = ("float32", "float16", "bfloat16", *(f"int{bits}" for bits in WIDTHS))
_EXACT: ContextVar[bool] = ContextVar("fact_peft_exact_numbers", default=False)


def bits_of(storage: str | None) -> int | None:
    """Bits per number of an integer storage; None for a float storage."""
    return int(storage.removeprefix("int")) if storage and storage.startswith("int") else None


@contextmanager
def exact_numbers() -> Iterator[None]:
    """Within the context, this thread takes adapters out of models with the numbers they have there."""
    token = _EXACT.set(True)
    try:
        yield
    finally:
        _EXACT.reset(token)


def to_storage(
    name: str, tensor: Tensor, storage: str | None, packing: Callable[[Tensor, int], Tensor] = pack
) -> Tensor:
    """A tensor as it is saved.

    Integers are left as they are, and so are tensors that hold NaN or infinity, which are masks or are refused when
    they are loaded, and tensors whose numbers lie on another process.

    Args:
        name: Name of the tensor, for the error message.
        tensor: Tensor of the model.
        storage: One of `STORAGES`, or None for the data type of the tensor.
        packing: From floats and bits to what is saved: `pack`, or `rounded` for floats with the stored numbers.

    Raises:
        ValueError: If a number is too large for float16.
    """
    if storage is None or _EXACT.get() or not tensor.is_floating_point() or not has_numbers(tensor):
        return tensor
    if not is_finite(tensor):
        return tensor
    bits = bits_of(storage)
    if bits and tensor.dim() > 1:
        return packing(tensor, bits)
    cast = tensor.to(torch.float16 if bits else getattr(torch, storage))
    if not is_finite(cast):
        raise ValueError(
            f"{name} holds numbers up to {tensor.abs().max().item():.3g}, which do not fit {cast.dtype}; save it with "
            "storage='bfloat16', or train with a smaller learning rate."
        )
    return cast


def from_storage(name: str, tensor: Tensor) -> Tensor:
    """A saved tensor as floats.

    Raises:
        ValueError: If it is packed and damaged, or of a later version of the format.
    """
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


def has_numbers(tensor: Tensor) -> bool:
    """Whether a tensor holds its numbers: not one on the meta device, nor one that ZeRO-3 has partitioned."""
    return tensor.numel() > 0 and not tensor.is_meta


def has_nan(tensor: Tensor) -> bool:
    """Whether a tensor of any data type holds NaN."""
    return tensor.is_floating_point() and bool(checkable(tensor).isnan().any())


def is_finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor of any data type are finite."""
    return not tensor.is_floating_point() or bool(checkable(tensor).isfinite().all())


def checkable(tensor: Tensor) -> Tensor:
    """The tensor in a data type for which torch implements ``isnan``, which float8 is not."""
    return tensor.float() if tensor.dtype.itemsize == 1 else tensor
