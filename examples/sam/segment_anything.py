"""Convert a SAM of transformers for the tools that open files of the package segment_anything."""

import re

from torch import Tensor
from transformers import SamModel

# From names of transformers to names of segment_anything. The patterns are applied in this order.
SEGMENT_ANYTHING = {
    r"^shared_image_embedding\.positional_embedding": "prompt_encoder.pe_layer.positional_encoding_gaussian_matrix",
    r"^vision_encoder\.layers": "image_encoder.blocks",
    r"^vision_encoder": "image_encoder",
    r"patch_embed\.projection": "patch_embed.proj",
    r"neck\.conv1": "neck.0",
    r"neck\.layer_norm1": "neck.1",
    r"neck\.conv2": "neck.2",
    r"neck\.layer_norm2": "neck.3",
    r"mask_embed\.conv1": "mask_downscaling.0",
    r"mask_embed\.layer_norm1": "mask_downscaling.1",
    r"mask_embed\.conv2": "mask_downscaling.3",
    r"mask_embed\.layer_norm2": "mask_downscaling.4",
    r"mask_embed\.conv3": "mask_downscaling.6",
    r"^prompt_encoder\.point_embed": "prompt_encoder.point_embeddings",
    r"upscale_conv1": "output_upscaling.0",
    r"upscale_layer_norm": "output_upscaling.1",
    r"upscale_conv2": "output_upscaling.3",
    r"(mlps\.\d|iou_prediction_head)\.layers\.0": r"\1.layers.1",
    r"(mlps\.\d|iou_prediction_head)\.proj_in": r"\1.layers.0",
    r"(mlps\.\d|iou_prediction_head)\.proj_out": r"\1.layers.2",
    r"layer_norm": "norm",
}


def segment_anything_weights(sam: SamModel) -> dict[str, Tensor]:
    """The weights of a SAM under the names of the package segment_anything, which most tools expect."""
    renamed = {}
    for name, weight in sam.state_dict().items():
        for pattern, replacement in SEGMENT_ANYTHING.items():
            name = re.sub(pattern, replacement, name)
        renamed[name] = weight.cpu()
    # transformers lists the position embedding a second time, as part of the prompt encoder.
    renamed.pop("prompt_encoder.shared_embedding.positional_embedding", None)
    return renamed
