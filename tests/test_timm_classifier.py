"""A classifier of timm saved as one thing comes back as one thing, preprocessing included."""

import json
from pathlib import Path

import pytest
import torch
from backbones import make_backbone
from peft import PeftModel, get_peft_model
from torch import nn

from fact_peft import AdapterPool, FacTConfig, load_image_classifier, save_image_classifier

pytest.importorskip("timm")
pytest.importorskip("torchvision")

import timm
from PIL import Image
from test_classifier import assert_base_is_missing_elsewhere, card_of

pytestmark = pytest.mark.compatibility

PETS = ["cat", "dog", "owl"]
PICTURE = Image.linear_gradient("L").resize((50, 40)).convert("RGB")


def timm_model(**settings) -> nn.Module:
    torch.manual_seed(3)
    shape = {"img_size": 32, "embed_dim": 32, "depth": 2, "num_heads": 2, "num_classes": 5}
    return timm.create_model("vit_tiny_patch16_224", **{**shape, **settings})


def timm_base(folder: Path, **settings) -> None:
    timm.models.save_for_hf(timm_model(**settings), folder, safe_serialization=True)


def timm_adapted(folder: str | Path, labels: list[str] | None = PETS, **settings) -> PeftModel:
    torch.manual_seed(4)
    vit = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=3, **settings)
    return get_peft_model(vit, FacTConfig(rank=4, init_weights=False, labels=labels)).eval()


@torch.no_grad()
def timm_scores(model: nn.Module, seed: int = 0) -> torch.Tensor:
    return model(torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("settings", [{}, {"global_pool": "avg", "fc_norm": False}, {"act_layer": "relu"}])
@pytest.mark.parametrize("labels", [PETS, None])
def test_timm_model_comes_back_bit_equal_as_it_was_built(labels, settings, tmp_path):
    timm_base(tmp_path / "base")
    model = timm_adapted(tmp_path / "base", labels, **settings)
    save_image_classifier(model, None, tmp_path / "adapter")
    loaded, _ = load_image_classifier(tmp_path / "adapter")
    assert type(loaded.get_base_model()) is type(model.get_base_model()) and not loaded.training
    assert torch.equal(timm_scores(loaded), timm_scores(model))
    assert loaded.active_peft_config.labels == labels
    save_image_classifier(loaded, None, tmp_path / "again")
    again, _ = load_image_classifier(tmp_path / "again")
    assert torch.equal(timm_scores(again), timm_scores(model))


@pytest.mark.parametrize("given", [False, True])
def test_preprocessing_of_a_timm_model_is_that_of_its_data_config(given, tmp_path):
    timm_base(tmp_path / "base")
    model = timm_adapted(tmp_path / "base")
    data_config = timm.data.resolve_input_data_config(model.get_base_model())
    assert data_config["input_size"] == (3, 32, 32)
    if given:
        data_config |= {"mean": (0.1, 0.2, 0.3), "interpolation": "nearest", "crop_pct": 0.5}
    save_image_classifier(model, data_config if given else None, tmp_path / "adapter")
    _, image_processor = load_image_classifier(tmp_path / "adapter")
    expected = timm.data.create_transform(**data_config, is_training=False)(PICTURE)[None]
    assert torch.equal(image_processor(PICTURE)["pixel_values"], expected)
    save_image_classifier(model, image_processor, tmp_path / "again")
    _, image_processor = load_image_classifier(tmp_path / "again")
    assert torch.equal(image_processor(PICTURE)["pixel_values"], expected)


def test_timm_adapter_saved_by_peft_alone_is_preprocessed_as_its_model(tmp_path):
    timm_base(tmp_path / "base")
    model = timm_adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"base_model=.*a loaded timm model"):
        load_image_classifier(tmp_path / "adapter")
    loaded, image_processor = load_image_classifier(tmp_path / "adapter", base_model=tmp_path / "base")
    assert torch.equal(timm_scores(loaded), timm_scores(model))
    assert image_processor(PICTURE)["pixel_values"].shape == (1, 3, 32, 32)


def test_model_without_any_image_processor_is_refused(tmp_path):
    get_peft_model(make_backbone("timm"), FacTConfig(rank=2)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"no preprocessor_config.json in .*VisionTransformer names no model"):
        load_image_classifier(tmp_path, base_model=make_backbone("timm"))


def test_timm_model_that_is_loaded_already_is_used(tmp_path):
    model = get_peft_model(timm_model(num_classes=3), FacTConfig(rank=4, init_weights=False)).eval()
    model.get_base_model().pretrained_cfg.pop("hf_hub_id")
    save_image_classifier(model, None, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"does not say which base model.*a loaded timm model"):
        load_image_classifier(tmp_path / "adapter")
    vit = timm_model(num_classes=3)
    loaded, _ = load_image_classifier(tmp_path / "adapter", base_model=vit)
    assert loaded.get_base_model() is vit
    assert torch.equal(timm_scores(loaded), timm_scores(model))


@pytest.mark.parametrize("source, revision", [("timm/tiny", None), ("me/tiny@abc", "abc")])
def test_base_of_a_timm_model_is_recorded_by_its_hub_id(source, revision, tmp_path):
    model = get_peft_model(timm_model(num_classes=3, global_pool="avg"), FacTConfig(rank=4, labels=PETS))
    model.get_base_model().pretrained_cfg["hf_hub_id"] = source
    save_image_classifier(model, None, tmp_path / "adapter", {"accuracy": 0.5})
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    name = source.partition("@")[0]
    assert (config["base_model_name_or_path"], config["revision"]) == (name, revision)
    card = card_of(tmp_path / "adapter")
    assert card.data.base_model == name
    assert card.data.tags == [f"base_model:adapter:{name}", "fact", "timm"]
    assert f'timm.create_model("hf-hub:{source}", pretrained=True, ' in card.text and "global_pool='avg'" in card.text


def test_timm_model_built_with_a_class_is_refused_and_nothing_is_written(tmp_path):
    model = get_peft_model(timm_model(num_classes=3, act_layer=nn.ReLU), FacTConfig(rank=2))
    with pytest.raises(ValueError, match=r"which JSON cannot hold.*act_layer='relu'"):
        save_image_classifier(model, None, tmp_path / "adapter")
    assert not any((tmp_path / "adapter").iterdir())


def test_file_that_says_where_weights_are_loaded_from_is_refused(tmp_path):
    timm_base(tmp_path / "base")
    save_image_classifier(timm_adapted(tmp_path / "base"), None, tmp_path / "adapter")
    file = tmp_path / "adapter" / "preprocessor_config.json"
    settings = json.loads(file.read_text())
    for model_args in ({"checkpoint_path": "x.pth"}, {"pretrained_cfg_overlay": {"url": "x"}}, ["depth"]):
        file.write_text(json.dumps({**settings, "model_args": model_args}))
        with pytest.raises(ValueError, match="are not arguments of a timm model alone"):
            load_image_classifier(tmp_path / "adapter")
    file.write_text(json.dumps({**settings, "pretrained_cfg": {"mean": [0.5] * 3}}))
    with pytest.raises(ValueError, match="is not a data config of timm"):
        load_image_classifier(tmp_path / "adapter")


def test_pool_serves_an_adapter_of_a_timm_model(tmp_path):
    timm_base(tmp_path / "base")
    model = timm_adapted(tmp_path / "base")
    save_image_classifier(model, None, tmp_path / "adapter")
    pool = AdapterPool(timm.create_model(f"local-dir:{tmp_path / 'base'}", pretrained=True).eval())
    pool.load("pets", tmp_path / "adapter")
    pixels = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    predictions = pool(pixels, ["pets", None, "pets"])
    assert [prediction.labels for prediction in predictions] == [PETS, None, PETS]
    scores = timm_scores(model)
    torch.testing.assert_close(predictions[0].logits, scores[0])
    torch.testing.assert_close(predictions[2].logits, scores[2])


def test_base_that_is_no_folder_here_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    timm_base(Path("base"))
    save_image_classifier(timm_adapted("base"), None, "adapter")
    assert_base_is_missing_elsewhere("timm", tmp_path, monkeypatch)
