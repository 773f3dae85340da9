"""What merging adds is what unmerging takes out, and a weight that would lose the increment is refused by name."""

import copy

import pytest
import torch
from backbones import images, logits, make_backbone
from peft import get_peft_model
from torch.nn.utils import parametrizations, prune, spectral_norm, weight_norm

from fact_peft import FacTConfig

# Adding and subtracting a number of the size of 1 rounds twice.
ROUNDING = 1e-5


def adapted(backbone=None, **settings):
    torch.manual_seed(0)
    model = make_backbone("vit") if backbone is None else backbone
    return get_peft_model(model, FacTConfig(**{"rank": 4, "init_weights": False, **settings})).eval()


def base_weights(model):
    return {name: p.clone() for name, p in model.named_parameters() if name.endswith("base_layer.weight")}


def assert_restored(model, before):
    for name, parameter in model.named_parameters():
        if name in before:
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=ROUNDING)


def change_scale(model):
    model.peft_config["default"].scale = 500.0


def train(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fact_" in name:
                parameter.add_(1.0)


def load(model):
    state = {name: value + 1 for name, value in model.state_dict().items() if ".fact_" in name}
    model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("decomposition", ["tt", "tk", "cp"])
@pytest.mark.parametrize("change", [change_scale, train, load])
def test_unmerging_takes_out_what_was_added(change, decomposition):
    model = adapted(decomposition=decomposition)
    before = base_weights(model)
    model.merge_adapter()
    assert any((p - before[name]).abs().max() > 0.01 for name, p in model.named_parameters() if name in before)
    change(model)
    model.unmerge_adapter()
    assert_restored(model, before)
    assert not any(stack.copies or stack.num_merged for stack in model.base_model.model.factors.values())


def test_layers_merged_at_different_times_unmerge_what_each_added():
    model = adapted()
    before = base_weights(model)
    first, second, *_ = (module for module in model.modules() if hasattr(module, "fact_slices"))
    first.merge()
    train(model)
    second.merge()
    change_scale(model)
    first.unmerge()
    second.unmerge()
    assert_restored(model, before)


def test_a_copy_of_a_merged_model_unmerges_by_itself():
    model = adapted(modules_to_save=[])
    before = base_weights(model)
    model.merge_adapter()
    copied = copy.deepcopy(model)
    train(model)
    model.unmerge_adapter()
    assert copied.get_model_status().merged_adapters == ["default"]
    change_scale(copied)
    copied.unmerge_adapter()
    assert_restored(model, before)
    assert_restored(copied, before)


def test_stacks_heads_and_model_read_one_config():
    model = adapted(modules_to_save=["classifier"])
    plain = adapted(scale=7.0)
    model.peft_config["default"].scale = 7.0
    with torch.no_grad():
        assert torch.equal(logits(model, images()), logits(plain, images()))
    factors = model.base_model.model.factors
    head = model.base_model.model.classifier
    assert factors.configs["default"] is model.peft_config["default"]
    assert all(stack.configs is factors.configs for stack in factors.values())
    assert head.configs is factors.configs


def with_pruning(layer, name):
    prune.l1_unstructured(layer, name, amount=0.5)


COMPUTED = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old weight_norm": weight_norm,
    "old spectral_norm": spectral_norm,
    "prune": with_pruning,
}


def test_a_safe_merge_of_two_is_refused_as_a_whole_if_their_sum_overflows():
    model = get_peft_model(make_backbone("vit").half(), FacTConfig(rank=1, modules_to_save=[]), "first")
    model.add_adapter("second", FacTConfig(rank=1, modules_to_save=[]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".fact_U." in name or ".fact_V." in name:
                parameter.fill_(1.0)
            elif ".fact_Sigma." in name:
                parameter[9] = 4e4 / 32  # times the default scale
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter second"):
        model.merge_adapter(["first", "second"], safe_merge=True)
    assert model.get_model_status().merged_adapters == []


@pytest.mark.filterwarnings("ignore:.torch.nn.utils.weight_norm:FutureWarning")
@pytest.mark.parametrize("compute", COMPUTED.values(), ids=COMPUTED)
def test_a_weight_that_is_computed_anew_is_not_merged(compute):
    backbone = make_backbone("vit")
    compute(backbone.vit.layers[1].mlp.fc1, "weight")
    model = adapted(backbone)
    with torch.no_grad():
        expected = logits(model, images())
        for merge in (model.merge_adapter, model.merge_and_unload, lambda: model.merge_adapter(safe_merge=True)):
            with pytest.raises(ValueError, match=r"merged into vit\.layers\.1\.mlp\.fc1: its weight is computed from"):
                merge()
            assert model.get_model_status().merged_adapters == []
            assert torch.equal(logits(model, images()), expected)
        # Other layers can be merged.
        others = adapted(backbone=copy.deepcopy(model.unload()), target_modules=["q_proj"])
        expected = logits(others, images())
        others.merge_adapter()
        torch.testing.assert_close(logits(others, images()), expected, rtol=0, atol=1e-4)
