"""MA-SAM (github.com/cchen-cc/MA-SAM), what its ``save_parameters`` writes, on the ``Sam`` of ``segment_anything``.

q and v of every block of the image encoder, one U and V; prompt encoder and mask decoder are trained in full. Its 3D
convolutions, ``.adapter_``, are no part of FacT.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .assembly import DonatedLayer, cores_of
from .checkpoint import take, take_below


def read_ma_sam(tensors: dict[str, Tensor]) -> tuple[dict[str, DonatedLayer], dict[str, Tensor]]:
    """Layers and heads of a checkpoint; what is read is taken out of `tensors`."""
    U, V = take(tensors, "image_encoder.FacTu.weight").t(), take(tensors, "image_encoder.FacTv.weight")
    width = U.shape[0]
    layers = {}
    index = 0
    while index == 0 or f"q_FacTs_{index:03d}" in tensors:
        q, v = (take(tensors, f"{name}_FacTs_{index:03d}") for name in "qv")
        cores = cores_of(torch.cat([q, v]))
        layers[f"image_encoder.blocks.{index}.attn.qkv"] = DonatedLayer(width, 3 * width, U, V, cores, parts="qv")
        index += 1
    return layers, take_below(tensors, "prompt_encoder", "mask_decoder")
