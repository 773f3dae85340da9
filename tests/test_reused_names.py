"""An adapter's name used a second time, as when a notebook's cell is run again: the second use counts, afresh."""

import warnings

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from torch import nn

from fact_peft import FacTConfig, FacTLinear, hotswap_adapter
from fact_peft.method.decomposition import DECOMPOSITIONS

RANDOM = {"init_weights": False, "scale": 0.5}
# Pairs of configs under one name, the second of which must leave nothing of the first.
PAIRS = {
    "rank": ({"rank": 4}, {"rank": 8}),
    "scale": ({"rank": 4, "scale": 100.0}, {"rank": 4, "scale": 0.25}),
    "decomposition": ({"rank": 4}, {"rank": 4, "decomposition": "tk"}),
    "layers": ({"rank": 4, "target_modules": ["0.attention.q_proj"]}, {"rank": 4, "target_modules": ["1.mlp.fc1"]}),
    "fewer layers": ({"rank": 4}, {"rank": 4, "layers_to_transform": [1]}),
    "without head": ({"rank": 4}, {"rank": 4, "modules_to_save": []}),
    "with head": ({"rank": 4, "modules_to_save": []}, {"rank": 4}),
}


@pytest.fixture(autouse=True)
def second_use_is_no_error():
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You are trying to modify a model with PEFT for a second time")
        warnings.filterwarnings("ignore", "Already found a `peft_config` attribute in the model")
        yield


def adapt(model, settings, seed=1, make=get_peft_model):
    torch.manual_seed(seed)
    return make(model, settings if isinstance(settings, LoraConfig) else FacTConfig(**{**RANDOM, **settings}))


def disturb_heads(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(1)


@torch.no_grad()
def scores(model):
    return logits(model.eval(), images())


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
def test_second_config_on_one_model_is_as_on_a_fresh_one(pair, tmp_path):
    first, second = pair
    base = make_backbone("vit")
    disturb_heads(adapt(base, first))
    model, fresh = adapt(base, second, seed=2), adapt(make_backbone("vit"), second, seed=2)
    assert torch.equal(scores(model), scores(fresh))
    state, expected = get_peft_model_state_dict(model), get_peft_model_state_dict(fresh)
    assert state.keys() == expected.keys() and all(torch.equal(state[key], expected[key]) for key in state)
    trained, expected = (
        [name for name, parameter in m.named_parameters() if parameter.requires_grad] for m in (model, fresh)
    )
    assert trained == expected
    model.save_pretrained(tmp_path)
    assert torch.equal(scores(PeftModel.from_pretrained(make_backbone("vit"), tmp_path)), scores(fresh))


def test_injecting_twice_is_as_injecting_the_second():
    base = make_backbone("swin")
    adapt(base, {"rank": 2}, make=lambda model, config: inject_adapter_in_model(config, model))
    adapt(base, {"rank": 3}, seed=2, make=lambda model, config: inject_adapter_in_model(config, model))
    fresh = adapt(make_backbone("swin"), {"rank": 3}, seed=2)
    assert torch.equal(scores(base), scores(fresh))


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_loading_two_adapters_in_turn_gives_the_second(decomposition, tmp_path):
    for name, settings in {"a": {"rank": 4, "scale": 2.0}, "b": {"rank": 4, "scale": 0.1}}.items():
        model = adapt(make_backbone("vit"), {**settings, "decomposition": decomposition})
        disturb_heads(model)
        model.save_pretrained(tmp_path / name)
    base = make_backbone("vit")
    PeftModel.from_pretrained(base, tmp_path / "a")
    assert torch.equal(scores(PeftModel.from_pretrained(base, tmp_path / "b")), scores(model))


def test_loop_over_scales_on_one_model_measures_each_as_lora_does():
    """On one model, or on a fresh one each time: for LoRA and for FacT the same."""
    for make in (
        lambda factor: {"rank": 4, "scale": factor},
        lambda factor: LoraConfig(r=4, lora_alpha=4 * factor, target_modules=["q_proj"], init_lora_weights=False),
    ):
        base = make_backbone("vit")
        reused = [scores(adapt(base, make(factor))) for factor in (0.5, 4.0)]
        fresh = [scores(adapt(make_backbone("vit"), make(factor))) for factor in (0.5, 4.0)]
        assert all(torch.equal(left, right) for left, right in zip(reused, fresh, strict=True))
        assert not torch.equal(*fresh)


def test_other_adapters_are_left_alone():
    model = adapt(make_backbone("vit"), {"rank": 4})
    model.add_adapter("other", FacTConfig(rank=2, decomposition="tk", **RANDOM))
    disturb_heads(model)
    model.set_adapter("other")
    expected = scores(model)
    again = adapt(model.get_base_model(), {"rank": 8})
    again.set_adapter("other")
    assert torch.equal(scores(again), expected)


@pytest.mark.parametrize("settings", [{"rank": 1000}, {"labels": ["one"]}, {"target_modules": ["nowhere"]}])
def test_refused_second_use_leaves_the_first(settings):
    base = make_backbone("vit")
    model = adapt(base, {"rank": 4})
    disturb_heads(model)
    before, config = scores(model), model.peft_config["default"]
    with pytest.raises(ValueError):
        adapt(base, settings)
    assert torch.equal(scores(model), before) and model.peft_config == {"default": config}
    with pytest.raises(ValueError):
        model.add_adapter("other", FacTConfig(**settings))
    assert torch.equal(scores(model), before) and model.peft_config == {"default": config}


# While merged, the increment of an adapter is part of the base weights: nothing may change what unmerging subtracts.


def hotswap(model, folder):
    hotswap_adapter(model, folder)


@pytest.mark.parametrize(
    "change",
    [
        hotswap,
        lambda model, folder: model.load_adapter(folder, "default"),
        lambda model, folder: model.set_scale("default", 3.0),
        lambda model, folder: adapt(model.get_base_model(), {"rank": 8}),
        lambda model, folder: PeftModel.from_pretrained(model.get_base_model(), folder),
    ],
    ids=["hotswap", "load", "scale", "again", "from_pretrained"],
)
@pytest.mark.parametrize("backbone", ["vit", "timm"])
def test_merged_adapter_is_not_changed(backbone, change, tmp_path):
    adapt(make_backbone(backbone), {"rank": 4, "scale": 5.0}, seed=3).save_pretrained(tmp_path)
    model = adapt(make_backbone(backbone), {"rank": 4})
    before = scores(model)
    weights = [module.base_layer.weight.clone() for module in model.modules() if isinstance(module, FacTLinear)]
    model.merge_adapter()
    merged = scores(model)
    with pytest.raises(ValueError, match="merged"):
        change(model, tmp_path)
    assert torch.equal(scores(model), merged)
    model.unmerge_adapter()
    torch.testing.assert_close(scores(model), before, rtol=1e-4, atol=1e-4)
    layers = (module for module in model.modules() if isinstance(module, FacTLinear))
    for layer, weight in zip(layers, weights, strict=True):
        torch.testing.assert_close(layer.base_layer.weight, nn.Parameter(weight, requires_grad=False))
