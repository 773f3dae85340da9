"""The adapter on disk: small, self-describing, and refused where it does not belong."""

import copy
import json
import math
import pickle

import pytest
import torch
from backbones import BACKBONES, VIT_SHAPE, images, logits, make_backbone, vit
from peft import AutoPeftModel, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTForImageClassification

from fact_peft import Adapter, FacTConfig, hotswap_adapter
from fact_peft.method.decomposition import DECOMPOSITIONS

pytestmark = pytest.mark.compatibility

EVERYWHERE = [(decomposition, backbone) for decomposition in DECOMPOSITIONS for backbone in BACKBONES]


def adapted(decomposition="tt", backbone="vit", seed=0, **settings):
    model = make_backbone(backbone)
    torch.manual_seed(seed)
    config = FacTConfig(**{"rank": 4, "decomposition": decomposition, "init_weights": False, "scale": 3.0, **settings})
    return get_peft_model(model, config).eval()


@torch.no_grad()
def scores(model):
    return logits(model.eval(), images())


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize("decomposition, backbone", EVERYWHERE)
def test_reload_is_bit_equal_under_another_seed_and_name(decomposition, backbone, low_cpu_mem_usage, tmp_path):
    model = adapted(decomposition, backbone)
    model.save_pretrained(tmp_path)
    torch.manual_seed(99)
    loaded = PeftModel.from_pretrained(
        make_backbone(backbone), tmp_path, adapter_name="customer", low_cpu_mem_usage=low_cpu_mem_usage
    )
    assert torch.equal(scores(loaded), scores(model))
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert not any(parameter.is_meta for parameter in loaded.parameters())
    # As torch allocates, and not as they lie in the file: some processors' products round by that, at larger sizes.
    factors = [parameter for name, parameter in loaded.named_parameters() if ".fact_" in name]
    assert factors and all(factor.data_ptr() % 64 == 0 for factor in factors)


@pytest.mark.parametrize("decomposition, backbone", EVERYWHERE)
def test_second_adapter_loads_beside_the_first(decomposition, backbone, tmp_path):
    second = adapted(decomposition, backbone, seed=3, rank=2)
    second.save_pretrained(tmp_path)
    model = adapted(decomposition, backbone)
    first = scores(model)
    model.load_adapter(tmp_path, "second")
    assert torch.equal(scores(model), first)
    model.set_adapter("second")
    assert torch.equal(scores(model), scores(second))


def test_adapter_loaded_onto_a_half_precision_base_for_inference_is_frozen(tmp_path):
    adapted().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit", torch.bfloat16), tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert {p.dtype for name, p in loaded.named_parameters() if ".fact_" in name} == {torch.float32}


def test_training_goes_on_after_reloading(tmp_path):
    adapted().save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path, is_trainable=True)
    trainable = {name for name, parameter in loaded.named_parameters() if parameter.requires_grad}
    assert trainable == {name for name, parameter in adapted().named_parameters() if parameter.requires_grad}


def test_auto_peft_model_loads_backbone_and_adapter(tmp_path):
    make_backbone("vit").save_pretrained(tmp_path / "backbone")
    backbone = ViTForImageClassification.from_pretrained(tmp_path / "backbone")
    torch.manual_seed(0)
    model = get_peft_model(backbone, FacTConfig(rank=4, init_weights=False)).eval()
    model.save_pretrained(tmp_path / "adapter")
    loaded = AutoPeftModel.from_pretrained(tmp_path / "adapter", num_labels=VIT_SHAPE["num_labels"])
    assert torch.equal(scores(loaded), scores(model))


@pytest.mark.parametrize("decomposition, backbone", EVERYWHERE)
def test_each_factor_appears_once(decomposition, backbone, tmp_path):
    model = adapted(decomposition, backbone)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    factors = {name: value for name, value in saved.items() if ".fact_" in name}
    num_stacks = len(model.get_base_model().factors)
    assert len(factors) == num_stacks * (2 + len(DECOMPOSITIONS[decomposition].core_factors))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert sum(value.numel() for value in saved.values()) == trained


def test_layout_is_recorded_compactly(tmp_path):
    adapted().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["layout"] == [
        "vit.layers.0-1: attention.q_proj 32x32, attention.k_proj 32x32, attention.v_proj 32x32, "
        "attention.o_proj 32x32, mlp.fc1 32x128, mlp.fc2 128x32"
    ]
    assert "_filled_in" not in config


def test_layout_on_disk_is_that_of_the_model_even_if_its_config_served_another(tmp_path):
    config = FacTConfig(rank=4, init_weights=False)
    model = get_peft_model(make_backbone("vit"), config)
    get_peft_model(make_backbone("swin"), config)
    model.save_pretrained(tmp_path)
    assert torch.equal(scores(PeftModel.from_pretrained(make_backbone("vit"), tmp_path)), scores(model))


OTHER_BACKBONES = {
    "width": (lambda: vit(hidden_size=48, intermediate_size=192), "attention.q_proj 48x48"),
    "depth": (lambda: vit(num_hidden_layers=3), "vit.layers.0-2"),
    "mlp": (lambda: vit(intermediate_size=64), "mlp.fc1 32x64"),
    "architecture": (lambda: make_backbone("swin"), "swin.encoder.layers.0.blocks.0: "),
    "names": (lambda: make_backbone("timm"), "blocks.0-1: mlp.fc1 32x128"),
}


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("difference", OTHER_BACKBONES)
def test_loading_onto_another_backbone_names_both_sides_and_changes_nothing(difference, decomposition, tmp_path):
    adapted(decomposition).save_pretrained(tmp_path)
    build, model_side = OTHER_BACKBONES[difference]
    backbone = build()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    with pytest.raises(ValueError, match="belongs to other linear layers") as error:
        PeftModel.from_pretrained(backbone, tmp_path)
    assert "adapter: vit.layers.0-1: attention.q_proj 32x32" in str(error.value)
    assert "model:   " in str(error.value) and model_side in str(error.value)
    assert {name for name, parameter in backbone.named_parameters() if parameter.requires_grad} == trainable
    torch.testing.assert_close(dict(backbone.state_dict()), before, rtol=0, atol=0)
    assert not any(isinstance(module, BaseTunerLayer) for module in backbone.modules())
    assert not hasattr(backbone, "factors") and not hasattr(backbone, "peft_config")


def test_loading_beside_an_adapter_of_the_wrong_backbone_keeps_the_model(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = get_peft_model(vit(num_hidden_layers=3).eval(), FacTConfig(rank=4, init_weights=False))
    expected, names = scores(model), set(model.state_dict())
    with pytest.raises(ValueError, match="belongs to other linear layers"):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"] and set(model.state_dict()) == names
    assert torch.equal(scores(model), expected)


def test_another_target_set_is_refused(tmp_path):
    adapted(target_modules=["q_proj", "v_proj"]).save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps({**config, "target_modules": ["q_proj", "k_proj"]}))
    with pytest.raises(ValueError, match="belongs to other linear layers") as error:
        PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    assert "attention.v_proj 32x32" in str(error.value) and "attention.k_proj 32x32" in str(error.value)


def test_reordered_layers_of_equal_shape_are_refused(tmp_path):
    class Swapped(torch.nn.Module):
        def __init__(self, names):
            super().__init__()
            for name in names:
                setattr(self, name, torch.nn.Linear(8, 8))

    config = FacTConfig(rank=2, target_modules=["q", "k"])
    get_peft_model(Swapped("qk"), config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="adapter: q 8x8, k 8x8\n  model:   k 8x8, q 8x8"):
        PeftModel.from_pretrained(Swapped("kq"), tmp_path)


def damage_truncate(file):
    file.write_bytes(file.read_bytes()[:-40])


def damage_header(file):
    file.write_bytes(file.read_bytes()[:20])


def damage_rename(file):
    file.rename(file.with_name("weights.safetensors"))


def damage_nan(file):
    tensors = load_file(file)
    next(value for name, value in tensors.items() if name.endswith("fact_V"))[0, 0] = torch.nan
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    "damage, message",
    [
        (damage_truncate, "adapter_model.safetensors .* is not a whole safetensors file"),
        (damage_header, "adapter_model.safetensors .* is not a whole safetensors file"),
        (damage_rename, "has no adapter_model.safetensors but weights.safetensors"),
        (damage_nan, r"adapter_model.safetensors holds NaN or infinity in base_model.model.factors.32x32.fact_V"),
    ],
)
def test_damaged_files_are_refused_before_the_model_is_touched(damage, message, tmp_path):
    adapted().save_pretrained(tmp_path)
    damage(tmp_path / "adapter_model.safetensors")
    backbone = make_backbone("vit")
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(backbone, tmp_path)
    assert backbone.state_dict().keys() == make_backbone("vit").state_dict().keys()
    model = adapted()
    with pytest.raises(ValueError, match=message):
        model.load_adapter(tmp_path, "other")
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize("scale", [0, math.nan, True])
def test_a_scale_that_cannot_be_loaded_is_not_saved(scale, tmp_path):
    model = adapted()
    model.peft_config["default"].scale = scale
    with pytest.raises(ValueError, match="scale="):
        model.save_pretrained(tmp_path)
    assert not (tmp_path / "adapter_config.json").exists()


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda value: pickle.loads(pickle.dumps(value))])
def test_an_adapter_can_be_copied_and_sent_to_another_process(copied):
    model = adapted()
    adapter = copied(Adapter.of(model))
    model.base_model.set_scale("default", 1.0)
    adapter.fill(model)
    expected = Adapter.of(model).state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in adapter.state_dict().items())


@pytest.mark.parametrize("lost", [["weight", "bias"], ["bias"]])
@pytest.mark.parametrize("wrapped", [False, True])
def test_an_adapter_without_its_head_is_refused_before_the_model_is_touched(wrapped, lost, tmp_path):
    trained = adapted(seed=1)
    trained.save_pretrained(tmp_path)
    file = tmp_path / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in lost:
        del tensors[f"base_model.model.classifier.{name}"]
    save_file(tensors, file, metadata={"format": "pt"})
    adapter = Adapter.read(tmp_path)
    model = adapted() if wrapped else make_backbone("vit")
    state, expected = set(model.state_dict()), scores(model)
    with pytest.raises(ValueError, match=r"has no classifier\.bias.*\.replace\(modules_to_save=\[\]\)"):
        adapter.attach(model, "other")
    with pytest.raises(ValueError, match=r"has no classifier\.bias"):
        model.load_adapter(tmp_path, "other") if wrapped else PeftModel.from_pretrained(model, tmp_path, "other")
    if wrapped:
        with pytest.raises(ValueError, match=r"has no classifier\.bias"):
            hotswap_adapter(model, adapter)
    assert set(model.state_dict()) == state and torch.equal(scores(model), expected)
    if len(lost) == 2:
        adapter.replace(modules_to_save=[]).attach(model, "other")  # as the message says
        assert any(".fact_U.other" in name for name in model.state_dict())


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda state, key: state.pop(key), r"missing in the file, \(32, 4\) in the model"),
        (lambda state, key: state.update({key: state[key][:, :2]}), r"\(32, 2\) in the file, \(32, 4\) in the model"),
        (lambda state, key: state.update({key: state[key] / 0}), "holds NaN or infinity"),
    ],
)
def test_state_dict_that_does_not_fit_is_refused_whole(change, message):
    model = adapted()
    state = {name: value.clone() for name, value in get_peft_model_state_dict(adapted(seed=1)).items()}
    change(state, "base_model.model.factors.32x32.fact_U")
    expected = scores(model)
    with pytest.raises(ValueError, match=message):
        set_peft_model_state_dict(model, state)
    assert torch.equal(scores(model), expected)


def test_file_holds_only_tensors_and_the_format(tmp_path):
    adapted(modules_to_save=[]).save_pretrained(tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        assert sorted(file.keys()) == [
            "base_model.model.factors.32x32.fact_Sigma",
            "base_model.model.factors.32x32.fact_U",
            "base_model.model.factors.32x32.fact_V",
        ]


def test_pickled_checkpoints_load_too(tmp_path):
    model = adapted()
    model.save_pretrained(tmp_path, safe_serialization=False)
    assert torch.equal(scores(PeftModel.from_pretrained(make_backbone("vit"), tmp_path)), scores(model))


def test_adapter_of_a_full_size_config_is_light():
    with torch.device("meta"):
        model = get_peft_model(ViTForImageClassification(ViTConfig()), FacTConfig(rank=8, modules_to_save=[]))
    assert model.get_nb_trainable_parameters()[0] == 21_504
