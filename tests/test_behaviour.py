"""What a PEFT user expects of an adapter, on every decomposition, backbone and dtype."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from backbones import BACKBONES, holdings, images, logits, make_backbone
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from fact_peft import FacTConfig, FacTLinear
from fact_peft.method.decomposition import DECOMPOSITIONS

pytestmark = pytest.mark.compatibility

# Merging rounds W + dW to the dtype of W, once per weight; the layers above pass the difference on.
MERGE_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 2e-2}
CASES = [
    pytest.param(decomposition, backbone, dtype, id=f"{decomposition}-{backbone}-{str(dtype).removeprefix('torch.')}")
    for decomposition in DECOMPOSITIONS
    for backbone in BACKBONES
    for dtype in MERGE_TOLERANCE
]
everywhere = pytest.mark.parametrize("decomposition, backbone, dtype", CASES)
in_float32 = pytest.mark.parametrize(
    "decomposition, backbone", [(decomposition, backbone) for decomposition in DECOMPOSITIONS for backbone in BACKBONES]
)


def adapted(decomposition="tt", backbone="vit", dtype=torch.float32, seed=0, name="default", **settings):
    """A model with an adapter that changes its output, in evaluation mode."""
    config = FacTConfig(**{"rank": 4, "decomposition": decomposition, "init_weights": False, "scale": 3.0, **settings})
    model = make_backbone(backbone, dtype)
    torch.manual_seed(seed)
    return get_peft_model(model, config, adapter_name=name).eval()


def add(model, name, seed=1, **settings):
    torch.manual_seed(seed)
    model.add_adapter(name, FacTConfig(**{"rank": 4, "init_weights": False, "scale": 3.0, **settings}))
    return model.eval()


@torch.no_grad()
def scores(model, dtype=torch.float32):
    return logits(model, images(dtype)).to(dtype)  # a head trained in float32 gives float32


def train(model, steps=3, dtype=torch.float32, lr=0.1):
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits(model, images(dtype)).float(), torch.arange(3)).backward()
        optimizer.step()
    return model.eval()


def base_state(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@everywhere
@pytest.mark.parametrize("init_weights", [True, "orthogonal"])
def test_untrained_adapter_changes_nothing(decomposition, backbone, dtype, init_weights):
    model = adapted(decomposition, backbone, dtype, init_weights=init_weights)
    assert torch.equal(scores(model, dtype), scores(make_backbone(backbone, dtype), dtype))


@everywhere
def test_training_moves_factors_and_head_and_nothing_else(decomposition, backbone, dtype):
    model = adapted(decomposition, backbone, dtype)
    before = base_state(model)
    train(model, dtype=dtype)
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert moved == trainable
    assert all(".fact_" in name or ".modules_to_save." in name for name in trainable)
    assert any(".fact_U" in name for name in trainable) and any(".modules_to_save." in name for name in trainable)


@everywhere
def test_adapters_stay_in_float32(decomposition, backbone, dtype):
    def adapter_dtypes(model):
        return {p.dtype for name, p in model.named_parameters() if ".fact_" in name or ".modules_to_save." in name}

    model = adapted(decomposition, backbone, dtype)
    assert adapter_dtypes(model) == {torch.float32}
    assert logits(model, images(dtype)).dtype == torch.float32
    kept = get_peft_model(make_backbone(backbone, dtype), FacTConfig(rank=4), autocast_adapter_dtype=False)
    assert adapter_dtypes(kept) == {dtype}
    assert logits(kept, images(dtype)).dtype == dtype


@everywhere
def test_merge_and_unload_gives_the_plain_model_with_the_same_output(decomposition, backbone, dtype):
    model = train(adapted(decomposition, backbone, dtype), dtype=dtype)
    expected = scores(model, dtype)
    merged = model.merge_and_unload()
    plain = make_backbone(backbone, dtype)
    torch.testing.assert_close(
        scores(merged, dtype), expected, rtol=0, atol=MERGE_TOLERANCE[dtype] * expected.abs().max()
    )
    assert (scores(plain, dtype) - expected).abs().max() > 0.1
    assert type(merged) is type(plain)
    assert [(n, type(m)) for n, m in merged.named_modules()] == [(n, type(m)) for n, m in plain.named_modules()]
    for module, original in zip(merged.modules(), plain.modules(), strict=True):
        assert vars(module).keys() == vars(original).keys()
    assert holdings(merged) == holdings(plain)
    assert merged.state_dict().keys() == plain.state_dict().keys()


@in_float32
def test_merge_and_unmerge_restore_the_output(decomposition, backbone):
    model = adapted(decomposition, backbone, modules_to_save=[])  # with a head PEFT calls the status irregular
    expected, weights = scores(model), base_state(model)
    model.merge_adapter(safe_merge=True)
    assert model.get_model_status().merged_adapters == ["default"]
    torch.testing.assert_close(scores(model), expected, rtol=0, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(model.state_dict(), weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(scores(model), expected, rtol=0, atol=1e-5)


@in_float32
def test_merging_one_by_one_equals_merging_together(decomposition, backbone):
    one_by_one = add(adapted(decomposition, backbone, modules_to_save=[]), "other", modules_to_save=[])
    together = copy.deepcopy(one_by_one)
    one_by_one.merge_adapter(["default"])
    with pytest.warns(UserWarning, match="additionally merging other"):
        one_by_one.merge_adapter(["other"])
    together.merge_adapter(["default", "other"])
    torch.testing.assert_close(scores(one_by_one), scores(together), rtol=0, atol=1e-5)


@in_float32
def test_unload_gives_the_base_model_back(decomposition, backbone):
    # PEFT's unload keeps a trained head, for every method.
    model = train(adapted(decomposition, backbone, modules_to_save=[])).unload()
    assert torch.equal(scores(model), scores(make_backbone(backbone)))
    assert not any(isinstance(module, BaseTunerLayer) for module in model.modules())
    assert model.state_dict().keys() == make_backbone(backbone).state_dict().keys()


@in_float32
def test_disable_adapter_gives_the_base_model(decomposition, backbone):
    model = train(adapted(decomposition, backbone))
    expected = scores(model)
    with model.disable_adapter():
        assert torch.equal(scores(model), scores(make_backbone(backbone)))
    assert torch.equal(scores(model), expected)
    model.merge_adapter()
    with model.disable_adapter():
        torch.testing.assert_close(scores(model), scores(make_backbone(backbone)), rtol=0, atol=1e-5)
    assert model.get_model_status().merged_adapters == []
    torch.testing.assert_close(scores(model), expected, rtol=0, atol=1e-5)


@in_float32
def test_switching_between_adapters(decomposition, backbone):
    model = add(adapted(decomposition, backbone), "other", rank=2, decomposition="tk", scale=1.0)
    first = scores(model)
    model.set_adapter("other")
    second = scores(model)
    assert (first - second).abs().max() > 1e-2
    alone = adapted("tk", backbone, seed=1, rank=2, scale=1.0)
    assert torch.equal(second, scores(alone))
    model.set_adapter("default")
    assert torch.equal(scores(model), first)


def test_two_active_adapters_add_up():
    model = add(adapted(modules_to_save=[]), "other", modules_to_save=[])
    layer = model.get_base_model().vit.layers[0].mlp.fc1
    x = torch.randn(3, 32)
    both = layer.get_delta_weight("default") + layer.get_delta_weight("other")
    model.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), layer.base_layer(x) + x @ both.T)


def test_second_adapter_leaves_the_first_as_trainable_as_it_was():
    model = adapted()
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    add(model, "other")
    assert {name for name, parameter in model.named_parameters() if parameter.requires_grad} == trainable
    model.set_adapter("other")
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name.replace("default", "other") for name in trainable
    }


@in_float32
def test_delete_adapter_leaves_nothing_behind(decomposition, backbone):
    model = adapted(decomposition, backbone)
    expected, names, held = scores(model), set(model.state_dict()), holdings(model)
    narrow = [name for name, layer in model.get_base_model().named_modules() if isinstance(layer, FacTLinear)][:1]
    add(model, "other")
    model.add_adapter("narrow", FacTConfig(rank=2, target_modules=narrow))
    factor = weakref.ref(next(p for name, p in model.named_parameters() if name.endswith("fact_U.other")))
    for name in ("other", "narrow"):
        model.delete_adapter(name)
        assert name not in model.peft_config
        assert not any(f".{name}" in key for key in model.state_dict())
    assert holdings(model) == held
    gc.collect()
    assert factor() is None
    assert set(model.state_dict()) == names
    assert torch.equal(scores(model), expected)


def test_stack_of_a_deleted_adapter_goes_with_it():
    model = adapted(target_modules=["q_proj"], modules_to_save=[])
    model.add_adapter("rectangular", FacTConfig(rank=2, target_modules=["classifier"], modules_to_save=[]))
    assert set(model.get_base_model().factors) == {"32x32", "32x5"}
    model.delete_adapter("rectangular")
    assert set(model.get_base_model().factors) == {"32x32"}


def test_deleting_the_active_adapter_activates_another():
    model = add(adapted(), "other")
    model.set_adapter("other")
    other = scores(model)
    model.set_adapter("default")
    with pytest.warns(UserWarning, match="Setting active adapter to other"):
        model.delete_adapter("default")
    assert model.active_adapters == ["other"]
    assert torch.equal(scores(model), other)


def test_after_a_delete_all_layers_agree_on_the_active_adapter():
    """As they must where adapters have different layers; PEFT lets each layer choose among its own."""
    model = adapted(target_modules=["q_proj"], modules_to_save=[], name="q")
    add(model, "v", seed=2, target_modules=["v_proj"], modules_to_save=[])
    add(model, "w", seed=3, target_modules=["q_proj"], modules_to_save=[])
    model.set_adapter("v")
    expected = scores(model)
    model.set_adapter("q")
    with pytest.warns(UserWarning, match="Setting active adapter to v"):
        model.delete_adapter("q")
    assert model.active_adapters == ["v"] and model.active_adapter == "v"
    assert torch.equal(scores(model), expected)


def test_deleting_one_of_three_active_adapters_leaves_two():
    """PEFT gives up halfway if the one that goes has a head."""
    model = add(adapted(name="v", modules_to_save=[]), "w", seed=2, modules_to_save=[])
    model.base_model.set_adapter(["v", "w"])
    expected = scores(model)
    add(model, "q", seed=3)
    model.base_model.set_adapter(["q", "v", "w"])
    assert not torch.equal(scores(model), expected)
    model.delete_adapter("q")
    assert model.active_adapters == ["v", "w"] and torch.equal(scores(model), expected)


def test_safe_merge_refuses_nan_and_changes_nothing():
    model = adapted()
    # The last slice only, so that every other layer could be merged.
    model.get_base_model().factors["32x32"].fact_Sigma["default"].data[-1] = torch.nan
    state, layers = base_state(model), [type(module) for module in model.modules()]
    for merge in (model.merge_and_unload, model.merge_adapter):
        with pytest.raises(ValueError, match=r"NaNs detected in the merged weights. The adapter default"):
            merge(safe_merge=True)
        assert [type(module) for module in model.modules()] == layers
        torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0, equal_nan=True)


@in_float32
def test_every_factor_is_one_parameter_under_one_name(decomposition, backbone):
    model = adapted(decomposition, backbone)
    factors = [name for name, _ in model.named_parameters(remove_duplicate=False) if ".fact_" in name]
    num_stacks = len(model.get_base_model().factors)
    assert len(factors) == len(set(factors)) == num_stacks * (2 + len(DECOMPOSITIONS[decomposition].core_factors))
    assert all(name.startswith("base_model.model.factors.") for name in factors)
    stacks = {id(stack) for stack in model.get_base_model().factors.values()}
    for layer in model.modules():
        if isinstance(layer, FacTLinear):
            assert {id(stack) for stack in layer.fact_stacks.values()} <= stacks


@in_float32
def test_copies_are_whole_and_independent(decomposition, backbone):
    model = adapted(decomposition, backbone)
    expected = scores(model)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(scores(copied), expected)
        train(copied)
        assert (scores(copied) - expected).abs().max() > 1e-3
        assert torch.equal(scores(model), expected)


@in_float32
def test_whole_state_dict_travels(decomposition, backbone):
    model = train(adapted(decomposition, backbone))
    other = adapted(decomposition, backbone, seed=5)
    other.load_state_dict(model.state_dict())
    assert torch.equal(scores(other), scores(model))


@everywhere
def test_casting_the_whole_model(decomposition, backbone, dtype):
    model = adapted(decomposition, backbone).to(dtype)
    assert {parameter.dtype for parameter in model.parameters()} == {dtype}
    assert logits(model, images(dtype)).dtype == dtype


def test_autocast_trains_float32_factors():
    model = adapted()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = logits(model, images()).float().square().sum()
    loss.backward()
    reference = adapted()
    logits(reference, images()).square().sum().backward()
    for (name, parameter), (_, expected) in zip(model.named_parameters(), reference.named_parameters(), strict=True):
        if parameter.requires_grad:
            assert parameter.grad.dtype == torch.float32, name
            torch.testing.assert_close(parameter.grad, expected.grad, rtol=0, atol=0.1 * expected.grad.abs().max())


def test_dropout_acts_on_the_activation_between_core_and_V():
    model = adapted(fact_dropout=0.5)
    layer = model.get_base_model().vit.layers[0].mlp.fc1
    x = torch.randn(1, 32)
    U, core, V = layer.terms("default")
    h = (x @ U @ core).view(4, 4)
    layer.train()
    torch.manual_seed(3)
    dropped = nn.functional.dropout(h.reshape(1, 16), 0.5).view(4, 4)
    expected = layer.base_layer(x) + 3.0 * (dropped @ V.T).reshape(1, 128)
    torch.manual_seed(3)
    torch.testing.assert_close(layer(x), expected)
    layer.eval()
    torch.testing.assert_close(layer(x), layer.base_layer(x) + 3.0 * (h @ V.T).reshape(1, 128))


@pytest.mark.parametrize("bias", ["all", "fact_only"])
def test_bias_is_trained_and_saved(bias, tmp_path):
    model = train(adapted(bias=bias))
    trained = {name for name, p in model.named_parameters() if p.requires_grad and name.endswith("bias")}
    in_layers = {name for name in trained if ".base_layer." in name}
    assert len(in_layers) == 12
    assert (trained - in_layers - {n for n in trained if ".modules_to_save." in n} != set()) == (bias == "all")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    assert torch.equal(scores(loaded), scores(model))


def test_conv1d_and_fan_in_fan_out():
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    model = get_peft_model(nn.Sequential(Conv1D(24, 8)), FacTConfig(rank=2, target_modules=["0"], init_weights=False))
    x = torch.randn(4, 8)
    layer = model.get_base_model()[0]
    expected = layer.base_layer(x) + x @ layer.get_delta_weight("default")
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(model.merge_and_unload()(x), expected)


def test_fan_in_fan_out_of_a_linear_layer_is_put_right():
    with pytest.warns(UserWarning, match=r"vit.layers.0.attention.q_proj is an nn.Linear, .* fan_in_fan_out=False"):
        model = adapted(fan_in_fan_out=True)
    assert model.peft_config["default"].fan_in_fan_out is False
    expected = scores(model)
    torch.testing.assert_close(scores(model.merge_and_unload()), expected, rtol=0, atol=1e-5)


def test_the_classifier_is_trained_unless_switched_off(caplog):
    for backbone in BACKBONES:
        with caplog.at_level("INFO", logger="fact_peft"):
            model = adapted(backbone=backbone)
        names = model.peft_config["default"].modules_to_save
        assert names == [{"timm": "head"}.get(backbone, "classifier")]
        assert f"modules_to_save={names}" in caplog.text
        caplog.clear()
        model = adapted(backbone=backbone, modules_to_save=[])
        assert all(".fact_" in name for name, p in model.named_parameters() if p.requires_grad)


def test_one_config_serves_several_models():
    config = FacTConfig(rank=4)
    for backbone in BACKBONES:
        model = get_peft_model(make_backbone(backbone), config)
        model.print_trainable_parameters()
    explicit = FacTConfig(rank=4, target_modules="all-linear")
    for backbone in BACKBONES:
        get_peft_model(make_backbone(backbone), explicit)


def test_all_linear_leaves_the_classifier_to_modules_to_save():
    model = adapted(target_modules="all-linear")
    assert not any("classifier" in name for name in model.base_model.targeted_module_names)
    assert len(model.base_model.targeted_module_names) == 12


def test_print_and_status_name_the_method(capsys):
    model = adapted(modules_to_save=[])
    model.print_trainable_parameters()
    # 2 d r + N r^2 with d = 32, N = 2 * 12, r = 4
    assert "trainable params: 640 ||" in capsys.readouterr().out
    status = model.get_model_status()
    assert status.adapter_model_type == "FacTModel" and status.peft_types == {"default": "FACT"}
    assert status.requires_grad == {"default": True} and status.available_adapters == ["default"]
    assert "FacTLinear(" in repr(model) and "default: slices 0-0 of 32x32" in repr(model)


def test_agrees_with_lora_of_the_same_factors():
    """PEFT's LoRA as the judge: the same increments give the same outputs and the same input gradients."""
    model = adapted(modules_to_save=[])
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
    lora = get_peft_model(make_backbone("vit"), LoraConfig(r=32, lora_alpha=32, target_modules=targets)).eval()
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, FacTLinear):
            delta = layer.get_delta_weight("default")
            twin = lora.get_base_model().get_submodule(name)
            left, values, right = torch.linalg.svd(delta, full_matrices=False)
            twin.lora_B["default"].weight.data = left * values
            twin.lora_A["default"].weight.data = right
    gradients = []
    for either in (model, lora):
        pixels = images().requires_grad_()
        logits(either, pixels).square().sum().backward()
        gradients.append(pixels.grad)
    torch.testing.assert_close(scores(model), scores(lora), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-5)
