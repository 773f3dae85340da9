"""Detectors whose heads are tied to each other and which have no embeddings to ask for, so that PEFT cannot wrap them.

They adapt, train, come back from disk and merge as every other model. `targets` is read from the models: the number of
linear layers in the blocks of encoder and decoder (and of the backbone, where that is a transformer).
"""

import copy

import pytest
import torch
import transformers
from architectures import DETR_LAYERS
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fact_peft import FacTConfig, FacTLinear

RESNET = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "depths": [1, 1, 1, 1],
    "layer_type": "basic",
    "out_features": ["stage2", "stage3", "stage4"],
}
HGNET = {
    "model_type": "hgnet_v2",
    "stem_channels": [3, 8, 8],
    "embedding_size": 8,
    "hidden_sizes": [8, 8, 16, 16],
    "stage_in_channels": [8, 8, 8, 16],
    "stage_mid_channels": [8, 8, 8, 8],
    "stage_out_channels": [8, 8, 16, 16],
    "stage_num_blocks": [1, 1, 1, 1],
    "stage_numb_of_layers": [1, 1, 1, 1],
    "stage_downsample": [False, True, True, True],
    "stage_light_block": [False, False, True, True],
    "stage_kernel_size": [3, 3, 3, 3],
    "out_features": ["stage2", "stage3", "stage4"],
}
SWIN = {
    "model_type": "swin",
    "embed_dim": 16,
    "depths": [1, 1, 1, 1],
    "num_heads": [2, 2, 2, 2],
    "image_size": 64,
    "patch_size": 4,
    "window_size": 2,
    "out_features": ["stage2", "stage3", "stage4"],
}
BERT = {
    "model_type": "bert",
    "vocab_size": 50,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
}
REPVIT = {
    "model_type": "timm_wrapper",
    "architecture": "repvit_m1.dist_in1k",
    "num_classes": 2,
    "label_names": ["a", "b"],
    "model_args": {
        "in_chans": 3,
        "features_only": True,
        "out_indices": [0, 1, 2, 3],
        "embed_dim": (8, 16, 16, 16),
        "depth": (1, 1, 1, 1),
    },
}
RT_DETR = {
    "encoder_hidden_dim": 32,
    "encoder_in_channels": [8, 16, 16],
    "decoder_in_channels": [32, 32, 32],
    "num_denoising": 0,
    **DETR_LAYERS,
    "encoder_layers": 1,
}
GROUNDING = {
    "d_model": 32,
    "backbone_config": SWIN,
    "text_config": BERT,
    "encoder_n_points": 2,
    "decoder_n_points": 2,
    "max_text_len": 8,
    **DETR_LAYERS,
}
EDGE_TAM = {
    "vision_config": {
        "backbone_config": REPVIT,
        "backbone_channel_list": [16, 16, 16, 8],
        "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
        "fpn_hidden_size": 16,
    },
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
    "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 16},
}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 64, 64)}


def image_and_text() -> dict[str, Tensor]:
    tokens = {"input_ids": torch.tensor([[1, 5, 6, 2]] * 2), "attention_mask": torch.ones(2, 4, dtype=torch.long)}
    return image() | tokens


def image_and_point() -> dict[str, Tensor]:
    return image() | {"input_points": torch.tensor([[[[8.0, 8.0]]]] * 2)}


# Class, settings, inputs, targets.
DETECTORS = {
    "RT-DETRv2": (
        "RTDetrV2ForObjectDetection",
        {**RT_DETR, "d_model": 32, "backbone_config": RESNET},
        image,
        6 + 2 * 10,
    ),
    "D-FINE": (
        "DFineForObjectDetection",
        {**RT_DETR, "d_model": 32, "backbone_config": HGNET, "decoder_n_points": [2, 2, 2]},
        image,
        6 + 2 * 8,
    ),
    "Deformable DETR": (
        "DeformableDetrForObjectDetection",
        {
            **DETR_LAYERS,
            "d_model": 32,
            "backbone_config": RESNET,
            "encoder_n_points": 2,
            "decoder_n_points": 2,
            "dropout": 0.0,
        },
        image,
        2 * 6 + 2 * 10,
    ),
    # The second layer of its decoder has no projection of the query positions.
    "DAB-DETR": (
        "DabDetrForObjectDetection",
        {**DETR_LAYERS, "hidden_size": 32, "backbone_config": {**RESNET, "out_features": ["stage4"]}},
        image,
        2 * 6 + 15 + 14,
    ),
    "Grounding DINO": ("GroundingDinoForObjectDetection", GROUNDING, image_and_text, 4 * 6 + 2 * 6 + 2 * 18 + 2 * 14),
    "MM-Grounding DINO": (
        "MMGroundingDinoForObjectDetection",
        GROUNDING,
        image_and_text,
        4 * 6 + 2 * 6 + 2 * 18 + 2 * 14,
    ),
    # Its image encoder is made of convolutions, so the mask decoder is all there is.
    "EdgeTAM": ("EdgeTamModel", EDGE_TAM, image_and_point, 2 * 14),
    "PP-DocLayoutV4": (
        "PPDocLayoutV4ForObjectDetection",
        {**RT_DETR, "hidden_size": 32, "backbone_config": HGNET},
        image,
        6 + 2 * 10,
    ),
}


def outputs(model: nn.Module, inputs: dict[str, Tensor]) -> list[Tensor]:
    torch.manual_seed(0)
    leaves = tree_leaves(model(**inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


@pytest.mark.filterwarnings("ignore")  # of transformers, about its own models
@pytest.mark.parametrize("name", DETECTORS)
def test_detector_trains_reloads_and_merges(name: str, tmp_path) -> None:
    if name == "EdgeTAM":  # whose image encoder is a model of timm
        pytest.importorskip("timm")
    class_name, settings, make_inputs, targets = DETECTORS[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    # In float64, since offsets of deformable attention and the choice of queries amplify rounding. DAB-DETR makes
    # float32 itself.
    dtype, tolerance = (torch.float32, 1e-4) if name == "DAB-DETR" else (torch.float64, 1e-7)
    model = model_class(model_class.config_class(**settings)).to(dtype).eval()
    for parameter in model.parameters():  # untrained heads are zero, and so is what they put out
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    inputs = {key: value.to(dtype) if value.is_floating_point() else value for key, value in make_inputs().items()}
    fresh = copy.deepcopy(model)
    plain = outputs(model, inputs)
    adapted = get_peft_model(model, FacTConfig(rank=2, init_weights=False), autocast_adapter_dtype=False)
    assert sum(isinstance(module, FacTLinear) for module in adapted.modules()) == targets

    before = {key: value.clone() for key, value in adapted.state_dict().items()}
    trained = {key: parameter for key, parameter in adapted.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    adapted.train()
    for _ in range(2):
        optimizer.zero_grad()
        differentiable = [leaf for leaf in outputs(adapted, inputs) if leaf.requires_grad]
        torch.stack([(leaf * torch.randn_like(leaf)).sum() for leaf in differentiable]).sum().backward()
        assert all(parameter.grad is not None and parameter.grad.any() for parameter in trained.values())
        optimizer.step()
    adapted.eval()
    moved = {key for key, value in adapted.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == trained.keys()  # nothing frozen, running statistics among it

    expected = outputs(adapted, inputs)
    assert any((one - other)[other.isfinite()].abs().max() > 1e-4 for one, other in zip(expected, plain, strict=True))
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path, autocast_adapter_dtype=False).eval()
    for one, other in zip(outputs(loaded, inputs), expected, strict=True):
        assert torch.equal(one, other)
    for one, other in zip(outputs(adapted.merge_and_unload(), inputs), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
