r"""The idea of FacT: one stack of weight increments, written with factors that all its slices share.

Slice k of a stack of N slices is (Jie & Deng, AAAI 2023)

    dW_k = s * U Sigma_k V^T        U (d x r), Sigma_k (r x r), V (e x r), s a fixed scale

and the members of the family differ only in how the N cores Sigma_k are written:

    tensor-train (eq. 8):   Sigma itself is learned, N x r x r
    Tucker (eq. 10):        Sigma_k = sum_t P[k, t] C[t]   with C (r x r x r) and P (N x r)
    canonical polyadic:     Sigma_k = diag(W[k])           with W (N x r); not in the paper

A linear layer of a x b slices has the increment, in the paper's orientation y = x (W + dW),

    dW = s * (I_a (x) U) Core (I_b (x) V)^T      Core (a r x b r): its slices' cores as one block matrix

where (x) is the Kronecker product: every input block is read with the same U, every output block written with the same
V. `contract` multiplies by the first two terms, `expand` by the last; the increment is these two applied to the
identity, the forward pass these two applied to the layer's input.

Letters: d inputs of a slice, e outputs of a slice, a and b input and output blocks of a layer, r rank, N slices.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .tensorization import Slices


def blockwise(x: Tensor, matrix: Tensor) -> Tensor:
    """x (I (x) matrix): multiply every block of `x` (..., n p) by the same `matrix` (p, q), to (..., n q)."""
    width, out_width = matrix.shape
    # Folded by hand, since `matmul` folds or not depending on requires_grad, which would change the rounding.
    product = x.reshape(-1, width) @ matrix
    return product.view(*x.shape[:-1], x.shape[-1] // width * out_width)


def core_grid(cores: Tensor, slices: Slices) -> Tensor:
    """Arrange the cores (..., count, r, r) of a layer by block, (..., a, b, r, r), with zeros where it has no slice."""
    owned = cores.unflatten(-3, (slices.num_in_blocks, -1))
    if not slices.parts:
        return owned
    columns = dict(zip(slices.out_blocks, owned.unbind(-3), strict=True))
    nothing = torch.zeros_like(owned[..., 0, :, :])
    return torch.stack([columns.get(j, nothing) for j in range(slices.num_out_blocks)], dim=-3)


def core_matrix(cores: Tensor) -> Tensor:
    """The cores (..., a, b, r, r) of a layer's slices as one block matrix (..., a r, b r)."""
    return cores.transpose(-3, -2).flatten(-2).flatten(-3, -2)


def contract(x: Tensor, U: Tensor, core: Tensor) -> Tensor:
    """x (I_a (x) U) Core: from the input (..., a d) of a layer to (..., b r)."""
    return blockwise(x, U) @ core


def contract_identity(U: Tensor, core: Tensor) -> Tensor:
    """`contract` of the identity (a d, a d), which is never built: (a d, b r)."""
    return blockwise(core.t(), U.t()).t()


def expand(h: Tensor, V: Tensor, scale: float, onto: Tensor) -> Tensor:
    """onto + s h (I_b (x) V)^T: from (..., b r) to (..., b e), computed and added in one pass."""
    out_width, rank = V.shape
    added = torch.addmm(onto.reshape(-1, out_width), h.reshape(-1, rank), V.t(), alpha=scale)
    return added.view(onto.shape)


def expand_(h: Tensor, V: Tensor, scale: float, onto: Tensor) -> Tensor:
    """`expand` in place: the result is written into `onto`, which must be contiguous."""
    out_width, rank = V.shape
    onto.view(-1, out_width).addmm_(h.reshape(-1, rank), V.t(), alpha=scale)
    return onto


def increment(U: Tensor, core: Tensor, V: Tensor, scale: float) -> Tensor:
    """dW (a d, b e) of a layer in the paper's orientation, which is transposed relative to ``nn.Linear``."""
    h = contract_identity(U, core)
    num_out_blocks = core.shape[1] // V.shape[1]
    return expand(h, V, scale, onto=h.new_zeros(h.shape[0], num_out_blocks * V.shape[0]))


def increment_norm(U: Tensor, core: Tensor, V: Tensor, scale: float) -> float:
    """Frobenius norm of dW without building dW: the orthonormal parts of U and V do not change the norm."""
    R_U, R_V = (torch.linalg.qr(factor, mode="r").R.contiguous() for factor in (U, V))
    return increment(R_U, core, R_V, scale).norm().item()


def low_rank_pair(U: Tensor, core: Tensor, V: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Matrices A (q, a d) and B (b e, q) with dW^T = B A exactly and q = min(a, b) r: the increment as a LoRA pair."""
    num_in_blocks, num_out_blocks = core.shape[0] // U.shape[1], core.shape[1] // V.shape[1]
    if num_in_blocks < num_out_blocks:  # the core goes to the output side
        return block_diagonal(num_in_blocks, U).t(), blockwise(scale * core, V.t()).t()
    return contract_identity(U, scale * core).t(), block_diagonal(num_out_blocks, V)


def block_diagonal(count: int, matrix: Tensor) -> Tensor:
    """I (x) matrix with `count` blocks."""
    return matrix if count == 1 else torch.block_diag(*[matrix] * count)


class Decomposition(ABC):
    """How the cores Sigma_k of a stack are written. All decompositions have the same U and V."""

    title: str  # what people call it
    # Names of the factors that make up the cores. The first axis of the last one counts the slices, and every core is
    # linear in it.
    core_factors: tuple[str, ...]

    @abstractmethod
    def core_shapes(self, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the `core_factors`, by name."""

    def step_norm(self, rank: int) -> float:
        """Norm of the first change of dW_k / s from the orthogonal start, per unit of AdamW's learning rate."""
        return math.sqrt(math.prod(self.core_shapes(num_slices=1, rank=rank)[self.core_factors[-1]]))

    def init_core(self, factors: Mapping[str, Tensor]) -> None:
        """Initialise the `core_factors` in place as the authors' code does, if not otherwise as in ``nn.Linear``."""
        for name in self.core_factors:
            init_as_linear(factors[name], fan_in=factors[name].shape[-1])

    @abstractmethod
    def cores(self, factors: Mapping[str, Tensor], first: int, count: int) -> Tensor:
        """Sigma_k of the slices first <= k < first + count, (..., count, r, r). The factors may have leading axes."""

    def terms(self, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """U (..., d, r), the cores Sigma_k of all slices (..., N, r, r) and V (..., e, r) of a stack."""
        last = self.core_factors[-1]
        slice_axis = -len(self.core_shapes(num_slices=1, rank=1)[last])
        return factors["U"], self.cores(factors, 0, factors[last].shape[slice_axis]), factors["V"]

    def norms(
        self, factors: Mapping[str, Mapping[str, Tensor]], slices: Mapping[str, Slices], scale: float
    ) -> dict[str, float]:
        """Frobenius norm of dW of every layer, from the factors by stack and the slices by layer."""
        terms = {
            stack: self.terms({name: factor.to("cpu", torch.float64) for name, factor in factors[stack].items()})
            for stack in {owned.stack for owned in slices.values()}
        }
        norms = {}
        for layer, owned in slices.items():
            U, cores, V = terms[owned.stack]
            core = core_matrix(core_grid(cores.narrow(0, owned.first, owned.count), owned))
            norms[layer] = increment_norm(U, core, V, scale)
        return norms

    def shapes(self, in_width: int, out_width: int, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of all factors of a stack of `num_slices` slices of `in_width` x `out_width`, by name."""
        return {"U": (in_width, rank), "V": (out_width, rank), **self.core_shapes(num_slices, rank)}

    @torch.no_grad()
    def init(self, factors: Mapping[str, Tensor], how: bool | str) -> None:
        """Initialise all factors of a stack in place, as `FacTConfig.init_weights` says.

        The authors start U as the weight of ``nn.Linear(d, r)``; without V = 0, V is that of ``nn.Linear(r, e)``.
        """
        U, V = factors["U"], factors["V"]
        if how == "orthogonal":
            for factor in (U, V):  # in float32, since torch factorizes no half precision
                factor.copy_(nn.init.orthogonal_(torch.empty_like(factor, dtype=torch.float32)))
            self.init_core(factors)
            nn.init.zeros_(factors[self.core_factors[-1]])
        else:
            init_as_linear(U, fan_in=U.shape[0])
            if how:
                nn.init.zeros_(V)
            else:
                init_as_linear(V, fan_in=V.shape[1])
            self.init_core(factors)


class TensorTrain(Decomposition):
    """FacT-TT, eq. 8: the cores are learned directly. 2 d r + N r^2 parameters for a square stack."""

    title = "FacT-TT, tensor-train"
    core_factors = ("Sigma",)

    def core_shapes(self, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"Sigma": (num_slices, rank, rank)}

    def cores(self, factors: Mapping[str, Tensor], first: int, count: int) -> Tensor:
        return factors["Sigma"].narrow(-3, first, count)


class Tucker(Decomposition):
    """FacT-TK, eq. 10: the cores are mixtures of r shared ones. 2 d r + N r + r^3 parameters for a square stack."""

    title = "FacT-TK, Tucker"
    core_factors = ("C", "P")

    def core_shapes(self, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"C": (rank, rank, rank), "P": (num_slices, rank)}

    def init_core(self, factors: Mapping[str, Tensor]) -> None:
        nn.init.xavier_uniform_(factors["C"])
        nn.init.xavier_uniform_(factors["P"])

    def cores(self, factors: Mapping[str, Tensor], first: int, count: int) -> Tensor:
        P, C = factors["P"].narrow(-2, first, count), factors["C"]
        return (P @ C.flatten(-2)).unflatten(-1, C.shape[-2:])


class CanonicalPolyadic(Decomposition):
    """FacT-CP: the cores are diagonal. 2 d r + N r parameters for a square stack.

    It is not in the paper. It is a Tucker decomposition whose t-th shared core has a single nonzero entry, at (t, t).
    """

    title = "FacT-CP, canonical polyadic"
    core_factors = ("W",)

    def core_shapes(self, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"W": (num_slices, rank)}

    def cores(self, factors: Mapping[str, Tensor], first: int, count: int) -> Tensor:
        return torch.diag_embed(factors["W"].narrow(-2, first, count))


DECOMPOSITIONS: dict[str, Decomposition] = {"tt": TensorTrain(), "tk": Tucker(), "cp": CanonicalPolyadic()}


def init_as_linear(matrix: Tensor, fan_in: int) -> None:
    """Uniform in +-1/sqrt(fan_in), the default of ``nn.Linear`` weights."""
    bound = fan_in**-0.5
    nn.init.uniform_(matrix, -bound, bound)
