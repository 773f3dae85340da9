r"""Many adapters in one batch: every image i with factors of its own.

    h_i = x_i (I (x) U_i)                 one batched product, the same for all layers of a stack that read x
    y_i = x_i W^T + b + h_i Core_i (I (x) V_i)^T      two more, the last added in the pass that computes it

with the scale s_i inside Core_i. Adapters of one batch are brought to one rank by columns of zeros, which change no
product; a slice that an adapter does not have is a core of zeros, and so is every slice of an image without adapter.

Letters as in `decomposition.py`; B images, M rows (tokens) an image.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .decomposition import core_matrix


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

    def __getitem__(self, index: Tensor) -> FactorBank:
        """The factors of the adapters `index` (B,), one for each image."""
        return FactorBank(*(factor.index_select(0, index) for factor in (self.U, self.cores, self.V)))

    def to(self, device: torch.device, dtype: torch.dtype) -> FactorBank:
        return FactorBank(*(factor.to(device, dtype) for factor in (self.U, self.cores, self.V)))


def bank(adapters: Sequence[tuple[Tensor, Tensor, Tensor] | None], scales: Sequence[float]) -> FactorBank:
    """Put adapters side by side. A slice of zeros stands behind those they have, for layers that one does not have.

    Args:
        adapters: U (d, r), cores (N, r, r) and V (e, r) of each, where r and N may differ; None for one that has no
            slice in this stack. At least one is not None.
        scales: Their scales s.
    """
    shapes = [[factor.shape for factor in adapter] for adapter in adapters if adapter is not None]
    sizes = [[max(sides) for sides in zip(*shape, strict=True)] for shape in zip(*shapes, strict=True)]
    like = next(adapter for adapter in adapters if adapter is not None)
    nothing = [factor.new_zeros(()).expand(size) for factor, size in zip(like, sizes, strict=True)]
    U, cores, V = (
        torch.stack([padded(factor, size) for factor in factors])
        for factors, size in zip(
            zip(*(nothing if adapter is None else adapter for adapter in adapters), strict=True), sizes, strict=True
        )
    )
    factor = torch.tensor(scales, dtype=torch.promote_types(cores.dtype, torch.float32), device=cores.device)
    return FactorBank(U, torch.nn.functional.pad(cores * factor[:, None, None, None], (0, 0, 0, 0, 0, 1)), V)


def padded(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """`tensor` with zeros behind it along every axis, up to `size`."""
    missing = [wanted - side for side, wanted in zip(tensor.shape, size, strict=True)]
    if not any(missing):
        return tensor
    return torch.nn.functional.pad(tensor, [amount for side in reversed(missing) for amount in (0, side)])


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
