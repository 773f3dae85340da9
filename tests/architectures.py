"""The architectures FacT is tested on, each with the linear layers it must find there.

What an entry says of a model was written down from reading the model, not from what the library finds: `targets`
matches the full names of the linear layers inside the transformer blocks, `count` is how many there are in the tiny
model, and `heads` are the modules trained in full beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

Inputs = dict[str, Tensor]


@dataclass(frozen=True)
class Architecture:
    """A model class with the settings that make it tiny.

    Attributes:
        model: Name of a class of transformers, or ``"timm/<model>"``, ``"torchvision/<class>"``, or one of open_clip.
        tiny: Settings of the tiny model: arguments of its config, or of ``timm.create_model``.
        inputs: Makes a batch for the tiny model.
        targets: Regex for the linear layers inside the blocks, nothing else.
        count: Number of these layers in the tiny model: layers per block x blocks.
        heads: Modules to save.
        full: Settings of the model in full size, if not the defaults.
        no_gradient: Regex for targeted layers that the output of the random model does not depend on; the entry says
            why.
        needs: Packages that the model wants beside transformers; a test that builds it is skipped without them.
        full_needs: Those that only the model in full size wants.
    """

    model: str
    tiny: dict[str, Any]
    inputs: Callable[[], Inputs]
    targets: str
    count: int
    heads: tuple[str, ...] = ()
    full: dict[str, Any] = field(default_factory=dict)
    no_gradient: str = ""
    needs: tuple[str, ...] = ()
    full_needs: tuple[str, ...] = ()

    def build(self) -> nn.Module:
        """The tiny model with random weights, all of them: untrained models have parts that do nothing yet, such as
        norms and biases at zero."""
        model = self._build(self.tiny)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
        return model

    def build_full(self) -> nn.Module:
        """The model in its default size."""
        for package in self.full_needs:
            pytest.importorskip(package)
        return self._build(self.full)

    def _build(self, settings: dict[str, Any]) -> nn.Module:
        library, _, name = self.model.rpartition("/")
        if library == "timm":
            return pytest.importorskip("timm").create_model(name, **settings).eval()
        if library == "torchvision":
            return getattr(pytest.importorskip("torchvision").models, name)(**settings).eval()
        if library == "open_clip":
            return getattr(pytest.importorskip("open_clip").transformer, name)(**settings).eval()
        for package in self.needs:
            pytest.importorskip(package)
        model_class = getattr(transformers, name)
        return model_class(model_class.config_class(**settings)).eval()


def image(size: int = 32, name: str = "pixel_values") -> Callable[[], Inputs]:
    """Two square images."""
    return lambda: {name: torch.randn(2, 3, size, size)}


def video(frames: int, size: int = 32, name: str = "pixel_values") -> Callable[[], Inputs]:
    """Two square videos."""
    return lambda: {name: torch.randn(2, frames, 3, size, size)}


def tokens() -> Inputs:
    """Two sequences of eight tokens."""
    return {"input_ids": torch.randint(3, 50, (2, 8)), "attention_mask": torch.ones(2, 8, dtype=torch.long)}


def patches() -> Inputs:
    """Two images of 4 x 4 flattened patches, as the processor of SigLIP 2 makes them."""
    return {
        "pixel_values": torch.randn(2, 16, 3 * 8 * 8),
        "pixel_attention_mask": torch.ones(2, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4], [4, 4]]),
    }


def image_and_noise() -> Inputs:
    """Two images, and the noise that decides which patches a masked autoencoder sees."""
    return image()() | {"noise": torch.rand(2, 16)}


def masked_video() -> Inputs:
    """Two videos of 2 x 4 x 4 patches, half of them masked."""
    return video(4)() | {"bool_masked_pos": torch.arange(32).repeat(2, 1) % 2 == 0}


def prompted_image(size: int) -> Callable[[], Inputs]:
    """Two images with one point on each."""
    return lambda: image(size)() | {"input_points": torch.tensor([[[[8.0, 8.0]]]] * 2)}


# The same four layouts come back under many names.
VIT_LAYERS = r"(attention\.[qkvo]_proj|mlp\.fc[12])"
CLIP_LAYERS = r"(self_attn\.([qkv]|out)_proj|mlp\.fc[12])"
BERT_LAYERS = r"(attention\.(self|attention)\.(query|key|value)|(attention\.output|intermediate|output)\.dense)"
TIMM_LAYERS = r"(attn\.(qkv|proj)|mlp\.fc[12])"

VIT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
}
SWIN = {"embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "image_size": 32, "patch_size": 4, "window_size": 4}
PYRAMID = {
    "num_encoder_blocks": 2,
    "depths": [2, 2],
    "hidden_sizes": [16, 32],
    "num_attention_heads": [2, 4],
    "mlp_ratios": [2, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
}
SAM_HEAD = {
    "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8, "mask_input_channels": 4},
    "mask_decoder_config": {
        "hidden_size": 16,
        "mlp_dim": 32,
        "num_attention_heads": 2,
        "iou_head_hidden_dim": 16,
    },
}
RESNET = {"model_type": "resnet", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
DETR_LAYERS = {
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "num_queries": 4,
}

CLASSIFIER = ("classifier",)

VISION = {
    "ViT": Architecture(
        "ViTForImageClassification", VIT, image(), rf"vit\.layers\.\d+\.{VIT_LAYERS}", 2 * 6, CLASSIFIER
    ),
    "DeiT": Architecture(
        "DeiTForImageClassificationWithTeacher",
        VIT,
        image(),
        rf"deit\.layers\.\d+\.{VIT_LAYERS}",
        2 * 6,
        ("cls_classifier", "distillation_classifier"),
    ),
    "BEiT": Architecture(
        "BeitForImageClassification", VIT, image(), rf"beit\.layers\.\d+\.{VIT_LAYERS}", 2 * 6, CLASSIFIER
    ),
    "Data2VecVision": Architecture(
        "Data2VecVisionForImageClassification",
        VIT,
        image(),
        rf"data2vec_vision\.encoder\.layer\.\d+\.{BERT_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    # The decoder exists for pre-training only.
    "ViTMAE": Architecture(
        "ViTMAEForPreTraining",
        VIT
        | {
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        image_and_noise,
        rf"vit\.layers\.\d+\.{VIT_LAYERS}",
        2 * 6,
    ),
    "ViTMSN": Architecture(
        "ViTMSNForImageClassification", VIT, image(), rf"vit\.layers\.\d+\.{VIT_LAYERS}", 2 * 6, CLASSIFIER
    ),
    "DINOv2": Architecture(
        "Dinov2ForImageClassification", VIT, image(), rf"dinov2\.encoder\.layer\.\d+\.{VIT_LAYERS}", 2 * 6, CLASSIFIER
    ),
    "DINOv2 with registers": Architecture(
        "Dinov2WithRegistersForImageClassification",
        VIT,
        image(),
        rf"dinov2_with_registers\.encoder\.layer\.\d+\.{VIT_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    "DINOv3": Architecture(
        "DINOv3ViTModel",
        VIT | {"num_register_tokens": 2},
        image(),
        r"model\.layer\.\d+\.(attention\.[qkvo]_proj|mlp\.(up|down)_proj)",
        2 * 6,
    ),
    "DINOv3, gated": Architecture(
        "DINOv3ViTModel",
        VIT | {"use_gated_mlp": True},
        image(),
        r"model\.layer\.\d+\.(attention\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        2 * 7,
        full={"use_gated_mlp": True},
    ),
    "I-JEPA": Architecture(
        "IJepaForImageClassification", VIT, image(), rf"ijepa\.layers\.\d+\.{VIT_LAYERS}", 2 * 6, CLASSIFIER
    ),
    "CLIP vision": Architecture(
        "CLIPForImageClassification",
        {"vision_config": VIT},
        image(),
        rf"vision_model\.encoder\.layers\.\d+\.{CLIP_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    # Both towers are adapted; the projections into the common space are heads.
    "CLIP": Architecture(
        "CLIPModel",
        {
            "vision_config": VIT,
            "text_config": {
                "vocab_size": 50,
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "max_position_embeddings": 8,
                "eos_token_id": 2,
            },
        },
        lambda: image()() | tokens(),
        rf"(vision|text)_model\.encoder\.layers\.\d+\.{CLIP_LAYERS}",
        (2 + 2) * 6,
    ),
    "MetaCLIP 2 vision": Architecture(
        "MetaClip2ForImageClassification",
        {"vision_config": VIT},
        image(),
        rf"vision_model\.encoder\.layers\.\d+\.{CLIP_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    "SigLIP vision": Architecture(
        "SiglipForImageClassification",
        {"vision_config": VIT},
        image(),
        rf"vision_model\.encoder\.layers\.\d+\.{CLIP_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    # With its attention pooling, which is a head: its nn.MultiheadAttention does not call out_proj, and its MLP, though
    # shaped like a block's, is no block.
    "SigLIP pooled": Architecture("SiglipVisionModel", VIT, image(), rf"encoder\.layers\.\d+\.{CLIP_LAYERS}", 2 * 6),
    # Its patch embedding is a linear layer.
    "SigLIP 2 vision": Architecture(
        "Siglip2ForImageClassification",
        {"vision_config": {**VIT, "num_patches": 16}},
        patches,
        rf"vision_model\.encoder\.layers\.\d+\.{CLIP_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    "AIMv2 vision": Architecture(
        "Aimv2VisionModel",
        VIT,
        image(),
        r"encoder\.layers\.\d+\.(attention\.([qkv]|out)_proj|ffn\.(gate|up|down)_proj)",
        2 * 7,
    ),
    "BLIP vision": Architecture(
        "BlipVisionModel",
        VIT,
        image(),
        r"encoder\.layers\.\d+\.(self_attn\.(qkv|projection)|mlp\.fc[12])",
        2 * 4,
    ),
    # Not downsample.reduction, the patch merging.
    "Swin": Architecture(
        "SwinForImageClassification",
        SWIN,
        image(),
        rf"swin\.encoder\.layers\.\d+\.blocks\.\d+\.{VIT_LAYERS}",
        4 * 6,
        CLASSIFIER,
    ),
    # Nor continuous_position_bias_mlp, which maps coordinates to position biases.
    "Swin v2": Architecture(
        "Swinv2ForImageClassification",
        SWIN,
        image(),
        rf"swinv2\.encoder\.layers\.\d+\.blocks\.\d+\.{BERT_LAYERS}",
        4 * 6,
        CLASSIFIER,
    ),
    "SegFormer": Architecture(
        "SegformerForImageClassification",
        PYRAMID | {"sr_ratios": [2, 1]},
        image(),
        rf"segformer\.stages\.\d+\.blocks\.\d+\.{VIT_LAYERS}",
        4 * 6,
        CLASSIFIER,
    ),
    "SegFormer, segmentation": Architecture(
        "SegformerForSemanticSegmentation",
        PYRAMID | {"sr_ratios": [2, 1], "decoder_hidden_size": 32},
        image(),
        rf"segformer\.stages\.\d+\.blocks\.\d+\.{VIT_LAYERS}",
        4 * 6,
    ),
    "PVT": Architecture(
        "PvtForImageClassification",
        PYRAMID | {"image_size": 32, "sequence_reduction_ratios": [2, 1], "patch_sizes": [4, 2]},
        image(),
        r"pvt\.encoder\.block\.\d+\.\d+\.(attention\.(self\.(query|key|value)|output\.dense)|mlp\.dense[12])",
        4 * 6,
        CLASSIFIER,
    ),
    "PVT v2": Architecture(
        "PvtV2ForImageClassification",
        PYRAMID | {"image_size": 32, "sr_ratios": [2, 1]},
        image(),
        r"pvt_v2\.encoder\.layers\.\d+\.blocks\.\d+\.(attention\.(query|key|value|proj)|mlp\.dense[12])",
        4 * 6,
        CLASSIFIER,
    ),
    # Not `proj` of the first block of a stage: a shortcut around the attention that takes the tokens to the new width,
    # what patch merging does in Swin. The attention beside it is targeted, though it changes the width as well.
    "Hiera": Architecture(
        "HieraForImageClassification",
        {
            "embed_dim": 16,
            "image_size": [32, 32],
            "depths": [1, 2],
            "num_heads": [2, 4],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
        },
        image(),
        rf"hiera\.encoder\.stages\.\d+\.layers\.\d+\.{TIMM_LAYERS}",
        3 * 4,
        CLASSIFIER,
    ),
    "VideoMAE": Architecture(
        "VideoMAEForVideoClassification",
        VIT | {"num_frames": 4},
        video(4),
        rf"videomae\.encoder\.layer\.\d+\.{BERT_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    "VideoMAE, pre-training": Architecture(
        "VideoMAEForPreTraining",
        VIT
        | {
            "num_frames": 4,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 2,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 32,
        },
        masked_video,
        rf"videomae\.encoder\.layer\.\d+\.{BERT_LAYERS}",
        2 * 6,
    ),
    "ViViT": Architecture(
        "VivitForVideoClassification",
        {key: value for key, value in VIT.items() if key != "patch_size"}
        | {"num_frames": 4, "tubelet_size": [2, 8, 8]},
        video(4),
        rf"vivit\.layers\.\d+\.{VIT_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    # Attends over space and time in turn, with a linear layer of the block's own behind the temporal attention.
    "TimeSformer": Architecture(
        "TimesformerForVideoClassification",
        VIT | {"num_frames": 2},
        video(2),
        r"timesformer\.encoder\.layer\.\d+\."
        r"((temporal_)?attention\.(attention\.qkv|output\.dense)|temporal_dense|(intermediate|output)\.dense)",
        2 * 7,
        CLASSIFIER,
    ),
    # Not the predictor of its pre-training, which a classifier does not call. The attentive pooler comes untrained.
    "V-JEPA 2": Architecture(
        "VJEPA2ForVideoClassification",
        {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "mlp_ratio": 2.0,
            "crop_size": 32,
            "patch_size": 8,
            "frames_per_clip": 4,
            "num_pooler_layers": 1,
            "pred_hidden_size": 16,
            "pred_num_attention_heads": 2,
            "pred_num_hidden_layers": 2,
        },
        video(4, name="pixel_values_videos"),
        r"vjepa2\.encoder\.layer\.\d+\.(attention\.(query|key|value|proj)|mlp\.fc[12])",
        2 * 6,
        ("pooler", "classifier"),
    ),
    # Without the readout projections of its neck.
    "DPT": Architecture(
        "DPTForSemanticSegmentation",
        VIT
        | {
            "num_hidden_layers": 4,
            "backbone_out_indices": [0, 1, 2, 3],
            "neck_hidden_sizes": [8, 8, 8, 8],
            "fusion_hidden_size": 8,
        },
        image(),
        rf"dpt\.encoder\.layer\.\d+\.{BERT_LAYERS}",
        4 * 6,
    ),
    "Depth Anything": Architecture(
        "DepthAnythingForDepthEstimation",
        {
            "backbone_config": {
                "model_type": "dinov2",
                **VIT,
                "out_features": ["stage1", "stage2"],
                "reshape_hidden_states": False,
            },
            "patch_size": 8,
            "reassemble_hidden_size": 32,
            "reassemble_factors": [2, 1],
            "neck_hidden_sizes": [8, 8],
            "fusion_hidden_size": 8,
            "head_hidden_size": 8,
        },
        image(),
        rf"backbone\.encoder\.layer\.\d+\.{VIT_LAYERS}",
        2 * 6,
    ),
    "ViTPose": Architecture(
        "VitPoseForPoseEstimation",
        {
            "backbone_config": {
                "model_type": "vitpose_backbone",
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "image_size": [32, 32],
                "patch_size": [8, 8],
                "out_features": ["stage2"],
            },
        },
        image(),
        r"backbone\.encoder\.layer\.\d+\.(attention\.(attention\.(query|key|value)|output\.dense)|mlp\.fc[12])",
        2 * 6,
    ),
    # The last blocks see the queries as well; the class predictor and the mask head lie outside.
    "EoMT": Architecture(
        "EomtForUniversalSegmentation",
        VIT | {"num_hidden_layers": 3, "num_blocks": 1, "num_queries": 4, "num_upscale_blocks": 1, "mlp_ratio": 2},
        image(),
        r"layers\.\d+\.(attention\.([qkv]|out)_proj|mlp\.fc[12])",
        3 * 6,
        needs=("scipy",),
    ),
    # The backbone is adapted; pixel decoder and mask decoder, on top of it and narrower, are the head.
    "Mask2Former": Architecture(
        "Mask2FormerForUniversalSegmentation",
        {
            "backbone_config": {
                "model_type": "swin",
                **SWIN,
                "depths": [1, 1, 1, 1],
                "num_heads": [2, 2, 4, 4],
                "image_size": 64,
                "window_size": 2,
                "out_features": ["stage1", "stage2", "stage3", "stage4"],
            },
            "feature_size": 32,
            "mask_feature_size": 32,
            "hidden_dim": 32,
            "encoder_feedforward_dim": 64,
            "dim_feedforward": 64,
            "encoder_layers": 2,
            "decoder_layers": 3,
            "num_attention_heads": 2,
            "num_queries": 4,
        },
        image(64),
        rf"model\.pixel_level_module\.encoder\.swin\.encoder\.layers\.\d+\.blocks\.\d+\.{VIT_LAYERS}",
        4 * 6,
        needs=("scipy",),
    ),
    "YOLOS": Architecture(
        "YolosForObjectDetection",
        VIT | {"image_size": [32, 32], "num_detection_tokens": 4},
        image(),
        rf"vit\.encoder\.layer\.\d+\.{BERT_LAYERS}",
        2 * 6,
    ),
    # Encoder and decoder are one transformer on top of convolutions; its prediction heads lie outside. The tokens enter
    # the decoder as zeros, so its first self-attention mixes equal values and it does not matter how.
    "DETR": Architecture(
        "DetrForObjectDetection",
        {
            "d_model": 32,
            "backbone_config": RESNET,
            **DETR_LAYERS,
        },
        image(),
        r"model\.(en|de)coder\.layers\.\d+\.((self|encoder)_attn\.[qkvo]_proj|mlp\.fc[12])",
        2 * 6 + 2 * 10,
        no_gradient=r"model\.decoder\.layers\.0\.self_attn\.[qkv]_proj",
        full_needs=("timm",),
    ),
    # Adapted is the vision encoder. The mask decoder is a head, though it has transformer blocks: what a model puts on
    # top of a pretrained encoder, much smaller, and what people train in full (modules_to_save=["mask_decoder"]).
    "SAM": Architecture(
        "SamModel",
        {
            "vision_config": {
                "hidden_size": 32,
                "num_hidden_layers": 2,
                "num_attention_heads": 2,
                "mlp_dim": 64,
                "image_size": 32,
                "patch_size": 8,
                "window_size": 2,
                "global_attn_indexes": [1],
                "output_channels": 16,
                "num_pos_feats": 8,
            },
            **SAM_HEAD,
        },
        prompted_image(32),
        r"vision_encoder\.layers\.\d+\.(attn\.(qkv|proj)|mlp\.lin[12])",
        2 * 4,
    ),
    # A Hiera with its stages in one list.
    "SAM 2": Architecture(
        "Sam2Model",
        {
            "vision_config": {
                "backbone_config": {
                    "model_type": "sam2_hiera_det_model",
                    "hidden_size": 16,
                    "num_attention_heads": 1,
                    "image_size": [64, 64],
                    "blocks_per_stage": [1, 1, 2, 1],
                    "embed_dim_per_stage": [16, 32, 64, 128],
                    "num_attention_heads_per_stage": [1, 2, 4, 8],
                    "window_size_per_stage": [4, 4, 4, 4],
                    "window_positional_embedding_background_size": [4, 4],
                    "global_attention_blocks": [3],
                },
                "backbone_channel_list": [128, 64, 32, 16],
                "backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]],
                "fpn_hidden_size": 16,
            },
            **SAM_HEAD,
        },
        prompted_image(64),
        r"vision_encoder\.backbone\.blocks\.\d+\.(attn\.(qkv|proj)|mlp\.proj_(in|out))",
        5 * 4,
    ),
    # Not a transformer, but its blocks have linear layers, and each stage one width.
    "ConvNeXt": Architecture(
        "ConvNextForImageClassification",
        {"hidden_sizes": [8, 16], "num_stages": 2, "depths": [2, 2], "image_size": 32},
        image(),
        r"convnext\.encoder\.stages\.\d+\.layers\.\d+\.pwconv[12]",
        4 * 2,
        CLASSIFIER,
    ),
    "timm ViT": Architecture(
        "timm/vit_base_patch16_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3},
        image(name="x"),
        rf"blocks\.\d+\.{TIMM_LAYERS}",
        2 * 4,
        ("head",),
    ),
    "timm Swin": Architecture(
        "timm/swin_base_patch4_window7_224",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 3},
        image(name="x"),
        rf"layers\.\d+\.blocks\.\d+\.{TIMM_LAYERS}",
        4 * 4,
        ("head.fc",),
    ),
    # Reads the weight of qkv instead of calling it, to add a bias for q and v alone.
    "timm Swin v2": Architecture(
        "timm/swinv2_base_window8_256",
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 4), "num_classes": 3},
        image(name="x"),
        rf"layers\.\d+\.blocks\.\d+\.{TIMM_LAYERS}",
        4 * 4,
        ("head.fc",),
    ),
    # So does this one.
    "timm EVA": Architecture(
        "timm/eva_giant_patch14_224",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3},
        image(name="x"),
        rf"blocks\.\d+\.{TIMM_LAYERS}",
        2 * 4,
        ("head",),
    ),
    "timm EVA-02": Architecture(
        "timm/eva02_base_patch14_448",
        {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 3},
        image(name="x"),
        r"blocks\.\d+\.(attn\.([qkv]_proj|proj)|mlp\.fc(1_g|1_x|2))",
        2 * 7,
        ("head",),
    ),
    "timm ViT in transformers": Architecture(
        "TimmWrapperForImageClassification",
        {
            "architecture": "vit_tiny_patch16_224",
            "model_args": {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2},
        },
        image(),
        rf"timm_model\.blocks\.\d+\.{TIMM_LAYERS}",
        2 * 4,
        ("timm_model.head",),
        full={"architecture": "vit_tiny_patch16_224"},
        needs=("timm",),
    ),
    # Two heads, in a list.
    "timm CrossViT": Architecture(
        "timm/crossvit_tiny_240",
        {"img_size": 32, "img_scale": (1.0, 1.0), "patch_size": (8, 8), "embed_dim": (16, 32), "num_classes": 3}
        | {"depth": ((1, 2, 0),), "num_heads": (2, 2), "mlp_ratio": (2, 2, 1)},
        image(name="x"),
        rf"blocks\.\d+\.(blocks\.\d+\.\d+\.{TIMM_LAYERS}|fusion\.\d+\.attn\.(w[qkv]|proj))",
        (1 + 2) * 4 + 2 * 4,
        ("head.0", "head.1"),
    ),
}

# q, k and v of nn.MultiheadAttention are one bare parameter, which becomes the layer in_proj.
TORCHVISION = {
    "num_layers": 12,
    "num_heads": 12,
    "hidden_dim": 768,
    "mlp_dim": 3072,
    "image_size": 224,
    "patch_size": 16,
}
MULTIHEAD_LAYERS = r"(in|out)_proj"
MULTIHEAD = {
    "torchvision ViT": Architecture(
        "torchvision/VisionTransformer",
        {"image_size": 32, "patch_size": 8, "num_layers": 2, "num_heads": 2, "hidden_dim": 32, "mlp_dim": 64},
        image(name="x"),
        rf"encoder\.layers\.encoder_layer_\d+\.(self_attention\.{MULTIHEAD_LAYERS}|mlp\.[03])",
        2 * 4,
        full=TORCHVISION,
    ),
    "OpenCLIP visual tower": Architecture(
        "open_clip/VisionTransformer",
        {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "heads": 2, "mlp_ratio": 2, "output_dim": 8},
        image(name="x"),
        rf"transformer\.resblocks\.\d+\.(attn\.{MULTIHEAD_LAYERS}|mlp\.c_(fc|proj))",
        2 * 4,
        full={"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "heads": 12, "mlp_ratio": 4},
    ),
}

BEYOND_VISION = {
    "AST": Architecture(
        "ASTForAudioClassification",
        {key: value for key, value in VIT.items() if key != "image_size"}
        | {"max_length": 32, "num_mel_bins": 16, "frequency_stride": 8, "time_stride": 8},
        lambda: {"input_values": torch.randn(2, 32, 16)},
        rf"audio_spectrogram_transformer\.layers\.\d+\.{VIT_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    # Its projector comes untrained as the classifier does.
    "Whisper encoder": Architecture(
        "WhisperForAudioClassification",
        {
            "d_model": 32,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 64,
            "num_mel_bins": 8,
            "max_source_positions": 16,
            "classifier_proj_size": 16,
        },
        lambda: {"input_features": torch.randn(2, 8, 32)},
        r"encoder\.layers\.\d+\.(self_attn\.([qkv]|out)_proj|fc[12])",
        2 * 6,
        ("projector", "classifier"),
    ),
    "BERT": Architecture(
        "BertForSequenceClassification",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 64,
        },
        tokens,
        rf"bert\.encoder\.layer\.\d+\.{BERT_LAYERS}",
        2 * 6,
        CLASSIFIER,
    ),
    # Grouped-query attention: k_proj and v_proj write half the width, so they own slices of half the width.
    "Llama": Architecture(
        "LlamaForSequenceClassification",
        {
            "vocab_size": 50,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "intermediate_size": 48,
            "pad_token_id": 0,
        },
        tokens,
        r"model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)",
        2 * 7,
        ("score",),
    ),
    # transformers' Conv1D, which stores its weight transposed.
    "GPT-2": Architecture(
        "GPT2ForSequenceClassification",
        {"vocab_size": 50, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 8, "pad_token_id": 0},
        tokens,
        r"transformer\.h\.\d+\.(attn\.c_(attn|proj)|mlp\.c_(fc|proj))",
        2 * 4,
        ("score",),
    ),
}

ARCHITECTURES = VISION | MULTIHEAD | BEYOND_VISION
