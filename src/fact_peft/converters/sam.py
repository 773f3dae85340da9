"""FacT on the ``Sam`` of ``segment_anything``: MA-SAM, micro-sam and peft-sam.

All of them adapt q and v in blocks of the image encoder, and train prompt encoder and mask decoder in full.

- MA-SAM (github.com/cchen-cc/MA-SAM, the file of its ``save_parameters``) has one U and V. Its 3D convolutions,
  ``.adapter_``, are no part of FacT.
- micro-sam and peft-sam (github.com/computational-cell-analytics) have a U and V in every adapted block, and no scale.
  Their checkpoints also hold the rest of the image encoder. It is frozen and belongs to the model that the run started
  from, on which the adapter is to be loaded.
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from .assembly import SourceLayer, cores_of, take, take_below

HEADS = ("prompt_encoder", "mask_decoder")
ADAPTED = re.compile(r"image_encoder\.blocks\.(\d+)\.attn\.qkv\.q_FacTs\.weight")
FROZEN = re.compile(
    r"image_encoder\.(pos_embed|patch_embed\.proj\.(weight|bias)|neck\.\d\.(weight|bias)|blocks\.\d+\."
    r"(norm[12]\.(weight|bias)|mlp\.lin[12]\.(weight|bias)|attn\.(rel_pos_[hw]|(proj|qkv|qkv\.qkv_proj)\.(weight|bias))))"
)


def qkv(U: Tensor, V: Tensor, q: Tensor, v: Tensor) -> SourceLayer:
    """The layer that makes q, k and v, from U^T (r, d), V (e, r) and the cores' weights (r, r) of q and v."""
    return SourceLayer(U.shape[1], 3 * len(V), U.t(), V, cores_of(torch.cat([q, v])), parts="qv")


def read_ma_sam(tensors: dict[str, Tensor]) -> tuple[dict[str, SourceLayer], dict[str, Tensor]]:
    """Layers and heads of a checkpoint of MA-SAM; what is read is taken out of `tensors`."""
    U, V = (take(tensors, f"image_encoder.{name}.weight") for name in ("FacTu", "FacTv"))
    layers: dict[str, SourceLayer] = {}
    while not layers or f"q_FacTs_{len(layers):03d}" in tensors:
        q, v = (take(tensors, f"{name}_FacTs_{len(layers):03d}") for name in "qv")
        layers[f"image_encoder.blocks.{len(layers)}.attn.qkv"] = qkv(U, V, q, v)
    return layers, take_below(tensors, *HEADS)


def read_micro_sam(tensors: dict[str, Tensor]) -> tuple[dict[str, SourceLayer], dict[str, Tensor]]:
    """Layers and heads of a checkpoint of micro-sam; what is read, and what is frozen, is taken out of `tensors`.

    Raises:
        ValueError: If no block has factors, or one lacks some.
    """
    for name in list(tensors):
        tensors[name.removeprefix("sam.")] = tensors.pop(name)
    adapted = sorted(int(match[1]) for match in map(ADAPTED.fullmatch, tensors) if match)
    if not adapted:
        raise ValueError(
            "No block of the image encoder has q_FacTs in the checkpoint: it was trained in full, or by another method."
        )
    layers = {}
    for index in adapted:
        layer = f"image_encoder.blocks.{index}.attn.qkv"
        names = ("FacTu", "FacTv", "q_FacTs", "v_FacTs")
        layers[layer] = qkv(*(take(tensors, f"{layer}.{name}.weight") for name in names))
    for name in [name for name in tensors if FROZEN.fullmatch(name)]:
        del tensors[name]
    return layers, take_below(tensors, *HEADS)
