"""The authors' own code: ``FacT/fact_tt.py`` and ``FacT/fact_tk.py`` of github.com/JieShibo/PETL-ViT, on timm's ViT.

There is one U and V. In every block q, k, v and proj have one core each, fc1 and fc2 four each. The Tucker script
reshapes the cores of the MLP so that slices and ranks interleave, which the paper's P and C cannot express. There is
still one r x r core for each slice, so a Tucker checkpoint becomes a tensor-train adapter with the same increments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .assembly import SourceLayer, cores_of, take, take_below

# Constants of their scripts: the MLP is four times as wide as the token stream, and a block has 4 + 4 + 4 slices.
EXPANSION = 4
SLICES_PER_BLOCK = 12


def read_authors(tensors: dict[str, Tensor]) -> tuple[dict[str, SourceLayer], dict[str, Tensor]]:
    """Layers and heads of a checkpoint; what is read is taken out of `tensors`."""
    if "FacTp" in tensors:
        tensors.update(tensor_train_cores(take(tensors, "FacTc"), take(tensors, "FacTp")))
    U, V = take(tensors, "FacTu.weight").t(), take(tensors, "FacTv.weight")
    width = U.shape[0]
    layers: dict[str, SourceLayer] = {}
    index = 0
    while index == 0 or f"blocks.{index}.attn.q_FacTs.weight" in tensors:
        block = f"blocks.{index}"
        qkv = torch.cat([take(tensors, f"{block}.attn.{name}_FacTs.weight") for name in "qkv"])
        proj = take(tensors, f"{block}.attn.proj_FacTs.weight")
        fc1, fc2 = (take(tensors, f"{block}.mlp.{name}_FacTs.weight") for name in ("fc1", "fc2"))
        for name, in_features, out_features, weight in (
            ("attn.qkv", width, 3 * width, qkv),
            ("attn.proj", width, width, proj),
            ("mlp.fc1", width, EXPANSION * width, fc1),
            ("mlp.fc2", EXPANSION * width, width, fc2),
        ):
            layers[f"{block}.{name}"] = SourceLayer(in_features, out_features, U, V, cores_of(weight))
        index += 1
    return layers, take_below(tensors, "head", "head_dist")


def tensor_train_cores(C: Tensor, P: Tensor) -> dict[str, Tensor]:
    """The cores of a Tucker checkpoint under the names and in the shapes of the tensor-train script.

    Args:
        C: ``FacTc`` (r, r, r), whose last axis is mixed.
        P: ``FacTp`` (r, slices).
    """
    rank, num_slices = P.shape
    weights = {}
    for index in range(num_slices // SLICES_PER_BLOCK):
        mixed = C @ P[:, index * SLICES_PER_BLOCK : (index + 1) * SLICES_PER_BLOCK]
        attention, up, down = mixed.split([4, EXPANSION, EXPANSION], dim=2)
        block = f"blocks.{index}"
        for name, core in zip(("q", "k", "v", "proj"), attention.unbind(2), strict=True):
            weights[f"{block}.attn.{name}_FacTs.weight"] = core.t()
        # As in their script, an axis of the core is merged with that of the slices.
        weights[f"{block}.mlp.fc1_FacTs.weight"] = up.reshape(rank, EXPANSION * rank).t()
        weights[f"{block}.mlp.fc2_FacTs.weight"] = down.reshape(rank, EXPANSION * rank)
    return weights
