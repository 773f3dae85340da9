"""An adapter of a head model loads on the bare model and back, and gives the same features there."""

import logging

import pytest
import torch
from backbones import NUM_LABELS, VIT_SHAPE
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from torch import Tensor, nn
from transformers import (
    BeitConfig,
    BeitModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPModel,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Backbone,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    PretrainedConfig,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipModel,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

from fact_peft import Adapter, FacTConfig
from fact_peft.adapter.names import Renaming

IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
VIT = ViTConfig(**VIT_SHAPE)
DINO = Dinov2Config(**{**VIT_SHAPE, "mlp_ratio": 2}, out_features=["stage2"], reshape_hidden_states=False)
PAIRS = {
    "ViT": (ViTForImageClassification, VIT, lambda config: ViTModel(config, add_pooling_layer=False)),
    "DINOv2": (Dinov2ForImageClassification, DINO, Dinov2Model),
    "DINOv2 backbone": (Dinov2ForImageClassification, DINO, Dinov2Backbone),
}
SETTINGS = [
    {},
    {"share": "block"},
    {"bias": "all"},
    {"layers_to_transform": [1]},
    {"target_modules": r".*\.(q_proj|fc1)"},
    {"exclude_modules": r"(.*\.)?layers?\.0\..*"},
    {"storage": "int8"},
]


def pair(name: str) -> tuple[nn.Module, nn.Module]:
    """A classifier and its bare model, with the same weights."""
    head_class, config, bare_class = PAIRS[name]
    torch.manual_seed(0)
    head, bare = head_class(config).eval(), bare_class(config).eval()
    bare.load_state_dict(getattr(head, head.base_model_prefix).state_dict(), strict=False)
    return head, bare


def disturbed(model: nn.Module, **settings: object) -> PeftModel:
    torch.manual_seed(1)
    peft_model = get_peft_model(model, FacTConfig(rank=4, init_weights=False, **settings)).eval()
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data.add_(0.05 * torch.randn_like(parameter))
    return peft_model


@torch.no_grad()
def features(model: nn.Module) -> Tensor:
    """The last hidden state of a model, whether it is bare, a backbone or has a head."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inner = getattr(base, base.base_model_prefix, base)
    output = inner(IMAGES)
    return output.feature_maps[-1] if hasattr(output, "feature_maps") else output.last_hidden_state


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", PAIRS)
def test_adapter_of_a_classifier_gives_the_same_features_on_its_bare_model(name, settings, tmp_path, caplog):
    head, bare = pair(name)
    plain = features(bare)
    disturbed(head, **settings).save_pretrained(tmp_path)
    saved = PeftModel.from_pretrained(pair(name)[0], tmp_path).eval()  # as stored, perhaps in int8
    with caplog.at_level(logging.INFO, logger="fact_peft"):
        loaded = PeftModel.from_pretrained(bare, tmp_path).eval()
    assert "has no classifier: left out of the adapter" in caplog.text
    expected = features(saved)
    if name == "DINOv2 backbone":  # which puts out the last layer without the class token
        expected = saved.get_base_model().dinov2(IMAGES).last_hidden_state[:, 1:]
        torch.testing.assert_close(features(loaded)[:, -expected.shape[1] :], expected, rtol=1e-5, atol=1e-5)
    else:
        torch.testing.assert_close(features(loaded), expected, rtol=1e-5, atol=1e-5)
    assert (features(loaded) - plain).abs().max() > 0.1
    assert not loaded.peft_config["default"].modules_to_save

    loaded.save_pretrained(tmp_path / "again")  # in the names of the bare model
    again = PeftModel.from_pretrained(pair(name)[1], tmp_path / "again").eval()
    assert torch.equal(features(again), features(loaded))


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("name", ["ViT", "DINOv2"])
def test_adapter_of_a_bare_model_gives_the_same_features_inside_the_classifier(name, settings, tmp_path):
    head, bare = pair(name)
    plain = head(IMAGES).logits
    disturbed(bare, **settings).save_pretrained(tmp_path)
    saved = PeftModel.from_pretrained(pair(name)[1], tmp_path).eval()
    loaded = PeftModel.from_pretrained(head, tmp_path).eval()
    torch.testing.assert_close(features(loaded), features(saved), rtol=1e-5, atol=1e-5)
    assert not loaded.peft_config["default"].modules_to_save  # the classifier is the model's own
    assert (loaded(IMAGES).logits - plain).abs().max() > 0.01


def test_adapter_of_a_timm_classifier_gives_the_same_features_without_the_head(tmp_path, caplog):
    timm = pytest.importorskip("timm")

    def build(num_classes: int) -> nn.Module:
        torch.manual_seed(7)
        return timm.models.VisionTransformer(
            img_size=16, patch_size=8, embed_dim=32, depth=2, num_heads=2, num_classes=num_classes
        ).eval()

    classifier = disturbed(build(NUM_LABELS))
    classifier.save_pretrained(tmp_path)
    bare = build(0)
    bare.load_state_dict(build(NUM_LABELS).state_dict(), strict=False)
    with caplog.at_level(logging.INFO, logger="fact_peft"):
        loaded = PeftModel.from_pretrained(bare, tmp_path).eval()
    assert "has no head: left out of the adapter" in caplog.text
    torch.testing.assert_close(loaded.forward_features(IMAGES), classifier.forward_features(IMAGES))


@pytest.mark.parametrize("share", ["model", "block"])
def test_other_ways_to_load_give_the_same_features(share, tmp_path):
    head, bare = pair("ViT")
    disturbed(head, share=share).save_pretrained(tmp_path)
    expected = features(PeftModel.from_pretrained(pair("ViT")[1], tmp_path).eval())
    Adapter.read(tmp_path).attach(bare)
    assert torch.equal(features(bare), expected)
    again = pair("ViT")[1]
    Adapter.of(bare).attach(again)
    assert torch.equal(features(again), expected)
    back = pair("ViT")[0]
    Adapter.of(bare).attach(back)
    torch.testing.assert_close(features(back), expected)
    Adapter.of(back).fill(back)
    torch.testing.assert_close(features(back), expected)


def test_transformers_loader_gives_the_same_features_or_is_refused(tmp_path):
    for share in ("model", "block"):
        disturbed(pair("ViT")[0], share=share).save_pretrained(tmp_path / share)
    expected = features(PeftModel.from_pretrained(pair("ViT")[1], tmp_path / "model").eval())
    bare = pair("ViT")[1]
    bare.load_adapter(str(tmp_path / "model"))
    assert torch.equal(features(bare), expected)
    bare = pair("ViT")[1]
    bare.load_adapter(str(tmp_path / "block"))
    with pytest.raises(ValueError, match="does not read blocks of other names"):
        features(bare)


@pytest.mark.parametrize(
    "other",
    [
        lambda: ViTModel(ViTConfig(**{**VIT_SHAPE, "num_hidden_layers": 3})),  # has all layers, and more
        lambda: ViTModel(ViTConfig(**{**VIT_SHAPE, "num_hidden_layers": 1})),
        lambda: ViTModel(ViTConfig(**{**VIT_SHAPE, "intermediate_size": 64})),
        lambda: Dinov2Model(DINO),  # of another prefix
        lambda: BeitModel(BeitConfig(**VIT_SHAPE)),
    ],
)
def test_other_bare_models_are_refused_and_unchanged(other, tmp_path):
    disturbed(pair("ViT")[0]).save_pretrained(tmp_path)
    model = other()
    names = [name for name, _ in model.named_modules()]
    with pytest.raises(ValueError, match="belongs to other linear layers"):
        PeftModel.from_pretrained(model, tmp_path)
    assert [name for name, _ in model.named_modules()] == names


def test_a_head_of_another_name_is_no_missing_head(tmp_path):
    class Renamed(ViTForImageClassification):
        def __init__(self) -> None:
            super().__init__(VIT)
            self.head = self.classifier
            del self.classifier

    disturbed(pair("ViT")[0]).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.weight: no part of the adapter"):
        PeftModel.from_pretrained(Renamed(), tmp_path)


def test_an_unknown_tensor_is_refused_on_the_bare_model_too(tmp_path):
    adapter = disturbed(pair("ViT")[0])
    adapter.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pair("ViT")[1], tmp_path)
    tensors = {"base_model.model.decoder.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"decoder\.weight: no part of the adapter"):
        set_peft_model_state_dict(loaded, tensors)


def test_renaming_of_tensors_is_by_name_alone():
    strip, add = Renaming(removed="vit."), Renaming(added="vit.")
    bare = ["factors.8x8.fact_U", "factors.8x8@layers-3.fact_U", "layers.0.fc1.base_layer.bias", "pooler.dense.bias"]
    head = ["factors.8x8.fact_U", "factors.8x8@vit-layers-3.fact_U", *(f"vit.{name}" for name in bare[2:])]
    for prefix in ("", "base_model.model."):
        bare_keys, head_keys = ({f"{prefix}{name}": i for i, name in enumerate(names)} for names in (bare, head))
        assert strip.tensors(head_keys) == bare_keys
        assert add.tensors(bare_keys) == head_keys
        assert strip.tensors(bare_keys) == bare_keys and add.tensors(head_keys) == head_keys
        headless = Renaming(removed="vit.", left_out=("classifier",))
        assert headless.tensors({**head_keys, f"{prefix}classifier.weight": 9}) == bare_keys
        assert list(headless.tensors({f"{prefix}classifiers.weight": 9}).values()) == [9]


# Towers: one model of images and text, a classifier on its vision tower, and the tower alone.
TEXT = {"hidden_size": 16, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 50}
SHAPE = {name: value for name, value in VIT_SHAPE.items() if name != "num_labels"}
TOWERS = {
    "CLIP": (CLIPConfig, CLIPModel, CLIPForImageClassification, CLIPVisionModel),
    "SigLIP": (SiglipConfig, SiglipModel, SiglipForImageClassification, SiglipVisionModel),
}


def tower_config(name: str, text: dict[str, int] = TEXT) -> PretrainedConfig:
    specials = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2, "projection_size": 32}
    config = TOWERS[name][0](vision_config=SHAPE, text_config={**text, **specials}, projection_dim=16)
    config.num_labels = NUM_LABELS
    return config


def towers(name: str) -> tuple[nn.Module, nn.Module, nn.Module]:
    """The whole model, the classifier and the tower, with the same weights in the tower."""
    config, (_, whole_class, head_class, tower_class) = tower_config(name), TOWERS[name]
    torch.manual_seed(0)
    whole, head, tower = whole_class(config).eval(), head_class(config).eval(), tower_class(config.vision_config).eval()
    for model in (head.vision_model, tower):
        model.load_state_dict(whole.vision_model.state_dict())
    return whole, head, tower


@torch.no_grad()
def tower_features(model: nn.Module) -> Tensor:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return getattr(base, "vision_model", base)(IMAGES).last_hidden_state


@pytest.mark.parametrize("settings", SETTINGS[:3], ids=str)
@pytest.mark.parametrize("name", TOWERS)
def test_adapter_of_a_tower_gives_the_same_features_alone_and_in_a_classifier(name, settings, tmp_path, caplog):
    _, head, tower = towers(name)
    plain = tower_features(tower)
    classifier = disturbed(head, **settings)
    classifier.save_pretrained(tmp_path / "head")
    with caplog.at_level(logging.INFO, logger="fact_peft"):
        loaded = PeftModel.from_pretrained(tower, tmp_path / "head").eval()
    assert "has no classifier: left out of the adapter" in caplog.text
    torch.testing.assert_close(tower_features(loaded), tower_features(classifier), rtol=1e-5, atol=1e-5)
    assert (tower_features(loaded) - plain).abs().max() > 0.1
    loaded.save_pretrained(tmp_path / "tower")
    back = PeftModel.from_pretrained(towers(name)[1], tmp_path / "tower").eval()
    torch.testing.assert_close(tower_features(back), tower_features(classifier), rtol=1e-5, atol=1e-5)
    assert not back.peft_config["default"].modules_to_save


@pytest.mark.filterwarnings("ignore:You have passed exclude_modules")  # of the tower that a classifier does not have
@pytest.mark.parametrize("name", TOWERS)
def test_adapter_of_one_tower_of_the_whole_model_loads_on_that_tower(name, tmp_path):
    whole, head, tower = towers(name)
    adapted = disturbed(whole, exclude_modules=r"text_model\..*")
    adapted.save_pretrained(tmp_path)
    for model in (head, tower):
        loaded = PeftModel.from_pretrained(model, tmp_path).eval()
        torch.testing.assert_close(tower_features(loaded), tower_features(adapted), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", TOWERS)
def test_adapter_of_both_towers_is_refused_on_one_and_says_what_to_do(name, tmp_path):
    whole, head, tower = towers(name)
    disturbed(whole).save_pretrained(tmp_path)
    for model in (head, tower):
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(
            ValueError, match=r"layers of text_model too: .* use vision_model .* exclude_modules=r\"\(text"
        ):
            PeftModel.from_pretrained(model, tmp_path)
        assert [name for name, _ in model.named_modules()] == names


@pytest.mark.parametrize("index", [1, 2], ids=["classifier", "tower"])
@pytest.mark.parametrize("name", TOWERS)
def test_adapter_of_a_tower_is_refused_on_the_whole_model_and_loads_on_the_part_it_names(name, index, tmp_path):
    adapted = disturbed(towers(name)[index])
    adapted.save_pretrained(tmp_path)
    whole = towers(name)[0]
    with pytest.raises(ValueError, match=r"load it there: PeftModel\.from_pretrained\(model\.vision_model, \.\.\.\)\."):
        PeftModel.from_pretrained(whole, tmp_path)
    PeftModel.from_pretrained(whole.vision_model, tmp_path)
    torch.testing.assert_close(tower_features(whole), tower_features(adapted), rtol=1e-5, atol=1e-5)


def test_towers_with_the_same_layers_are_both_named(tmp_path):
    disturbed(towers("SigLIP")[2]).save_pretrained(tmp_path)
    whole = SiglipModel(tower_config("SigLIP", {**TEXT, "hidden_size": 32, "intermediate_size": 128}))
    with pytest.raises(ValueError, match=r"from_pretrained\(model\.text_model, .* or .*\(model\.vision_model, "):
        PeftModel.from_pretrained(whole, tmp_path)


def test_adapter_of_the_text_tower_is_refused_on_a_vision_tower_of_the_same_layers(tmp_path):
    whole = SiglipModel(tower_config("SigLIP", {**TEXT, "hidden_size": 32, "intermediate_size": 128}))
    disturbed(whole, exclude_modules=r"vision_model\..*").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="belongs to other linear layers"):
        PeftModel.from_pretrained(towers("SigLIP")[2], tmp_path)


def test_a_head_that_the_model_has_no_place_for_is_left_out_on_the_part_that_is_named(tmp_path):
    whole, head, _ = towers("CLIP")
    adapted = disturbed(head)
    adapted.save_pretrained(tmp_path)
    model = CLIPVisionModelWithProjection(tower_config("CLIP").vision_config).eval()
    model.vision_model.load_state_dict(whole.vision_model.state_dict())
    with pytest.raises(ValueError, match=r"(?s)classifier\.weight: no part .* pass it model\.vision_model instead"):
        PeftModel.from_pretrained(model, tmp_path)
    PeftModel.from_pretrained(model.vision_model, tmp_path)
    torch.testing.assert_close(tower_features(model), tower_features(adapted), rtol=1e-5, atol=1e-5)
