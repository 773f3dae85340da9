"""Other factors with the same increments, and how far two sets of factors are apart."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from fact_peft.method.decomposition import Decomposition, core_matrix, increment_norm


def orthogonalized(factors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same increments, exactly, with orthogonal columns of equal length in U and V (and P).

    With U = Q_U R_U and V = Q_V R_V the increments are s Q_U (R_U Sigma_k R_V^T) Q_V^T. U and V keep their Frobenius
    norms. Diagonal cores allow no other basis: of CP the columns of U and V get equal lengths only.

    Args:
        factors: All factors of a stack, under their paper letters.
    """
    if "W" in factors:
        (U, lengths_U), (V, lengths_V) = equal_columns(factors["U"]), equal_columns(factors["V"])
        return {"U": U, "V": V, "W": factors["W"] * (lengths_U * lengths_V)}
    (U, R_U), (V, R_V) = orthogonal_columns(factors["U"]), orthogonal_columns(factors["V"])
    if "Sigma" in factors:
        return {"U": U, "V": V, "Sigma": R_U @ factors["Sigma"] @ R_V.mT}
    P, R_P = orthogonal_columns(factors["P"])
    return {"U": U, "V": V, "C": torch.einsum("tu,uij->tij", R_P, R_U @ factors["C"] @ R_V.mT), "P": P}


def orthogonal_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` (n, r) as orthogonal columns (n, r) of its Frobenius norm, times (r, r)."""
    num_rows, rank = matrix.shape
    length = matrix.norm() / rank**0.5
    if num_rows < rank or length == 0:
        return matrix, torch.eye(rank, dtype=matrix.dtype)
    Q, R = torch.linalg.qr(matrix)
    return Q * length, R / length


def equal_columns(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`matrix` (n, r) as columns (n, r) of equal length and its Frobenius norm, times (r,)."""
    lengths = matrix.norm(dim=0) * (matrix.shape[1] ** 0.5 / matrix.norm().clamp_min(torch.finfo(matrix.dtype).tiny))
    return matrix / torch.where(lengths > 0, lengths, 1), lengths


def distance(decomposition: Decomposition, factors: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> float:
    """Frobenius norm of U Sigma_k V^T - U' Sigma'_k V'^T over all slices k of a stack: of increments of scale 1."""
    (U, ours, V), (their_U, theirs, their_V) = decomposition.terms(factors), decomposition.terms(others)
    U, V = torch.cat([U, their_U], dim=1), torch.cat([V, their_V], dim=1)
    cores = torch.cat(
        [nn.functional.pad(ours, (0, len(theirs[0]), 0, 0)), nn.functional.pad(-theirs, (len(ours[0]), 0, 0, 0))],
        dim=1,
    )
    return increment_norm(U, core_matrix(cores[None]), V, scale=1.0)
