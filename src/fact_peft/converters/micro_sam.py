"""micro-sam and peft-sam (github.com/computational-cell-analytics), on the ``Sam`` of ``segment_anything``.

q and v of the blocks of the image encoder, or of some of them, each with a U and V of its own, and no scale. Prompt
encoder and mask decoder are trained in full. A checkpoint also holds the rest of the image encoder, which is frozen: it
belongs to the model that the run started from, on which the adapter is to be loaded.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .assembly import DonatedLayer, cores_of
from .checkpoint import take, take_below

ADAPTED = re.compile(r"image_encoder\.blocks\.(\d+)\.attn\.qkv\.q_FacTs\.weight")
FROZEN = re.compile(
    r"image_encoder\.(pos_embed|patch_embed\.proj\.(weight|bias)|neck\.\d\.(weight|bias)|blocks\.\d+\."
    r"(norm[12]\.(weight|bias)|mlp\.lin[12]\.(weight|bias)|attn\.(rel_pos_[hw]|(proj|qkv|qkv\.qkv_proj)\.(weight|bias))))"
)


def read_micro_sam(tensors: dict[str, Tensor]) -> tuple[dict[str, DonatedLayer], dict[str, Tensor]]:
    """Layers and heads of a checkpoint; what is read, and what is frozen, is taken out of `tensors`.

    Raises:
        ValueError: If no block has factors, or one lacks some.
    """
    for name in list(tensors):
        if name.startswith("sam."):
            tensors[name.removeprefix("sam.")] = tensors.pop(name)
    adapted = sorted(int(match[1]) for match in map(ADAPTED.fullmatch, tensors) if match)
    if not adapted:
        raise ValueError(
            "No block of the image encoder has q_FacTs in the checkpoint: it was trained in full, or by another method."
        )
    layers = {}
    for index in adapted:
        layer = f"image_encoder.blocks.{index}.attn.qkv"
        q, v, U, V = (take(tensors, f"{layer}.{name}.weight") for name in ("q_FacTs", "v_FacTs", "FacTu", "FacTv"))
        cores = cores_of(torch.cat([q, v]))
        layers[layer] = DonatedLayer(U.shape[1], 3 * len(V), U.t(), V, cores, parts="qv")
    for name in [name for name in tensors if FROZEN.fullmatch(name)]:
        del tensors[name]
    return layers, take_below(tensors, "prompt_encoder", "mask_decoder")
