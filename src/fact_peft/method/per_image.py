r"""Many adapters in one batch: every image i with factors of its own.

    h_i = x_i (I (x) U_i)                 one batched product, the same for all layers of a stack that read x
    y_i = x_i W^T + b + h_i Core_i (I (x) V_i)^T      two more, the last added in the pass that computes it

with the scale s_i inside Core_i. Adapters of one batch are brought to one rank by columns of zeros, which change no
product; a slice that an adapter does not have is a core of zeros, and so is every slice of an image without adapter.

Letters as in `decomposition.py`; B images, M rows (tokens) an image.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from .decomposition import core_matrix
from .tensorization import Slices

Layer = TypeVar("Layer", bound=Hashable)


@dataclass(frozen=True)
class FactorBank:
    """The factors of several adapters, or of every image of a batch, in one stack of slices.

    Attributes:
        U: (n, d, r).
        cores: (n, N, r, r), scales included.
        V: (n, e, r).
    """

    U: Tensor
    cores: Tensor
    V: Tensor

    @classmethod
    def empty(cls, n: int) -> FactorBank:
        """Of `n` images without adapter: of rank zero."""
        return cls(torch.zeros(n, 0, 0), torch.zeros(n, 0, 0, 0), torch.zeros(n, 0, 0))

    @classmethod
    def join(cls, banks: Sequence[FactorBank], num_slices: int, rank: int = 0) -> FactorBank:
        """One bank of the adapters of all `banks`, with so many slices and at least of this rank."""
        U, cores, V = zip(*((bank.U, bank.cores, bank.V) for bank in banks), strict=True)
        return cls(joined(U, 0, rank), joined(cores, num_slices, rank, rank), joined(V, 0, rank))

    def to(self, device: torch.device, dtype: torch.dtype) -> FactorBank:
        return FactorBank(*(factor.to(device, dtype) for factor in (self.U, self.cores, self.V)))

    def of_images(self, places: Sequence[int]) -> FactorBank:
        """The factors of every image, whose adapters have these `places` here."""
        return FactorBank(*(of_images(factor, places) for factor in (self.U, self.cores, self.V)))


def joined(tensors: Sequence[Tensor], *least: int) -> Tensor:
    """Tensors (n, ...) one behind the other, filled up with zeros to the largest side of any and to `least`.

    Those that hold nothing say neither device nor dtype.
    """
    sizes = [max(sides) for sides in zip(*(tensor.shape[1:] for tensor in tensors), least, strict=True)]
    like = next(tensor for tensor in tensors if tensor.numel())
    return torch.cat([padded(tensor if tensor.numel() else tensor.to(like), sizes) for tensor in tensors])


def padded(tensor: Tensor, sizes: Sequence[int]) -> Tensor:
    """`tensor` (n, ...) with zeros behind it along every axis but the first, up to `sizes`."""
    missing = [size - side for side, size in zip(tensor.shape[1:], sizes, strict=True)]
    if not any(missing):
        return tensor
    return torch.nn.functional.pad(tensor, [amount for side in reversed(missing) for amount in (0, side)])


def of_images(tensor: Tensor, places: Sequence[int]) -> Tensor:
    """Entries of `tensor` (n, ...) at the `places` of all images."""
    in_order = list(places) == list(range(len(tensor)))
    return tensor if in_order else tensor.index_select(0, torch.tensor(places, device=tensor.device))


def reordered(cores: Tensor, theirs: Mapping[Layer, Slices], ours: Mapping[Layer, Slices]) -> Tensor:
    """Cores (n, N, r, r) of slices of a stack in the order in which others have them; zeros where there are none.

    Args:
        cores: In the order of `theirs`.
        theirs: Slices by layer.
        ours: Slices of these layers and maybe more, by layer, in their order: of a layer the same parts or all.
    """
    absent = cores.shape[1]
    order: list[int] = []
    for layer, owned in ours.items():
        its = theirs.get(layer)
        if its is None:
            order += [absent] * owned.count
        elif its.parts == owned.parts:
            order += range(its.first, its.first + its.count)
        else:
            order += [absent if place is None else place for place in its.places]
    if order[:absent] == list(range(absent)):
        return cores
    with_absent = torch.nn.functional.pad(cores, (0, 0, 0, 0, 0, 1))
    return with_absent.index_select(1, torch.tensor(order, device=cores.device))


def read_per_image(x: Tensor, U: Tensor) -> Tensor:
    """x_i (I_a (x) U_i) for every image: from (B, M, a d) with U (B, d, r) to (B, M, a r)."""
    num_images, width, rank = U.shape
    h = torch.bmm(x.reshape(num_images, -1, width), U)
    return h.view(num_images, x.shape[1], x.shape[2] // width * rank)


def write_per_image(h: Tensor, cores: Tensor, V: Tensor, onto: Tensor, in_place: bool = False) -> Tensor:
    """onto_i + h_i Core_i (I_b (x) V_i)^T for every image.

    Args:
        h: What `read_per_image` gives, (B, M, a r).
        cores: The cores of a layer's slices, scale included: (B, a, b, r, r).
        V: (B, e, r).
        onto: (B, M, b e).
        in_place: Write the sum into `onto`, which must be contiguous.
    """
    num_images, out_width, rank = V.shape
    h = torch.bmm(h, core_matrix(cores)).view(num_images, -1, rank).to(onto.dtype)
    rows = onto.reshape(num_images, -1, out_width)
    V = V.to(onto.dtype).mT
    if in_place:
        rows.baddbmm_(h, V)
        return onto
    return torch.baddbmm(rows, h, V).view(onto.shape)


def linear_per_image(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x_i W_i^T + b_i for every image: from (B, M, in) with W (B, out, in) and b (B, out) to (B, M, out)."""
    dtype = torch.promote_types(x.dtype, weight.dtype)
    x, weight = x.to(dtype), weight.to(dtype).mT
    return torch.bmm(x, weight) if bias is None else torch.baddbmm(bias.to(dtype)[:, None], x, weight)
