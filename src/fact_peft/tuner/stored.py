"""From the numbers of an adapter to the tensors of its file, and back: `FacTConfig.storage`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from ..method.decomposition import DECOMPOSITIONS
from ..storage.adapter_file import is_finite
from ..storage.packing import is_packed, pack, rounded, unpack
from ..storage.quoting import for_terminal
from .config import FacTConfig, bits_of


def to_storage(
    name: str, tensor: Tensor, storage: str | None, packing: Callable[[Tensor, int], Tensor] = pack
) -> Tensor:
    """A tensor as it is saved.

    Left as they are: integers, what holds NaN or infinity (which is refused where it is loaded, or is a mask), and what
    has no numbers here, as on a process that holds no part of it.

    Args:
        name: For the message.
        tensor: Of the model.
        storage: One of `STORAGES`, or None for as it is.
        packing: What is made of numbers in so many bits: `pack`, or `rounded` for floats with the stored numbers.

    Raises:
        ValueError: If a number is too large for float16.
    """
    if storage is None or not tensor.is_floating_point() or not has_numbers(tensor) or not is_finite(tensor):
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
    """A saved tensor as floats, if it is packed.

    Raises:
        ValueError: If it is packed, but not as it should be.
    """
    if not is_packed(tensor):
        return tensor
    try:
        return unpack(tensor)
    except ValueError as error:
        raise ValueError(
            f"{for_terminal(name)} is packed in a way that cannot be read: {error}. The file is damaged, or of a newer "
            "fact_peft: save or download the adapter again, or update fact_peft."
        ) from error


def to_storage_together(config: FacTConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors and biases of an adapter as they are saved.

    Before they are rounded to integers, the factors of a stack may be written in another form with the same increments,
    see `before_rounding`.

    Args:
        config: Of the adapter.
        adapter_name: With which the names of its factors end.
        tensors: By name in the model.
    """
    tensors = dict(tensors)
    bits = bits_of(config.storage)
    if bits:
        stacks: dict[str, dict[str, str]] = defaultdict(dict)
        for name in tensors:
            stack, found, letter = name.removesuffix(f".{adapter_name}").rpartition(".fact_")
            if found:
                stacks[stack][letter] = name
        for names in stacks.values():
            factors = {letter: tensors[name] for letter, name in names.items()}
            tensors |= {names[letter]: factor for letter, factor in before_rounding(config, factors, bits).items()}
    return {name: to_storage(name, tensor, config.storage) for name, tensor in tensors.items()}


def before_rounding(config: FacTConfig, factors: Mapping[str, Tensor], bits: int) -> Mapping[str, Tensor]:
    """The factors of a stack as they are, or orthogonalized: whichever rounding to so many bits changes less.

    What was rounded before, such as a loaded adapter, stays as it is, so that it is saved again to the same bits.
    """
    if not all(has_numbers(factor) and is_finite(factor) for factor in factors.values()):
        return factors
    decomposition = DECOMPOSITIONS[config.decomposition]
    exact = {letter: factor.detach().cpu().double() for letter, factor in factors.items()}

    def error(form: Mapping[str, Tensor]) -> float:
        return decomposition.distance(
            exact, {letter: rounded(factor, bits).double() for letter, factor in form.items()}
        )

    return min(exact, decomposition.orthogonalized(exact), key=error)  # of equals the first


def has_numbers(tensor: Tensor) -> bool:
    """Whether the numbers of a tensor are here: not of one on the meta device, nor of what ZeRO-3 has elsewhere."""
    return tensor.numel() > 0 and not tensor.is_meta
