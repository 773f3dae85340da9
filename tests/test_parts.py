"""Part of a fused layer: q and v of a qkv alone, against dW added by hand to their rows of the weight, in float64."""

import copy
import warnings

import pytest
import torch
from architectures import ARCHITECTURES
from backbones import alone, images, logits, make_backbone
from peft import PeftModel, get_peft_model
from peft.utils.error import NoMatchingPeftModuleError
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves

from fact_peft import Adapter, AdapterPool, FacTConfig, FacTLinear, hotswap_adapter, save_as_lora
from fact_peft.operations.inspection import describe, increment_map

EXACT = {"rtol": 1e-10, "atol": 1e-10}  # float64 in another order, through a few layers
SCALE = 0.8
FUSED = {
    "timm ViT": "qkv",
    "SAM": "qkv",
    "SAM 2": "qkv",
    "Hiera": "qkv",
    "torchvision ViT": "in_proj",
    "OpenCLIP visual tower": "in_proj",
}
every_architecture = pytest.mark.parametrize("name", FUSED)


def build(name):
    torch.manual_seed(0)
    return ARCHITECTURES[name].build().double()


def outputs(model, name):
    torch.manual_seed(1)
    inputs = ARCHITECTURES[name].inputs()
    inputs = {key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
    return [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, torch.Tensor)]


def fused_layers(model, name):
    """Weight and bias of every fused layer, by name."""
    if FUSED[name] == "in_proj":
        return {
            f"{path}.in_proj": (module.in_proj_weight, module.in_proj_bias)
            for path, module in model.named_modules()
            if isinstance(module, nn.MultiheadAttention)
        }
    return {path: (m.weight, m.bias) for path, m in model.named_modules() if path.endswith(".qkv")}


def adapt(model, **settings):
    torch.manual_seed(2)
    settings = {"rank": 3, "init_weights": False, "scale": SCALE, "modules_to_save": [], **settings}
    return get_peft_model(model, FacTConfig(**settings), autocast_adapter_dtype=False).eval()


def cores(factors):
    if "Sigma" in factors:
        return factors["Sigma"]
    if "W" in factors:
        return torch.stack([torch.diag(row) for row in factors["W"]])
    return torch.einsum("kt,tij->kij", factors["P"], factors["C"])


@torch.no_grad()
def add_by_hand(layers, stacks, parts):
    """W + dW in the rows of `parts`, third by third: each takes the next slices of its stack, a core each."""
    taken = dict.fromkeys(stacks, 0)
    for weight, _ in layers.values():
        d, third = min(weight.shape), weight.shape[0] // 3
        stack = f"{d}x{d}"
        factors = stacks[stack]
        for part in parts:
            start = "qkv".index(part) * third
            for row in range(start, start + third, d):
                core = cores(factors)[taken[stack]]
                weight[row : row + d] += SCALE * (factors["U"] @ core @ factors["V"].T).T
                taken[stack] += 1
    assert taken == {stack: len(cores(factors)) for stack, factors in stacks.items()}  # nobody else owns a core


def stacks_of(peft_model, adapter_name="default"):
    stacks = peft_model.get_base_model().factors
    return {
        name: {letter: factor.detach() for letter, factor in stack.factors(adapter_name).items()}
        for name, stack in stacks.items()
    }


@every_architecture
@torch.no_grad()
def test_the_outputs_of_every_fused_layer_are_q_k_and_v_in_this_order(name):
    """Without v an attention says nothing, whatever q and k are; what all keys have in common says nothing either."""

    def changed(*changes):
        model = build(name)
        for weight, bias in fused_layers(model, name).values():
            thirds = {part: (weight.chunk(3)[i], bias.chunk(3)[i]) for i, part in enumerate("qkv")}
            for change in changes:
                change(thirds)
        return outputs(model, name)

    def silence_v(thirds):
        for rows in thirds["v"]:
            rows.zero_()

    def disturb(part):
        return lambda thirds: thirds[part][0].mul_(-1.5)

    def shift(part):
        return lambda thirds: thirds[part][1].add_(0.7)

    def same(one, other):
        return all(torch.allclose(a, b, **EXACT) for a, b in zip(one, other, strict=True))

    assert same(changed(silence_v), changed(silence_v, disturb("q"), disturb("k")))
    assert not same(changed(), changed(disturb("q"))) and not same(changed(), changed(disturb("k")))
    assert same(changed(), changed(shift("k"))) and not same(changed(), changed(shift("q")))


@every_architecture
@pytest.mark.parametrize("decomposition", ["tt", "tk"])
def test_only_the_rows_of_q_and_v_change(name, decomposition, tmp_path):
    layer = FUSED[name]
    peft_model = adapt(build(name), target_modules=[f"{layer}.q", f"{layer}.v"], decomposition=decomposition)
    by_hand, plain = build(name), build(name)
    layers = fused_layers(by_hand, name)
    add_by_hand(layers, stacks_of(peft_model), "qv")
    expected = outputs(by_hand, name)
    for ours, theirs in zip(outputs(peft_model, name), expected, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    assert any(not torch.allclose(a, b) for a, b in zip(outputs(plain, name), expected, strict=True))

    whole = adapt(build(name), target_modules=[layer], decomposition=decomposition)
    for stack, factors in stacks_of(peft_model).items():
        assert 3 * len(cores(factors)) == 2 * len(cores(stacks_of(whole)[stack]))
    config = peft_model.peft_config["default"]
    assert all(part.endswith("[qv/qkv]") for line in config.layout for part in line.split(", "))

    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(name), tmp_path, autocast_adapter_dtype=False)
    with torch.no_grad():
        for ours, theirs in zip(outputs(again, name), outputs(peft_model, name), strict=True):
            assert torch.equal(ours, theirs)
    with pytest.raises(ValueError, match="belongs to other linear layers"):
        adapt(build(name), target_modules=[layer], layout=config.layout)

    again.merge_adapter()
    again.unmerge_adapter()
    merged = again.merge_and_unload()
    for path, (weight, _) in fused_layers(merged, name).items():
        before, (added, _) = fused_layers(plain, name)[path][0], layers[path]
        torch.testing.assert_close(weight, added, **EXACT)
        assert torch.equal(weight.chunk(3)[1], before.chunk(3)[1])
        assert not torch.allclose(weight.chunk(3)[2], before.chunk(3)[2])


@every_architecture
def test_all_but_the_keys(name):
    layer = FUSED[name]
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "error", message="You have passed exclude_modules"
        )  # PEFT would say that nothing was excluded
        peft_model = adapt(build(name), exclude_modules=[f"{layer}.k"])
    whole = adapt(build(name))
    adapted, all_of_it = (
        {path: m for path, m in model.get_base_model().named_modules() if isinstance(m, FacTLinear)}
        for model in (peft_model, whole)
    )
    assert list(adapted) == list(all_of_it)
    for path, module in adapted.items():
        ours, theirs = module.fact_slices["default"], all_of_it[path].fact_slices["default"]
        assert (ours.parts, 3 * ours.count) == (
            ("qv", 2 * theirs.count) if path.endswith(layer) else ("", 3 * theirs.count)
        )
        increment = module.get_delta_weight("default")
        assert not path.endswith(layer) or not increment.chunk(3)[1].any()


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["qkv.q", "qkv.v"]},
        {"target_modules": ["attn.qkv.v", "attn.qkv.q"]},
        {"target_modules": r".*qkv\.[qv]"},
        {"target_modules": ["qkv"], "exclude_modules": ["qkv.k"]},
        {"target_modules": r"blocks\..*\.qkv", "exclude_modules": r".*\.qkv\.k"},
        {"target_modules": ["qkv.q", "qkv"], "exclude_modules": ["attn.qkv.k"]},
        {"target_modules": "all-linear", "exclude_modules": ["qkv.k", "proj", "fc1", "fc2", "head"]},
        {"target_modules": [f"blocks.{i}.attn.qkv.{part}" for i in range(40) for part in "qv"]},  # PEFT shortens these
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:target_modules has .* which matches no linear layer")  # of the 40 blocks
def test_every_way_to_say_q_and_v(settings, tmp_path):
    peft_model = adapt(make_backbone("timm"), **settings)
    assert peft_model.peft_config["default"].layout == ["blocks.0-1: attn.qkv 32x96[qv/qkv]"]
    assert peft_model.get_nb_trainable_parameters()[0] == 2 * 32 * 3 + 4 * 9
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(make_backbone("timm"), tmp_path).eval()
    torch.testing.assert_close(logits(again, images()), logits(peft_model, images()), rtol=0, atol=0)


def test_all_three_parts_are_the_whole_layer():
    three, whole = (adapt(make_backbone("timm"), target_modules=t) for t in (["qkv.q", "qkv.v", "qkv.k"], ["qkv"]))
    assert three.peft_config["default"].layout == whole.peft_config["default"].layout
    assert torch.equal(logits(three, images()), logits(whole, images()))


def test_parts_of_some_blocks():
    peft_model = adapt(make_backbone("timm"), target_modules=["qkv.v", "fc2"], layers_to_transform=[1])
    assert peft_model.peft_config["default"].layout == ["blocks.1: attn.qkv 32x96[v/qkv], mlp.fc2 128x32"]


def timm_models():
    return pytest.importorskip("timm").models


class Heads(nn.Module):
    """Attention whose keys and values have fewer heads than its queries."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(32, 32 + 2 * 8), nn.Linear(32, 32)


@pytest.mark.parametrize(
    ("attention", "reason"),
    [
        (
            lambda: timm_models().tiny_vit.Attention(32, key_dim=16, num_heads=2, attn_ratio=1, resolution=(2, 2)),
            "key_dim",
        ),
        (lambda: timm_models().maxxvit.AttentionCl(32, dim_head=16), "head_first"),
        (
            lambda: timm_models().gcvit.WindowAttentionGlobal(24, 2, (2, 2), use_global=True),
            "a third of its 48 outputs",
        ),
        (Heads, "a third of its 48 outputs"),
    ],
    ids=["TinyViT", "MaxViT", "GCViT", "fewer heads"],
)
def test_layers_of_another_order_are_refused_by_name(attention, reason):
    model = nn.ModuleDict({"blocks": nn.ModuleList([attention(), attention()])})
    before = [type(module) for module in model.modules()]
    with pytest.raises(
        ValueError, match=rf"blocks\.0\.qkv of .* does not put out q, then k, then v .*{reason}.*blocks\.0\.qkv\.q"
    ):
        adapt(model, target_modules=["qkv.q", "qkv.v"])
    assert [type(module) for module in model.modules()] == before
    assert adapt(model, target_modules=["qkv"]).peft_config["default"].layout  # all of it is no question of order


def test_what_has_no_parts_is_refused_by_name():
    for settings in ({"target_modules": ["qkv", "mlp.fc1.q"]}, {"exclude_modules": ["fc1.q"]}):
        with pytest.raises(ValueError, match=r"fc1\.q', but blocks\.0\.mlp\.fc1 does not make queries"):
            adapt(make_backbone("timm"), **settings)
    with pytest.raises(NoMatchingPeftModuleError, match="matches no linear layer"):
        adapt(make_backbone("vit"), target_modules=["qkv.q"])
    rectangular = nn.ModuleDict({"qkv": nn.Linear(24, 60), "proj": nn.Linear(20, 24)})
    with pytest.raises(ValueError, match=r"qkv has 24 inputs and 60 outputs, whose slices of 24x60 do not fall into q"):
        adapt(rectangular, target_modules=["qkv.q"])


PARTS = {
    "default": {"target_modules": ["qkv.q", "qkv.v"]},
    "tucker": {"target_modules": ["qkv.k", "fc1"], "rank": 2, "decomposition": "tk"},
    "whole": {"target_modules": ["qkv", "attn.proj"], "rank": 4, "scale": -0.5},
}


def with_adapters():
    model = adapt(make_backbone("timm", torch.float64), **PARTS["default"])
    for name, settings in list(PARTS.items())[1:]:
        model.add_adapter(name, FacTConfig(**{"init_weights": False, "rank": 3, "modules_to_save": [], **settings}))
    return model.double().eval()


@torch.no_grad()
def test_a_mixed_batch_of_parts():
    model = with_adapters()
    expected = {name: alone(model, name) for name in [*PARTS, "__base__"]}
    for names in (
        ["default", "tucker", "whole"],
        ["tucker", "__base__", "default"],
        ["default"] * 3,
        ["default", "__base__"] * 2,
    ):
        pixels = images(torch.float64, count=len(names))
        mixed = model(pixels, adapter_names=names)
        for image, name in enumerate(names[:3]):
            torch.testing.assert_close(mixed[image], expected[name][image], **EXACT)


@torch.no_grad()
def test_a_pool_of_parts(tmp_path):
    model = with_adapters()
    model.save_pretrained(tmp_path)
    pool = AdapterPool(make_backbone("timm"))
    for name in PARTS:
        folder = tmp_path if name == "default" else tmp_path / name
        pool.load(name, folder)
        norms = Adapter.read(folder).increment_norms()
        assert pool.increment_norms(name) == pytest.approx(norms)
        live = {
            path: layer.get_delta_weight(name).norm().item()
            for path, layer in model.get_base_model().named_modules()
            if isinstance(layer, FacTLinear) and name in layer.fact_slices
        }
        assert norms == pytest.approx(live)
    for names in (["default", "tucker", "whole"], ["tucker", None, "default"], ["default"] * 3):
        for image, prediction in enumerate(pool(images(), names)):
            expected = alone(model, names[image] or "__base__")[image]
            torch.testing.assert_close(prediction.logits.double(), expected, rtol=0, atol=1e-5)  # float32


def test_inspection_says_which_part(tmp_path):
    peft_model = adapt(make_backbone("timm"), exclude_modules=["qkv.k"])
    peft_model.save_pretrained(tmp_path)
    adapter = Adapter.read(tmp_path)
    said = describe(adapter)
    assert "attn.qkv 32x96[qv/qkv]" in said and "stack       22 slices of 32x32" in said
    assert f"{2 * 32 * 3 + 22 * 9:,} in the factors" in said
    _, matrices, grid = increment_map(adapter.increment_norms())
    assert matrices == ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"] and (grid > 0).all()


def test_the_sum_of_adapters_has_the_parts_of_any():
    model = with_adapters()
    names = list(PARTS)
    weights = [1.0, -2.0, 0.5]
    model.base_model.add_weighted_adapter(names[:2], weights[:2], "two")
    model.base_model.add_weighted_adapter(names, weights, "three")
    model.double()
    for path, layer in model.named_modules():
        if isinstance(layer, FacTLinear):
            for total, count in (("two", 2), ("three", 3)):
                expected = sum(
                    weight * layer.get_delta_weight(name)
                    for name, weight in list(zip(names, weights, strict=True))[:count]
                    if name in layer.fact_slices
                )
                if total in layer.fact_slices:
                    torch.testing.assert_close(layer.get_delta_weight(total), expected, **EXACT, msg=path)
                else:
                    assert isinstance(expected, int)
    assert model.base_model.add_weighted_adapter(["default"], [1.0], "again") is None
    assert model.peft_config["again"].layout == model.peft_config["default"].layout


def test_hot_swap_wants_the_same_parts(tmp_path):
    adapters = {}
    for name, part in (("qv", ["qkv.q", "qkv.v"]), ("qk", ["qkv.q", "qkv.k"])):
        adapters[name] = adapt(make_backbone("timm"), target_modules=part, scale=1.5)
        adapters[name].save_pretrained(tmp_path / name)
    model = adapt(make_backbone("timm"), target_modules=["qkv.q", "qkv.v"])
    hotswap_adapter(model, tmp_path / "qv")
    torch.testing.assert_close(logits(model, images()), logits(adapters["qv"], images()))
    with pytest.raises(ValueError, match=r"has layout=.*\[qk/qkv\]"):
        hotswap_adapter(model, tmp_path / "qk")


@pytest.mark.parametrize("name", ["timm ViT", "SAM 2", "torchvision ViT"])
def test_as_lora_it_gives_the_same_outputs(name, tmp_path):
    layer = FUSED[name]
    peft_model = adapt(build(name), target_modules=[f"{layer}.q", f"{layer}.v"])
    save_as_lora(peft_model, tmp_path)
    lora = PeftModel.from_pretrained(build(name), tmp_path, autocast_adapter_dtype=False)
    lora.train()  # without dropout; in evaluation torch's fused inference leaves out PEFT's LoRA
    for module in lora.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for ours, theirs in zip(outputs(peft_model, name), outputs(lora, name), strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)
    for key, tensor in load_file(tmp_path / "adapter_model.safetensors").items():
        if "lora_B" in key and "out_proj" not in key:
            assert not tensor.chunk(3)[1].any() and all(tensor.chunk(3)[i].any() for i in (0, 2))
            assert tensor.shape[1] == 3


@pytest.mark.parametrize("decomposition", ["tt", "tk", "cp"])
def test_the_fused_layer_and_the_plain_path_have_the_same_gradients(decomposition):
    def gradients(hooked):
        model = adapt(make_backbone("timm", torch.float64), exclude_modules=["qkv.k"], decomposition=decomposition)
        if hooked:  # which keeps layers off the fused path
            for module in model.modules():
                if isinstance(module, FacTLinear):
                    module.base_layer.register_forward_hook(lambda *_: None)
        logits(model, images(torch.float64)).square().sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}

    fused, plain = gradients(hooked=False), gradients(hooked=True)
    for name, gradient in fused.items():
        torch.testing.assert_close(gradient, plain[name], **EXACT)
        assert gradient.any()


def test_it_compiles_in_one_graph():
    model = adapt(make_backbone("timm"), target_modules=["qkv.q", "qkv.v"])
    expected = logits(model, images())
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(logits(compiled, images()), expected)
