"""What cannot be adapted is refused by name, with the model left as it was; what matches nothing is warned of."""

import copy
import warnings
from functools import partial

import pytest
import torch
from backbones import make_backbone, to_int8
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from torch import nn
from transformers import ViTForImageClassification

from fact_peft import Adapter, FacTConfig, FacTLinear, hotswap_adapter

CONFIG = {"rank": 2, "init_weights": False}


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return x + self.fc2(self.fc1(self.norm(x)).relu())


def blocks(count: int = 2) -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"blocks": nn.Sequential(*(Block() for _ in range(count)))})


def state(model: nn.Module) -> list[tuple[str, type]]:
    return [(name, type(module)) for name, module in model.named_modules()]


def assert_refused(model: nn.Module, config: FacTConfig, match: str, adapter_name: str = "default") -> None:
    before, fields = state(model), copy.deepcopy(config.to_dict())
    for adapt in (get_peft_model, lambda model, config, name: inject_adapter_in_model(config, model, name)):
        with warnings.catch_warnings(), pytest.raises(ValueError, match=match):
            warnings.simplefilter("ignore")  # of PEFT, about names
            adapt(model, config, adapter_name)
        assert state(model) == before
        assert {**config.to_dict(), "base_model_name_or_path": None} == {**fields, "base_model_name_or_path": None}


@pytest.mark.parametrize(
    "name", ["training", "_keys", "_modules", "_parameters", "_buffers", "keys", "forward", "T_destination", "", "a.b"]
)
@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained")
def test_adapter_cannot_have_the_name_of_an_attribute(name):
    model = make_backbone("vit")
    assert_refused(model, FacTConfig(**CONFIG), "cannot be the name of a parameter", name)
    adapted = get_peft_model(model, FacTConfig(**CONFIG))
    before = state(adapted)
    with pytest.raises(ValueError, match="cannot be the name of a parameter"):
        adapted.add_adapter(name, FacTConfig(**CONFIG))
    assert state(adapted) == before and list(adapted.peft_config) == ["default"]


@pytest.mark.parametrize("name", ["weight", "bias", "fact_U", "factors", "classifier", "base_layer", "modules_to_save"])
def test_other_words_of_peft_are_names_that_train_and_reload(name, tmp_path):
    model = get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG), name).train()
    model(torch.zeros(1, 3, 16, 16)).logits.sum().backward()
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path / name).eval()
    pixels = torch.randn(2, 3, 16, 16)
    assert torch.equal(loaded(pixels).logits, model.eval()(pixels).logits)


@pytest.mark.parametrize("name", ["vit", "mlp", "weight", "fact_U", "factors", "32x32", "classifier", "model"])
def test_they_are_refused_if_files_of_other_adapters_would_lack_tensors(name):
    for first, second in ((name, "other"), ("other", name)):
        model = get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG), first)
        before = state(model)
        with pytest.raises(ValueError, match=f"The adapter name '{name}' is also a part of the name"):
            model.add_adapter(second, FacTConfig(**CONFIG))
        assert state(model) == before and list(model.peft_config) == [first]


@pytest.mark.parametrize("settings", [{}, {"modules_to_save": ["classifier"]}], ids=["default", "named"])
def test_a_quantised_head_is_refused(settings):
    model = make_backbone("vit")
    to_int8(model)
    assert_refused(model, FacTConfig(**CONFIG, **settings), r"module classifier is quantised .* modules_to_save=\[\]")


def test_a_head_with_a_quantised_layer_inside_is_refused():
    model = nn.ModuleDict({**blocks(), "head": nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 4))})
    to_int8(model["head"])
    assert_refused(model, FacTConfig(**CONFIG, modules_to_save=["head"]), "module head is quantised")


def test_a_name_that_matches_nothing_is_named_with_what_would():
    with pytest.warns(UserWarning, match=r"modules_to_save has 'head', which matches no module .* It has classifier\."):
        get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG, modules_to_save=["head"]))
    with pytest.warns(
        UserWarning, match=r"target_modules has 'value', which matches no linear layer .* q_proj, k_proj"
    ):
        model = get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG, target_modules=["q_proj", "value"]))
    assert any(isinstance(module, FacTLinear) for module in model.modules())


def test_names_that_match_are_not_warned_of():  # warnings are errors here
    get_peft_model(
        make_backbone("timm"), FacTConfig(**CONFIG, target_modules=["qkv.q", "fc1"], modules_to_save=["head"])
    )
    # PEFT adds "score" and "classifier" for this task, of which a model has one.
    get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG, task_type="SEQ_CLS"))


def two_head_models() -> tuple[nn.Module, nn.Module]:
    first = make_backbone("vit")
    second = ViTForImageClassification(first.config).eval()
    second.vit = first.vit
    return first, second


def test_two_head_models_on_one_backbone_need_adapters_of_two_names():
    first, second = two_head_models()
    adapted = get_peft_model(first, FacTConfig(**CONFIG)).eval()
    pixels = torch.randn(2, 3, 16, 16)
    expected = adapted(pixels).logits
    before = state(second)
    with pytest.warns(UserWarning, match="second time"), pytest.raises(ValueError, match="'default' is taken"):
        get_peft_model(second, FacTConfig(**CONFIG))
    assert state(second) == before and torch.equal(adapted(pixels).logits, expected)

    with pytest.warns(UserWarning, match="second time"):
        other = get_peft_model(second, FacTConfig(**CONFIG), "other")
    other.train()(pixels).logits.sum().backward()
    trained = {name for name, parameter in other.named_parameters() if parameter.grad is not None}
    assert trained and all(name.endswith(".other") or ".other." in name for name in trained)
    adapted.set_adapter("default")
    assert torch.equal(adapted.eval()(pixels).logits, expected)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_a_peft_model_is_not_adapted_again():
    model = get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG))
    before = state(model)
    for adapted in (model, model.base_model):
        with (
            pytest.warns(UserWarning, match="second time"),
            pytest.raises(ValueError, match=r"add_adapter\(name, config"),
        ):
            get_peft_model(adapted, FacTConfig(**CONFIG), "other")
    assert state(model) == before


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute", "ignore:You are trying to modify a model")
def test_a_peft_model_of_another_method_is_adapted_inside():
    lora = get_peft_model(make_backbone("vit"), LoraConfig(target_modules=["q_proj"]))
    before = state(lora), list(lora.peft_config.values())
    for adapt in (get_peft_model, lambda model, config: inject_adapter_in_model(config, model)):
        with pytest.raises(ValueError, match=r"is a PeftModel already; pass model\.get_base_model\(\)"):
            adapt(lora, FacTConfig(**CONFIG))
        assert (state(lora), list(lora.peft_config.values())) == before
    model = get_peft_model(lora.get_base_model(), FacTConfig(**CONFIG))
    assert any(".fact_U." in name for name, _ in model.named_parameters())


def test_a_compiled_model_is_refused():
    compiled = torch.compile(make_backbone("vit"), backend="eager")
    assert_refused(compiled, FacTConfig(**CONFIG), r"compiled already; adapt it first: torch\.compile")


class Wrapper(nn.Module):
    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower, self.blocks = tower, nn.Sequential(Block(5), Block(5))

    def forward(self, pixels):
        return self.blocks(self.tower(pixels).logits)


@pytest.mark.parametrize(
    "inner",
    [
        FacTConfig(**CONFIG),
        LoraConfig(target_modules=["q_proj"], modules_to_save=["classifier"], init_lora_weights=False),
    ],
    ids=["FacT", "LoRA"],
)
def test_an_adapter_inside_the_model_stays_when_another_gets_its_name(inner):
    tower = get_peft_model(make_backbone("vit"), inner).eval()
    for name, parameter in tower.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.add_(1)
    pixels = torch.randn(2, 3, 16, 16)
    expected, before = tower(pixels).logits, {name: value.clone() for name, value in tower.state_dict().items()}
    settings = {**CONFIG, "target_modules": r"blocks\.\d\.fc."}
    with pytest.warns(UserWarning, match="second time"):
        get_peft_model(Wrapper(tower).eval(), FacTConfig(**settings))
    after = tower.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(value, after[name]) for name, value in before.items())
    assert torch.equal(tower(pixels).logits, expected)


def test_hotswap_leaves_an_adapter_of_the_same_name_inside_the_model(tmp_path):
    def build() -> tuple[nn.Module, PeftModel]:
        tower = get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG, modules_to_save=[])).eval()
        with pytest.warns(UserWarning, match="second time"):
            return tower, get_peft_model(
                Wrapper(tower).eval(), FacTConfig(**{**CONFIG, "target_modules": r"blocks\.\d\.fc."})
            )

    _, other = build()
    other.set_scale("default", 2 * other.peft_config["default"].scale)  # which is folded into V
    other.save_pretrained(tmp_path)
    tower, model = build()
    before = {name: value.clone() for name, value in tower.state_dict().items()}
    hotswap_adapter(model, tmp_path)
    assert all(torch.equal(value, before[name]) for name, value in tower.state_dict().items())


def test_a_model_around_an_adapted_one_saves_what_it_loads(tmp_path):
    def build() -> nn.Module:
        torch.manual_seed(0)
        inner = get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG), "inner")
        return Wrapper(inner).eval()

    settings = {**CONFIG, "target_modules": r"blocks\.\d\.fc."}
    with pytest.warns(UserWarning, match="second time"):
        outer = get_peft_model(build(), FacTConfig(**settings), "outer").eval()
    assert outer.peft_config["outer"].layout == ["blocks.0-1: fc1 5x5, fc2 5x5"]
    outer.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    loaded = PeftModel.from_pretrained(build(), tmp_path / "outer", "outer").eval()
    assert torch.equal(loaded(pixels), outer(pixels))


NESTED = pytest.mark.filterwarnings(  # what PEFT warns of when a model in a model is adapted
    "ignore:.*second time", "ignore:Already found a `peft_config`", "ignore:Found missing adapter keys"
)
CONFIGS = {
    "FacT": partial(FacTConfig, **CONFIG),
    "LoRA": partial(LoraConfig, r=2, init_lora_weights=False),
}


def around_an_adapted_model(method: str, name: str = "default") -> nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[method](target_modules=r".*_proj", modules_to_save=["classifier"])
    return Wrapper(get_peft_model(make_backbone("vit"), config, name)).eval()


@pytest.mark.parametrize("inner", CONFIGS)
@pytest.mark.parametrize("outer", CONFIGS)
@NESTED
def test_an_adapter_around_one_of_its_name_is_saved_with_the_head_inside(inner, outer, tmp_path):
    config = CONFIGS[outer](target_modules=r"blocks\.\d\.fc.")
    model = get_peft_model(around_an_adapted_model(inner), config).eval()
    model.get_submodule("base_model.model.tower.base_model.model.classifier").modules_to_save["default"].bias.data += 1
    model.save_pretrained(tmp_path)
    pixels = torch.randn(2, 3, 16, 16)
    loaded = PeftModel.from_pretrained(around_an_adapted_model(inner), tmp_path).eval()
    assert torch.equal(loaded(pixels), model(pixels))


@NESTED
def test_the_head_inside_a_model_is_loaded_only_where_an_adapter_has_its_name(tmp_path):
    config = partial(FacTConfig, **CONFIG, target_modules=r"blocks\.\d\.fc.")
    named_alike = get_peft_model(around_an_adapted_model("FacT"), config())
    named_alike.save_pretrained(tmp_path / "with")
    loaded = PeftModel.from_pretrained(around_an_adapted_model("FacT", "inner"), tmp_path / "with")
    expected, found = Adapter.of(named_alike), Adapter.of(loaded)
    assert all(torch.equal(found.factors["5x5"][letter], expected.factors["5x5"][letter]) for letter in "UV")
    assert len(expected.others) == 2 and not found.others
    loaded.save_pretrained(tmp_path / "without")
    model = around_an_adapted_model("FacT")
    before = state(model)
    with pytest.raises(ValueError, match="also the name of an adapter inside the model"):
        PeftModel.from_pretrained(model, tmp_path / "without")
    assert state(model) == before


@NESTED
@pytest.mark.parametrize("inner", CONFIGS)
def test_a_name_of_an_adapter_that_is_injected_inside_is_refused(inner):
    tower = make_backbone("vit")
    tower.add_adapter(CONFIGS[inner](target_modules=r".*_proj", modules_to_save=["classifier"]), "default")
    outer = FacTConfig(**CONFIG, target_modules=r"blocks\.\d\.fc.")
    assert_refused(Wrapper(tower), outer, "would save its head tower.classifier in the same file")
    get_peft_model(Wrapper(tower), outer, "outer")


def test_one_layer_at_two_places_is_refused():
    model = blocks()
    model["blocks"][1].fc2 = model["blocks"][0].fc2
    assert_refused(model, FacTConfig(**CONFIG), r"blocks\.0\.fc2 and blocks\.1\.fc2 are one layer at two places")
    get_peft_model(model, FacTConfig(**CONFIG, exclude_modules=["blocks.0.fc2", "blocks.1.fc2"]))


def test_tied_weights_of_two_targets_are_refused():
    model = blocks()
    model["blocks"][1].fc2.weight = model["blocks"][0].fc1.weight
    assert_refused(model, FacTConfig(**CONFIG), r"blocks\.0\.fc1 and blocks\.1\.fc2 have one weight")
    get_peft_model(model, FacTConfig(**CONFIG, exclude_modules=["blocks.1.fc2"]))


def test_one_block_at_two_places_is_adapted_once_and_merges_as_lora_does():
    def build() -> nn.Module:
        torch.manual_seed(0)
        shared = Block()
        return nn.ModuleDict({"blocks": nn.ModuleList([shared, Block(), shared])})

    def forward(model: nn.Module) -> torch.Tensor:
        x = torch.ones(1, 8)
        for block in model["blocks"]:
            x = block(x)
        return x

    model = build()
    adapted = get_peft_model(model, FacTConfig(**CONFIG))
    assert adapted.peft_config["default"].layout == ["blocks.0-1: fc1 8x8, fc2 8x8"]
    expected = forward(model)
    torch.testing.assert_close(forward(adapted.merge_and_unload()), expected)
    lora = get_peft_model(build(), LoraConfig(target_modules=["fc1", "fc2"]))
    assert {name.removeprefix("base_model.model.") for name in lora.targeted_module_names} == {
        f"blocks.{i}.fc{j}" for i in (0, 1) for j in (1, 2)
    }


def test_order_of_q_k_v_is_told_by_the_own_block():
    """blocks.1 has fewer heads of keys and values; blocks.10 has the projection that would fit its qkv."""

    class Attention(nn.Module):
        def __init__(self, out_features: int, read: int) -> None:
            super().__init__()
            self.qkv, self.proj = nn.Linear(8, out_features), nn.Linear(read, 8)

    class Attending(nn.Module):
        def __init__(self, *sizes: int) -> None:
            super().__init__()
            self.norm, self.attn = nn.LayerNorm(8), Attention(*sizes)

    model = nn.ModuleDict({"blocks": nn.ModuleList([Attending(24, 16 if i == 1 else 8) for i in range(11)])})
    assert_refused(
        model, FacTConfig(**CONFIG, target_modules=["qkv.q"]), r"blocks\.1\.attn\.qkv of Attention does not put out"
    )
    get_peft_model(model, FacTConfig(**CONFIG, target_modules=["qkv.q"], exclude_modules=["blocks.1.attn.qkv"]))


def test_switch_between_two_forwards_needs_both_to_require_gradients():
    """As with LoRA: set_adapter freezes the other adapter, also for the backward of what was computed before."""
    pixels = torch.randn(2, 3, 16, 16)
    torch.manual_seed(0)
    model = get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG), "first")
    model.add_adapter("second", FacTConfig(**CONFIG))

    def gradients(name: str) -> list[torch.Tensor]:
        return [p.grad for n, p in model.named_parameters() if n.endswith(f".{name}") and p.grad is not None]

    expected = {}
    for name in ("first", "second"):
        model.zero_grad(set_to_none=True)
        model.set_adapter(name)
        model(pixels).logits.square().sum().backward()
        expected[name] = gradients(name)
    model.zero_grad(set_to_none=True)
    model.set_adapter("first")
    loss = model(pixels).logits.square().sum()
    model.set_adapter("second")
    model.base_model.set_requires_grad(["first", "second"])
    (loss + model(pixels).logits.square().sum()).backward()
    for name in ("first", "second"):
        assert expected[name]
        torch.testing.assert_close(gradients(name), expected[name])


@pytest.mark.parametrize("name", ["CLIP", "SigLIP", "DINOv2", "ViT", "BERT"])
def test_feature_extraction_takes_pixel_values(name):
    import transformers

    classes = {"CLIP": "CLIPVisionModel", "SigLIP": "SiglipVisionModel", "DINOv2": "Dinov2Model", "ViT": "ViTModel"}
    cls = getattr(transformers, classes.get(name, "BertModel"))
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if name != "BERT":
        shape |= {"image_size": 16, "patch_size": 8, "intermediate_size": 64}
    torch.manual_seed(0)
    model = cls(cls.config_class(**shape)).eval()
    inputs = {"pixel_values": torch.randn(2, 3, 16, 16)} if name != "BERT" else {"input_ids": torch.tensor([[1, 2, 3]])}
    config = FacTConfig(**CONFIG, task_type="FEATURE_EXTRACTION", modules_to_save=[])
    adapted = get_peft_model(model, config).eval()
    assert type(adapted).__name__ == "PeftModelForFeatureExtraction"
    expected = model(**inputs).last_hidden_state
    assert torch.equal(adapted(**inputs).last_hidden_state, expected)
    assert adapted(**inputs, output_hidden_states=True).hidden_states is not None
    with adapted.disable_adapter():
        assert not torch.allclose(adapted(**inputs).last_hidden_state, expected, atol=1e-3)


def test_transformers_takes_a_model_whose_first_adapter_was_refused_as_unadapted():
    vit = make_backbone("vit")
    for refused in ({"rank": 99}, {"modules_to_save": ["classifier"], "labels": ["one"]}):
        with pytest.raises(ValueError):
            vit.add_adapter(FacTConfig(**refused))
    vit.add_adapter(FacTConfig(rank=2))
    assert vit.active_adapters() == ["default"]


@pytest.mark.parametrize("route", ["attach", "PEFT"])
def test_transformers_saves_a_model_on_which_a_saved_adapter_was_refused(route, tmp_path):
    other = get_peft_model(ViTForImageClassification(replaced_labels(9)), FacTConfig(**CONFIG))
    refused = Adapter.of(other).replace(labels=None)
    refused.write(tmp_path / "refused")
    vit = make_backbone("vit")
    with pytest.raises(ValueError):
        refused.attach(vit) if route == "attach" else PeftModel.from_pretrained(vit, tmp_path / "refused")
    assert not hasattr(vit, "peft_config")
    vit.save_pretrained(tmp_path / "plain")


def replaced_labels(num_labels):
    config = make_backbone("vit").config
    config.num_labels = num_labels
    return config


@pytest.mark.parametrize("route", ["transformers", "config"])
def test_a_refused_swap_leaves_an_adapter_that_peft_did_not_load(route, tmp_path):
    get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG)).save_pretrained(tmp_path)
    wrong = Adapter.of(get_peft_model(ViTForImageClassification(replaced_labels(9)), FacTConfig(**CONFIG)))
    model = make_backbone("vit")
    if route == "transformers":
        model.load_adapter(tmp_path)
    else:
        config = FacTConfig.from_pretrained(str(tmp_path))
        config.inference_mode = False
        model = get_peft_model(model, config)
    before = state(model), [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError):
        hotswap_adapter(model, wrong.replace(labels=None))
    assert state(model) == before[0]
    model.train()(torch.randn(1, 3, 16, 16))  # from now on the adapter is in use
    damaged = {name: tensor * torch.nan for name, tensor in get_peft_model_state_dict(model).items()}
    with pytest.raises(ValueError):
        set_peft_model_state_dict(model, damaged)
    assert state(model) == before[0]
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before[1], strict=True))


def test_a_second_adapter_may_take_all_linear_layers_but_some():
    model = get_peft_model(make_backbone("vit"), FacTConfig(**CONFIG))
    settings = {"target_modules": "all-linear", "exclude_modules": ["classifier"], "modules_to_save": []}
    model.add_adapter("second", FacTConfig(**CONFIG, **settings))
    assert model.peft_config["second"].target_modules == {"q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"}
