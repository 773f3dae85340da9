r"""U and V for a stack of slices from the gradients of the loss with respect to the slices.

With zero cores and G_k (d x e) the gradient of slice k, the gradient of its core is s U^T G_k V. Higher-order
orthogonal iteration (De Lathauwer, De Moor and Vandewalle 2000) finds U and V of r orthonormal columns that maximise
sum_k |U^T G_k V|^2:

    U   leading left singular vectors of [G_1 R, ..., G_N R]         R (e x p) holds V
    V   leading left singular vectors of [G_1^T L, ..., G_N^T L]     L (d x p) holds U

starting from random orthonormal L and R (Halko, Martinsson and Tropp 2011). Only the products G_k R and G_k^T L are
kept. A layer with input x and gradient g of its output has G = x^T g, so that G R = x^T (g R), and no G_k is built.

Letters: d inputs of a slice, e outputs of a slice, a and b input and output blocks of a layer, r rank, N slices,
p = r + `OVERSAMPLING` columns, unless the slice is narrower.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from .fused_linear import without_autocast
from .tensorization import Slices

OVERSAMPLING = 8  # columns in addition to the rank, as Halko, Martinsson and Tropp recommend


class GradientSketch:
    """The products of the gradients of one stack's slices, of `shape` (N, d, e), with a few columns.

    They are on the device of `like`, in float32 or in its dtype if that is more precise.
    """

    def __init__(self, shape: tuple[int, int, int], rank: int, generator: torch.Generator, like: Tensor) -> None:
        num_slices, in_width, out_width = shape
        dtype = torch.promote_types(like.dtype, torch.float32)
        self.left, self.right = (  # L (d, p) and R (e, p)
            random_orthonormal(width, min(rank + OVERSAMPLING, width), generator).to(like.device, dtype)
            for width in (in_width, out_width)
        )
        self.products = (  # G_k^T L of all slices (N, e, p), and G_k R of all slices (N, d, p)
            self.right.new_zeros(num_slices, out_width, self.left.shape[1]),
            self.left.new_zeros(num_slices, in_width, self.right.shape[1]),
        )
        self.weights = torch.ones(num_slices, dtype=torch.float64)  # of the gradient of each slice

    def add(self, slices: Slices, x: Tensor, g: Tensor) -> None:
        """Add x^T g of a layer, where x (..., a d) is its input and g (..., b e) the gradient of its output."""
        d, e, a = slices.in_width, slices.out_width, slices.num_in_blocks
        with without_autocast(x):
            x, g = (rows.reshape(-1, rows.shape[-1]).to(self.left.dtype) for rows in (x, g))
            if slices.parts:
                g = g.unflatten(-1, (-1, e))[:, slices.out_blocks].flatten(1)
            read, written = x.reshape(-1, d) @ self.left.to(x.device), g.reshape(-1, e) @ self.right.to(x.device)
            from_left = (read.view(len(x), -1).t() @ g).view(a, -1, g.shape[1] // e, e)  # a, p, b, e
            from_right = (written.view(len(g), -1).t() @ x).view(g.shape[1] // e, -1, a, d)  # b, p, a, d
        self._add(slices, from_left.permute(0, 2, 3, 1).flatten(0, 1), from_right.permute(2, 0, 3, 1).flatten(0, 1))

    def add_gradient(self, slices: Slices, gradient: Tensor) -> None:
        """Add the gradient (a d, b e) of a layer's weight, in the paper's orientation."""
        blocks = gradient.to(self.left.dtype).unflatten(1, (-1, slices.out_width))[:, slices.out_blocks]
        blocks = blocks.unflatten(0, (-1, slices.in_width)).transpose(1, 2).flatten(0, 1)
        self._add(slices, blocks.mT @ self.left.to(blocks.device), blocks @ self.right.to(blocks.device))

    def _add(self, slices: Slices, *products: Tensor) -> None:
        for total, product in zip(self.products, products, strict=True):
            total[slices.first : slices.first + slices.count] += product.to(total.device)

    def scale_layers(self, layers: Iterable[Slices]) -> None:
        """Set the weights so that the gradient of every layer has norm 1, as estimated from random L and R."""
        left, right = (product.cpu().double().square().sum((1, 2)) for product in self.products)
        for slices in layers:
            own = slice(slices.first, slices.first + slices.count)
            square = (left + right)[own].sum()
            self.weights[own] = square.rsqrt() if square > 0 else 0

    def directions(self, columns: int | None = None) -> tuple[Tensor, Tensor]:
        """U and V with `columns` orthonormal columns, or with p, in float64 on the CPU."""
        V, U = (
            leading(product.cpu().double() * self.weights[:, None, None], columns or kept.shape[1])
            for product, kept in zip(self.products, (self.right, self.left), strict=True)
        )
        return U, V

    def turn(self) -> None:
        """Replace L and R by the directions found so far, and set the products to zero."""
        U, V = self.directions()
        self.left.copy_(U)
        self.right.copy_(V)
        for product in self.products:
            product.zero_()


def leading(matrices: Tensor, count: int) -> Tensor:
    """The leading left singular vectors (n, count) of the matrices (N, n, p) side by side."""
    unfolded = matrices.transpose(0, 1).flatten(1)
    return torch.linalg.eigh(unfolded @ unfolded.t()).eigenvectors[:, -count:].flip(1)


def random_orthonormal(num_rows: int, num_columns: int, generator: torch.Generator) -> Tensor:
    """Random orthonormal columns in float64."""
    return torch.linalg.qr(torch.randn(num_rows, num_columns, generator=generator, dtype=torch.float64)).Q
