"""``ignore_mismatched_sizes=True`` loads an adapter onto a model with another number of classes: all but the head."""

import pytest
import torch
from backbones import images, make_backbone, vit
from peft import AutoPeftModel, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForImageClassification, ViTForImageClassification
from upstream import skip_where_lora_is_refused

from fact_peft import FacTConfig

NUM_LABELS = 5  # of the model; the adapter has seven


@pytest.fixture
def folder(tmp_path):
    vit(num_labels=7).save_pretrained(tmp_path / "base")
    base = ViTForImageClassification.from_pretrained(tmp_path / "base")
    get_peft_model(base, FacTConfig(rank=4, init_weights=False)).save_pretrained(tmp_path / "adapter")
    return str(tmp_path / "adapter")


def beside(folder, **options):
    model = get_peft_model(make_backbone("vit"), FacTConfig(rank=2))
    model.load_adapter(folder, "other", **options)
    model.set_adapter("other")
    return model


def by_transformers(folder, **options):
    skip_where_lora_is_refused("load_adapter")
    model = make_backbone("vit")
    model.load_adapter(folder, **options)
    return model


def with_the_model(folder, **options):
    skip_where_lora_is_refused("from_pretrained")
    return AutoModelForImageClassification.from_pretrained(folder, num_labels=NUM_LABELS, **options)


WAYS = {
    "PeftModel": lambda folder, **options: PeftModel.from_pretrained(make_backbone("vit"), folder, **options),
    "load_adapter": beside,
    "AutoPeftModel": lambda folder, **options: AutoPeftModel.from_pretrained(folder, num_labels=NUM_LABELS, **options),
    "transformers": by_transformers,
    "AutoModel": with_the_model,
}


@pytest.mark.parametrize("way", ["PeftModel", "AutoPeftModel"])
def test_all_but_the_head_is_loaded_if_asked_for(way, folder):
    with pytest.warns(UserWarning, match="The model keeps its own head"):
        model = WAYS[way](folder, ignore_mismatched_sizes=True)
    assert model(images()).logits.shape == (3, NUM_LABELS)
    assert len(model.peft_config["default"].labels) == NUM_LABELS
    saved = get_peft_model_state_dict(PeftModel.from_pretrained(vit(num_labels=7), folder))
    loaded = get_peft_model_state_dict(model)
    loaded = {key.removeprefix("base_model.model."): value for key, value in loaded.items()}
    factors = [key for key in saved if ".fact_" in key]
    assert factors and all(torch.equal(saved[key], loaded[key.removeprefix("base_model.model.")]) for key in factors)
    with pytest.raises(ValueError, match="The adapter has 7 labels"):
        PeftModel.from_pretrained(make_backbone("vit"), folder)  # the word counts for the one call


@pytest.mark.parametrize("way", ["PeftModel", "load_adapter", "transformers", "AutoModel"])
def test_another_head_is_refused_otherwise(way, folder):
    # These loaders do not tell the method of ignore_mismatched_sizes.
    options = {"ignore_mismatched_sizes": True} if way in ("load_adapter", "transformers", "AutoModel") else {}
    with pytest.raises(ValueError, match="The adapter has 7 labels"):
        WAYS[way](folder, **options)


def test_factors_of_another_size_are_never_left_out(folder):
    model = get_peft_model(vit(num_labels=7), FacTConfig(rank=2))
    with pytest.raises(ValueError, match=r"\(32, 4\) in the file, \(32, 2\) in the model"):
        model.load_adapter(folder, "default", ignore_mismatched_sizes=True)
