"""``nn.MultiheadAttention``, whose weights are read and never called: against torch's own parametrization of them."""

import copy
from unittest import mock

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize

from fact_peft import FacTConfig, FacTLinear, save_as_lora

WIDTH = 16
LAYERS = {f"layers.{i}.{name}" for i in (0, 1) for name in ("self_attn.in_proj", "self_attn.out_proj")} | {
    f"layers.{i}.linear{j}" for i in (0, 1) for j in (1, 2)
}
EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64 in another order


def encoder(dtype=torch.float64):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(WIDTH, nhead=2, dim_feedforward=32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False).to(dtype).eval()


def tokens(dtype=torch.float64):
    return torch.randn(3, 5, WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)


def adapt(model, **settings):
    config = FacTConfig(**{"rank": 3, "init_weights": False, "scale": 0.8, **settings})
    return get_peft_model(model, config, autocast_adapter_dtype=False).eval()


class Increment(nn.Module):
    """W + dW of one weight (b d, a d) by the paper's equation, slice by slice; the factors are `parameters`."""

    def __init__(self, parameters, first):
        super().__init__()
        self.factors, self.first = parameters, first

    def forward(self, weight):
        U, V, Sigma = (self.factors[letter] for letter in ("U", "V", "Sigma"))
        rows = []
        for j in range(weight.shape[0] // WIDTH):
            slices = range(weight.shape[1] // WIDTH)
            cores = [Sigma[self.first + i * (weight.shape[0] // WIDTH) + j] for i in slices]
            rows.append(torch.cat([0.8 * (U @ core @ V.T).T for core in cores], dim=1))
        return weight + torch.cat(rows)


def parametrized(peft_model):
    """The plain encoder with the adapter's factors, copied, behind torch's parametrization of every weight."""
    model = encoder()
    factors = {
        letter: factor.detach().clone().requires_grad_()
        for letter, factor in peft_model.factors[f"{WIDTH}x{WIDTH}"].factors("default").items()
    }
    first = 0
    for layer in model.layers:
        for module, name, count in (
            (layer.self_attn, "in_proj_weight", 3),
            (layer.self_attn.out_proj, "weight", 1),
            (layer.linear1, "weight", 2),
            (layer.linear2, "weight", 2),
        ):
            parametrize.register_parametrization(module, name, Increment(factors, first))
            first += count
    return model, factors


def test_outputs_and_gradients_are_those_of_torch_parametrization():
    peft_model = adapt(encoder())
    theirs, factors = parametrized(peft_model)
    ours = peft_model.factors[f"{WIDTH}x{WIDTH}"].factors("default")
    x = tokens()
    plain, expected, got = encoder()(x), theirs(x), peft_model(x)
    torch.testing.assert_close(got, expected, **EXACT)
    assert (got - plain).abs().max() > 0.1
    expected.square().sum().backward()
    got.square().sum().backward()
    for letter, factor in ours.items():
        torch.testing.assert_close(factor.grad, factors[letter].grad, rtol=1e-10, atol=1e-10)  # a sum over 32 slices
    assert {name for name, module in peft_model.get_base_model().named_modules() if isinstance(module, FacTLinear)} == (
        LAYERS
    )


def test_the_fused_inference_of_torch_sees_the_adapter():
    """In inference ``nn.TransformerEncoderLayer`` hands its weights to one kernel instead of calling its layers."""
    peft_model = adapt(encoder())
    called = peft_model(tokens())
    kernel = torch._transformer_encoder_layer_fwd
    with torch.no_grad(), mock.patch("torch._transformer_encoder_layer_fwd", side_effect=kernel) as fused:
        torch.testing.assert_close(peft_model(tokens()), called, **EXACT)
        with peft_model.disable_adapter():
            torch.testing.assert_close(peft_model(tokens()), encoder()(tokens()), **EXACT)
    assert fused.call_count == 2 * 2 + 2  # two layers, each time


def test_merging_and_unmerging_and_unloading_leave_a_plain_encoder():
    peft_model = adapt(encoder())
    expected = peft_model(tokens())
    peft_model.merge_adapter()
    torch.testing.assert_close(peft_model(tokens()), expected, **EXACT)
    peft_model.unmerge_adapter()
    torch.testing.assert_close(peft_model(tokens()), expected, **EXACT)
    unloaded = copy.deepcopy(peft_model).unload()
    merged = peft_model.merge_and_unload()
    torch.testing.assert_close(merged(tokens()), expected, **EXACT)
    for model in (merged, unloaded):
        assert [type(module) for module in model.modules()] == [type(module) for module in encoder().modules()]
        assert model.state_dict().keys() == encoder().state_dict().keys()
    encoder().load_state_dict(merged.state_dict())
    for name, value in unloaded.state_dict().items():
        torch.testing.assert_close(value, encoder().state_dict()[name], **EXACT)


@torch.no_grad()  # in which torch takes the same path for trained and frozen weights
def test_a_saved_adapter_comes_back(tmp_path):
    peft_model = adapt(encoder(), bias="fact_only")
    for name, parameter in peft_model.named_parameters():
        if name.endswith("bias") and parameter.requires_grad:
            parameter.add_(0.3)
    peft_model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(encoder(), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(again(tokens()), peft_model(tokens()))


@torch.no_grad()
def test_a_second_adapter_comes_onto_an_attention_that_is_open(tmp_path):
    peft_model = adapt(encoder())
    peft_model.save_pretrained(tmp_path)
    several = adapt(encoder(), rank=2)
    several.load_adapter(tmp_path, "second", autocast_adapter_dtype=False)
    several.set_adapter("second")
    assert torch.equal(several(tokens()), peft_model(tokens()))


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["out_proj"]},
        {"target_modules": ["in_proj"]},
        {"target_modules": ["in_proj"], "bias": "all"},
    ],
    ids=str,
)
def test_as_lora_it_gives_the_same_outputs(settings, tmp_path):
    peft_model = adapt(encoder(), **settings)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if name.endswith("bias") and parameter.requires_grad:
                parameter.add_(0.3)
    save_as_lora(peft_model, tmp_path)
    lora = PeftModel.from_pretrained(encoder(), tmp_path, autocast_adapter_dtype=False)
    lora.train()  # without dropout; in evaluation torch's fused inference leaves out PEFT's LoRA
    assert type(lora.active_peft_config).__name__ == "LoraConfig"
    torch.testing.assert_close(lora(tokens()), peft_model(tokens()), **EXACT)


def test_the_output_projection_is_not_exported_to_a_lora_that_counts_it_twice(tmp_path):
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.out_proj cannot be exported"):
        save_as_lora(adapt(encoder()), tmp_path)
    assert not list(tmp_path.iterdir())


def test_peft_still_adds_the_output_projection_twice():
    """If this fails, the refusal above can go."""
    attention = nn.ModuleDict({"a": nn.MultiheadAttention(WIDTH, 2, bias=False)}).double()
    plain = copy.deepcopy(attention["a"])
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["a"], init_lora_weights=False)
    lora = get_peft_model(attention, config, autocast_adapter_dtype=False).get_base_model()["a"]
    with torch.no_grad():
        plain.in_proj_weight += lora.get_delta_weight("default")
        plain.out_proj.weight += 2 * lora.base_layer.out_proj.get_delta_weight("default")
    torch.testing.assert_close(lora(*[tokens()] * 3)[0], plain(*[tokens()] * 3)[0], **EXACT)


def test_autocast_and_compilation_give_the_same():
    peft_model = adapt(encoder(torch.float32))
    x = tokens(torch.float32)
    expected = peft_model(x)
    torch._dynamo.reset()
    compiled = torch.compile(peft_model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        error = (peft_model(x) - expected).abs().max()
        merged = copy.deepcopy(peft_model).merge_and_unload()
        rounding = (merged(x) - expected).abs().max()
    assert 0 < error < 2 * rounding + 0.01  # bfloat16 rounds to 0.4 %; W + dW are rounded together as merged ones are


def test_ddp_gives_the_same_gradients(tmp_path):
    peft_model = adapt(encoder())
    peft_model(tokens()).square().sum().backward()
    expected = {name: p.grad.clone() for name, p in peft_model.named_parameters() if p.grad is not None}
    peft_model.zero_grad()
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        DistributedDataParallel(peft_model)(tokens()).square().sum().backward()
    finally:
        torch.distributed.destroy_process_group()
    got = {name: p.grad for name, p in peft_model.named_parameters() if p.grad is not None}
    assert got.keys() == expected.keys() and got
    for name, gradient in got.items():
        torch.testing.assert_close(gradient, expected[name], **EXACT)


def test_all_linear_means_the_attention_too():
    peft_model = adapt(encoder(), target_modules="all-linear")
    assert {name for name, module in peft_model.get_base_model().named_modules() if isinstance(module, FacTLinear)} == (
        LAYERS
    )


def test_one_adapter_per_image_is_refused():
    peft_model = adapt(encoder())
    with pytest.raises(NotImplementedError, match="one adapter at a time"), torch.no_grad():
        peft_model(tokens(), adapter_names=["default", "__base__", "default"])


def test_a_refused_adapter_leaves_the_attention_closed():
    model = encoder()
    before = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="rank=99"):
        adapt(model, rank=99)
    with pytest.raises(ValueError, match=r"matches layers\.0\.self_attn, a MultiheadAttention"):
        adapt(model, target_modules=["self_attn"])
    assert [type(module) for module in model.modules()] == before
    assert model.state_dict().keys() == encoder().state_dict().keys()


def test_attention_over_keys_of_another_width_is_left_alone():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(WIDTH)
            self.cross = nn.MultiheadAttention(WIDTH, 2, kdim=8, vdim=8)
            self.fc1, self.fc2 = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    peft_model = adapt(nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()])}))
    adapted = {name for name, module in peft_model.get_base_model().named_modules() if isinstance(module, FacTLinear)}
    assert adapted == {f"layers.{i}.fc{j}" for i in (0, 1) for j in (1, 2)}
