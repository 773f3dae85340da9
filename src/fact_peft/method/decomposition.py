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

from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .tensorization import Slices


def blockwise(x: Tensor, matrix: Tensor) -> Tensor:
    """x (I (x) matrix): multiply every block of `x` (..., n p) by the same `matrix` (p, q), to (..., n q)."""
    width, out_width = matrix.shape
    # Folded by hand: `matmul` decides by requires_grad how to, so that its rounding differs with and without gradients.
    product = x.reshape(-1, width) @ matrix
    return product.view(*x.shape[:-1], x.shape[-1] // width * out_width)


def core_grid(cores: Tensor, slices: Slices) -> Tensor:
    """The cores (..., count, r, r) of a layer's `slices` by block, (..., a, b, r, r): zeros in one without slice."""
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
    """x (I_a (x) U) Core: from the layer's input (..., a d) to (..., b r)."""
    return blockwise(x, U) @ core


def contract_identity(U: Tensor, core: Tensor) -> Tensor:
    """`contract` of the identity (a d, a d), which is never built: (a d, b r)."""
    return blockwise(core.t(), U.t()).t()


def expand(h: Tensor, V: Tensor, scale: float, onto: Tensor) -> Tensor:
    """onto + s h (I_b (x) V)^T: from (..., b r) to (..., b e), added to `onto` in the pass that computes it."""
    out_width, rank = V.shape
    added = torch.addmm(onto.reshape(-1, out_width), h.reshape(-1, rank), V.t(), alpha=scale)
    return added.view(onto.shape)


def expand_(h: Tensor, V: Tensor, scale: float, onto: Tensor) -> Tensor:
    """`expand`, written into `onto` itself, which must be contiguous."""
    out_width, rank = V.shape
    onto.view(-1, out_width).addmm_(h.reshape(-1, rank), V.t(), alpha=scale)
    return onto


def increment(U: Tensor, core: Tensor, V: Tensor, scale: float) -> Tensor:
    """dW (a d, b e) of a layer, in the paper's orientation: the transpose of an ``nn.Linear`` weight's."""
    h = contract_identity(U, core)
    num_out_blocks = core.shape[1] // V.shape[1]
    return expand(h, V, scale, onto=h.new_zeros(h.shape[0], num_out_blocks * V.shape[0]))


def increment_norm(U: Tensor, core: Tensor, V: Tensor, scale: float) -> float:
    """Frobenius norm of dW, which is never built: the orthonormal parts of U and V do not change it."""
    R_U, R_V = (torch.linalg.qr(factor, mode="r").R.contiguous() for factor in (U, V))
    return increment(R_U, core, R_V, scale).norm().item()


def increment_norms(
    terms: Mapping[str, tuple[Tensor, Tensor, Tensor]], slices: Mapping[str, Slices], scale: float
) -> dict[str, float]:
    """Frobenius norm of dW by layer, of `terms` by stack as `Decomposition.terms` gives them and `slices` by layer."""
    norms = {}
    for layer, owned in slices.items():
        U, cores, V = terms[owned.stack]
        core = core_matrix(core_grid(cores.narrow(0, owned.first, owned.count), owned))
        norms[layer] = increment_norm(U, core, V, scale)
    return norms


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
    """How the cores Sigma_k of a stack are written. U and V are the same for every member of the family.

    Attributes:
        title: What people call it.
        core_factors: Names of the factors behind the cores. Every core is linear in the last one.
    """

    title: str
    core_factors: tuple[str, ...]

    @abstractmethod
    def core_shapes(self, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Shapes of the `core_factors`."""

    @abstractmethod
    def init_core(self, factors: Mapping[str, Tensor]) -> None:
        """Fill those factors in place as the authors' code does."""

    @abstractmethod
    def cores(self, factors: Mapping[str, Tensor], first: int, count: int) -> Tensor:
        """Sigma_k for the slices first <= k < first + count: (..., count, r, r) of factors with axes in front."""

    @abstractmethod
    def num_slices(self, factors: Mapping[str, Tensor]) -> int:
        """N, the number of slices of the stack that the factors are of."""

    def terms(self, factors: Mapping[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """U (..., d, r), the cores Sigma_k of all slices (..., N, r, r) and V (..., e, r) of a stack's factors."""
        return factors["U"], self.cores(factors, 0, self.num_slices(factors)), factors["V"]

    def shapes(self, in_width: int, out_width: int, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of all factors of a stack of `num_slices` slices of `in_width` x `out_width`."""
        return {"U": (in_width, rank), "V": (out_width, rank), **self.core_shapes(num_slices, rank)}

    @torch.no_grad()
    def init(self, factors: Mapping[str, Tensor], how: bool | str) -> None:
        """Initialise in place.

        Args:
            factors: All factors of a stack.
            how: True, as the authors: U as the weight of ``nn.Linear(d, r)``, the core by `init_core`, and V = 0.
                False: V as the weight of ``nn.Linear(r, e)``, so that dW is not zero. ``"orthogonal"``: orthonormal
                columns in U and V, and every core zero.
        """
        U, V = factors["U"], factors["V"]
        if how == "orthogonal":
            init_orthonormal(U)
            init_orthonormal(V)
        else:
            init_as_linear(U, fan_in=U.shape[0])
            if how:
                nn.init.zeros_(V)
            else:
                init_as_linear(V, fan_in=V.shape[1])
        self.init_core(factors)
        if how == "orthogonal":
            nn.init.zeros_(factors[self.core_factors[-1]])


class TensorTrain(Decomposition):
    """FacT-TT, eq. 8: the cores are learned as they are. 2 d r + N r^2 parameters for a square stack."""

    title = "FacT-TT, tensor-train"
    core_factors = ("Sigma",)

    def core_shapes(self, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"Sigma": (num_slices, rank, rank)}

    def init_core(self, factors: Mapping[str, Tensor]) -> None:
        init_as_linear(factors["Sigma"], fan_in=factors["Sigma"].shape[-1])

    def cores(self, factors: Mapping[str, Tensor], first: int, count: int) -> Tensor:
        return factors["Sigma"].narrow(-3, first, count)

    def num_slices(self, factors: Mapping[str, Tensor]) -> int:
        return factors["Sigma"].shape[-3]


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

    def num_slices(self, factors: Mapping[str, Tensor]) -> int:
        return factors["P"].shape[-2]


class CanonicalPolyadic(Decomposition):
    """FacT-CP: the cores are diagonal. 2 d r + N r parameters for a square stack.

    Not in the paper; the next member of its family: a Tucker whose shared cores C[t] have one number each.
    """

    title = "FacT-CP, canonical polyadic"
    core_factors = ("W",)

    def core_shapes(self, num_slices: int, rank: int) -> dict[str, tuple[int, ...]]:
        return {"W": (num_slices, rank)}

    def init_core(self, factors: Mapping[str, Tensor]) -> None:
        init_as_linear(factors["W"], fan_in=factors["W"].shape[-1])

    def cores(self, factors: Mapping[str, Tensor], first: int, count: int) -> Tensor:
        return torch.diag_embed(factors["W"].narrow(-2, first, count))

    def num_slices(self, factors: Mapping[str, Tensor]) -> int:
        return factors["W"].shape[-2]


DECOMPOSITIONS: dict[str, Decomposition] = {"tt": TensorTrain(), "tk": Tucker(), "cp": CanonicalPolyadic()}


def init_as_linear(matrix: Tensor, fan_in: int) -> None:
    """Uniform in +-1/sqrt(fan_in), the default of ``nn.Linear`` weights."""
    bound = fan_in**-0.5
    nn.init.uniform_(matrix, -bound, bound)


def init_orthonormal(matrix: Tensor) -> None:
    """Random orthonormal columns."""
    # In float32, since torch factorizes no half precision.
    matrix.copy_(nn.init.orthogonal_(torch.empty_like(matrix, dtype=torch.float32)))
