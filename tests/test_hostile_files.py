"""A file may hold what its adapter consists of and nothing else, on every way into a model."""

import json
import shutil

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import (
    AutoPeftModel,
    LoraConfig,
    PeftConfig,
    PeftModel,
    get_peft_model,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForImageClassification

from fact_peft import Adapter, FacTConfig, hotswap_adapter, load_image_classifier
from fact_peft.method.decomposition import DECOMPOSITIONS

PREFIX = "base_model.model."
LAYER = "vit.layers.0.attention.q_proj"


@pytest.fixture(scope="module")
def base_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_backbone("vit").save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": "ViTImageProcessor"}))
    return folder


def adapted(model, seed=0, **settings):
    torch.manual_seed(seed)
    return get_peft_model(model, FacTConfig(**{"rank": 4, "init_weights": False, **settings})).eval()


def saved(base_folder, folder, **settings):
    model = adapted(AutoModelForImageClassification.from_pretrained(base_folder), seed=5, **settings)
    model.save_pretrained(folder)
    return model


def tamper(folder, change):
    """Apply `change` to the tensors of the file, by name without PEFT's prefix."""
    file = folder / "adapter_model.safetensors"
    tensors = {name.removeprefix(PREFIX): value for name, value in load_file(file).items()}
    change(tensors)
    save_file({PREFIX + name: value for name, value in tensors.items()}, file, metadata={"format": "pt"})


def plain(folder):
    return AutoModelForImageClassification.from_pretrained(folder)


def with_adapter(folder, name="default"):
    """A model that has an adapter already."""
    return adapted(plain(folder))


def by_state_dict(model, folder):
    config = FacTConfig(rank=4)
    inject_adapter_in_model(config, model)
    tensors = load_file(folder / "adapter_model.safetensors")
    # PEFT finds heads of a model that it has not wrapped only without its prefix.
    set_peft_model_state_dict(model, {name.removeprefix(PREFIX): value for name, value in tensors.items()})


# How to make the model, how to load the adapter, and whether a refusal leaves the model without a trace.
WAYS = {
    "PeftModel.from_pretrained": (plain, lambda model, folder: PeftModel.from_pretrained(model, folder), True),
    "PeftModel.load_adapter": (with_adapter, lambda model, folder: model.load_adapter(folder, "second"), True),
    "PeftModel.load_adapter over": (with_adapter, lambda model, folder: model.load_adapter(folder, "default"), True),
    "hotswap": (with_adapter, hotswap_adapter, True),
    "Adapter.attach": (plain, lambda model, folder: Adapter.read(folder).attach(model), True),
    "injected, then set": (plain, by_state_dict, False),
    "AutoPeftModel": (plain, lambda model, folder: AutoPeftModel.from_pretrained(folder, num_labels=5), True),
    "load_image_classifier": (plain, lambda model, folder: load_image_classifier(folder, base_model=model), True),
    "FacTConfig": (plain, lambda model, folder: FacTConfig.from_pretrained(folder), True),
}


def extra(name, shape=(32, 32), dtype=torch.float32):
    return lambda tensors: tensors.update({name: torch.full(shape, 7).to(dtype)})


def as_integers(tensors):
    tensors["factors.32x32.fact_U"] = tensors["factors.32x32.fact_U"].to(torch.int8)


# What somebody else's file may hold, and the name by which it is refused.
FOREIGN = {
    "base weight of an adapted layer": (extra(f"{LAYER}.base_layer.weight"), f"{LAYER}.base_layer.weight"),
    "weight of a layer not yet adapted": (extra(f"{LAYER}.weight"), f"{LAYER}.weight"),
    "bias, which is not trained": (extra(f"{LAYER}.base_layer.bias", (32,)), f"{LAYER}.base_layer.bias"),
    "other base weight": (extra("vit.layernorm.weight", (32,)), "vit.layernorm.weight"),
    "U under the adapter's name": (extra("factors.32x32.fact_U.default", (32, 4)), "factors.32x32.fact_U.default"),
    "U of another stack": (extra("factors.9x9.fact_U", (9, 4)), "factors.9x9.fact_U"),
    "core of the other decomposition": (extra("factors.32x32.fact_C", (4, 4, 4)), "factors.32x32.fact_C"),
    "head of another adapter": (
        extra("classifier.modules_to_save.other.weight", (5, 32)),
        "classifier.modules_to_save.other.weight",
    ),
    "the original head": (extra("classifier.original_module.weight", (5, 32)), "classifier.original_module.weight"),
    "U of whole numbers": (as_integers, "fact_U.*int8"),
}


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.parametrize("foreign", FOREIGN)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_no_part_of_the_adapter_is_refused_by_name_and_changes_nothing(way, foreign, base_folder, tmp_path):
    make, load, without_trace = WAYS[way]
    change, name = FOREIGN[foreign]
    saved(base_folder, tmp_path)
    tamper(tmp_path, change)
    model = make(base_folder)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=name):
        load(model, tmp_path)
    after = dict(model.state_dict())
    if without_trace:
        assert after.keys() == before.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
    else:
        values = [value for name, value in after.items() if ".fact_" not in name and ".modules_to_save." not in name]
        assert all(torch.equal(one, other) for one, other in zip(values, before.values(), strict=True))
    assert without_trace is False or len(getattr(model, "peft_config", {})) == (1 if make is with_adapter else 0)


@pytest.mark.parametrize(
    "way, damage",
    [
        (way, damage)
        for way, (make, _, traceless) in WAYS.items()
        for damage in ("nan", "cut off", "missing", "rank")
        if make is plain and traceless
    ],
)
def test_damage_is_found_before_the_model_is_touched(way, damage, base_folder, tmp_path):
    _, load, _ = WAYS[way]
    saved(base_folder, tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    if damage == "nan":
        tamper(tmp_path, lambda tensors: tensors["classifier.weight"].fill_(torch.nan))
    elif damage == "cut off":
        file.write_bytes(file.read_bytes()[:-40])
    elif damage == "missing":
        tamper(tmp_path, lambda tensors: tensors.pop("factors.32x32.fact_V"))
    else:
        tamper(tmp_path, lambda tensors: tensors.update({"factors.32x32.fact_V": torch.zeros(32, 5)}))
    model = plain(base_folder)
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors"):
        load(model, tmp_path)
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert not hasattr(model, "peft_config")


def test_pickled_files_are_checked_too(base_folder, tmp_path):
    model = saved(base_folder, tmp_path / "whole")
    model.save_pretrained(tmp_path / "pickled", safe_serialization=False)
    file = tmp_path / "pickled" / "adapter_model.bin"
    torch.save({**torch.load(file), f"{PREFIX}{LAYER}.base_layer.weight": torch.zeros(32, 32)}, file)
    base = plain(base_folder)
    with pytest.raises(ValueError, match=r"no part of the adapter.*base_layer.weight"):
        PeftModel.from_pretrained(base, tmp_path / "pickled")
    assert not any(isinstance(module, BaseTunerLayer) for module in base.modules())


@pytest.mark.parametrize("content", [{"a": 3}, {1: torch.zeros(2)}, [torch.zeros(2)]], ids=["number", "key", "list"])
def test_pickled_files_of_other_than_tensors_are_refused(content, base_folder, tmp_path):
    saved(base_folder, tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save(content, tmp_path / "adapter_model.bin")
    with pytest.raises(ValueError, match=r"adapter_model\.bin .* is not a whole PyTorch file"):
        PeftModel.from_pretrained(plain(base_folder), tmp_path)


def test_config_without_a_layout_does_not_open_the_door(base_folder, tmp_path):
    saved(base_folder, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "layout": None}))
    with pytest.raises(ValueError, match="has no layout"):
        PeftModel.from_pretrained(plain(base_folder), tmp_path)


@torch.no_grad()
def scores(model):
    return logits(model.eval(), images())


class Masked(nn.Module):
    """A head with a causal mask, which is no number to train."""

    def __init__(self, head):
        super().__init__()
        self.dense, self.norm = head, nn.BatchNorm1d(5)
        self.register_buffer("mask", torch.full((3, 3), -torch.inf))

    def forward(self, x):
        return self.norm(self.dense(x))


@pytest.mark.parametrize("way", ["PeftModel.from_pretrained", "transformers load_adapter"])
@pytest.mark.parametrize("bias", ["none", "all", "fact_only"])
@pytest.mark.parametrize("head", ["as it is", "of several layers"])
@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_all_that_peft_saves_loads(decomposition, head, bias, way, base_folder, tmp_path):
    def base():
        model = plain(base_folder)
        if head == "of several layers":
            model.classifier = Masked(model.classifier).eval()
        return model

    heads = ["classifier", "layernorm_after"]
    model = adapted(base(), decomposition=decomposition, bias=bias, modules_to_save=heads)
    model.add_adapter("other", FacTConfig(rank=2, modules_to_save=["classifier"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".default." in name or (bias != "none" and name.endswith("base_layer.bias")):
                parameter.add_(0.5)
    model.save_pretrained(tmp_path, selected_adapters=["default"])
    if way == "PeftModel.from_pretrained":
        loaded = PeftModel.from_pretrained(base(), tmp_path, adapter_name="customer")
    else:
        loaded = base()
        loaded.load_adapter(str(tmp_path))
    assert torch.equal(scores(loaded), scores(model))


def test_biases_of_a_head_that_are_saved_twice_do_not_reach_another_adapter(base_folder, tmp_path):
    saved(base_folder, tmp_path, bias="all")
    tamper(tmp_path, extra("classifier.modules_to_save.other.bias", (5,)))
    model = adapted(plain(base_folder))
    model.add_adapter("other", FacTConfig(rank=2))
    expected = model.base_model.model.classifier.modules_to_save["other"].bias.clone()
    original = model.base_model.model.classifier.original_module.bias.clone()
    model.load_adapter(tmp_path, "second")
    assert torch.equal(model.base_model.model.classifier.modules_to_save["other"].bias, expected)
    assert torch.equal(model.base_model.model.classifier.original_module.bias, original)


def test_float8_factors_load(base_folder, tmp_path):
    saved(base_folder, tmp_path, modules_to_save=[])
    tamper(tmp_path, lambda tensors: tensors.update({k: v.to(torch.float8_e4m3fn) for k, v in tensors.items()}))
    model = PeftModel.from_pretrained(plain(base_folder), tmp_path)
    assert torch.isfinite(scores(model)).all()


def test_other_methods_load_as_ever(base_folder, tmp_path):
    lora = get_peft_model(plain(base_folder), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    lora.save_pretrained(tmp_path)
    assert type(PeftConfig.from_pretrained(tmp_path)) is LoraConfig
    model = plain(base_folder)
    model.load_adapter(str(tmp_path))
    assert torch.equal(scores(model), scores(lora))


def test_names_that_a_layout_cannot_hold_are_refused_when_the_adapter_is_made():
    model = nn.Sequential()
    model.add_module("a, b", nn.Linear(8, 8))
    with pytest.raises(ValueError, match="cannot be written down, a, b"):
        get_peft_model(model, FacTConfig(rank=2, target_modules=["a, b"]))


def test_a_copied_folder_still_loads(base_folder, tmp_path):
    model = saved(base_folder, tmp_path / "one")
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert torch.equal(scores(PeftModel.from_pretrained(plain(base_folder), tmp_path / "two")), scores(model))
