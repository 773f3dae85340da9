"""The authors' own code: ``FacT/fact_tt.py`` and ``FacT/fact_tk.py`` of github.com/JieShibo/PETL-ViT, on timm's ViT.

One U and V; in every block a core each for q, k, v and proj, and four each for fc1 and fc2. In the Tucker script the
cores of the MLP are reshaped without naming axes, so that slices and ranks interleave, and the paper's P and C cannot
express them. They are r x r cores all the same, one for each slice: a Tucker checkpoint becomes a tensor-train adapter
with the very increments that it has there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .assembly import DonatedLayer, cores_of
from .checkpoint import take, take_below

# What in their scripts is typed in: the MLP is four times as wide as the token stream, 4 + 4 + 4 slices in a block.
EXPANSION = 4
SLICES_PER_BLOCK = 12


def read_authors(tensors: dict[str, Tensor]) -> tuple[dict[str, DonatedLayer], dict[str, Tensor]]:
    """Layers and heads of a checkpoint; what is read is taken out of `tensors`."""
    if "FacTp" in tensors:
        tensors.update(tensor_train_cores(take(tensors, "FacTc"), take(tensors, "FacTp")))
    U, V = take(tensors, "FacTu.weight").t(), take(tensors, "FacTv.weight")
    width = U.shape[0]
    layers = {}
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
            layers[f"{block}.{name}"] = DonatedLayer(in_features, out_features, U, V, cores_of(weight))
        index += 1
    return layers, take_below(tensors, "head", "head_dist")


def tensor_train_cores(C: Tensor, P: Tensor) -> dict[str, Tensor]:
    """The weights of the tensor-train script that have the increments of the Tucker one.

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
        # As in their script: the axes that are merged here are one of the core and that of the slices.
        weights[f"{block}.mlp.fc1_FacTs.weight"] = up.reshape(rank, EXPANSION * rank).t()
        weights[f"{block}.mlp.fc2_FacTs.weight"] = down.reshape(rank, EXPANSION * rank)
    return weights
