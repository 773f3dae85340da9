"""More of what users of LoRA have: conversion, sums, hot-swapping, compilation, injection."""

import copy
import gc
import weakref

import pytest
import torch
from backbones import BACKBONES, images, logits, make_backbone
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.helpers import disable_input_dtype_casting
from peft.utils.other import ModulesToSaveWrapper
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForImageClassification, LlamaConfig, LlamaForCausalLM
from upstream import VERBS, skip_where_lora_is_refused

from fact_peft import (
    Adapter,
    FacTConfig,
    FacTLinear,
    convert_to_lora,
    hotswap_adapter,
    save_as_lora,
    weighted_sum,
)
from fact_peft.method.decomposition import DECOMPOSITIONS

EVERYWHERE = [(decomposition, backbone) for decomposition in DECOMPOSITIONS for backbone in BACKBONES]
everywhere = pytest.mark.parametrize("decomposition, backbone", EVERYWHERE)


def config(decomposition="tt", **settings):
    return FacTConfig(**{"rank": 4, "decomposition": decomposition, "init_weights": False, "scale": 3.0, **settings})


def adapted(decomposition="tt", backbone="vit", seed=0, **settings):
    model = make_backbone(backbone)
    torch.manual_seed(seed)
    model = get_peft_model(model, config(decomposition, **settings)).eval()
    disturb_heads(model)
    return model


def disturb_heads(model):
    """As training would, so that a lost head is noticed."""
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


@torch.no_grad()
def scores(model):
    return logits(model.eval(), images())


def gradients(model):
    model.zero_grad()
    logits(model.train(), images(next(model.parameters()).dtype)).square().sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# LoRA


@everywhere
def test_conversion_to_lora_is_exact(decomposition, backbone, tmp_path):
    model = adapted(decomposition, backbone)
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(make_backbone(backbone), tmp_path)
    assert isinstance(lora.peft_config["default"], LoraConfig) and lora.peft_config["default"].r == 4
    torch.testing.assert_close(scores(lora), scores(model), rtol=0, atol=1e-5)
    assert (scores(lora) - scores(make_backbone(backbone))).abs().max() > 0.1


def test_conversion_to_lora_of_rectangular_stacks():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 12), nn.Linear(12, 30), nn.Linear(30, 12))
    model = get_peft_model(copy.deepcopy(base), config(target_modules=["0", "1", "2"], rank=2, modules_to_save=[]))
    lora_config, state = convert_to_lora(model)
    lora = get_peft_model(base, lora_config)
    assert not set_peft_model_state_dict(lora, state).unexpected_keys
    x = torch.randn(5, 12)
    torch.testing.assert_close(lora(x), model(x))


def test_conversion_carries_biases(tmp_path):
    model = adapted(bias="fact_only")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and name.endswith("base_layer.bias"):
            parameter.data += 1
    save_as_lora(model, tmp_path)
    torch.testing.assert_close(
        scores(PeftModel.from_pretrained(make_backbone("vit"), tmp_path)), scores(model), rtol=0, atol=1e-5
    )


def test_conversion_refuses_what_is_not_fact():
    with pytest.raises(ValueError, match="adapter_name='default' is not a FacT adapter"):
        convert_to_lora(get_peft_model(make_backbone("vit"), LoraConfig(target_modules=["q_proj"])))


# Sums of adapters


@pytest.mark.parametrize("backbone", BACKBONES)
def test_weighted_sum_is_exact(backbone):
    model = adapted("tt", backbone, target_modules="all-linear")
    model.add_adapter("other", config("tk", rank=2, scale=0.5, layers_to_transform=[0]))
    disturb_heads(model)
    weights = {"default": 0.7, "other": -1.3}
    model.add_weighted_adapter(list(weights), list(weights.values()), "sum")
    assert model.peft_config["sum"].rank == 6
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "fact_slices"):
            expected = sum(
                w * layer.get_delta_weight(adapter) for adapter, w in weights.items() if adapter in layer.fact_slices
            )
            torch.testing.assert_close(layer.get_delta_weight("sum"), expected, msg=name)
    head = next(module for module in model.modules() if isinstance(module, ModulesToSaveWrapper))
    changed = {adapter: head.modules_to_save[adapter].weight - head.original_module.weight for adapter in weights}
    expected = head.original_module.weight + sum(w * changed[adapter] for adapter, w in weights.items())
    torch.testing.assert_close(head.modules_to_save["sum"].weight, expected)


def test_weighted_sum_of_one_adapter_is_that_adapter(tmp_path):
    model = adapted("tk")
    expected = scores(model)
    model.add_weighted_adapter(["default"], [1.0], "twin")
    assert model.active_adapters == ["default"]
    model.set_adapter("twin")
    torch.testing.assert_close(scores(model), expected, rtol=0, atol=1e-5)
    model.save_pretrained(tmp_path, selected_adapters=["twin"])
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path / "twin")
    torch.testing.assert_close(scores(loaded), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ((["default"], [1.0, 2.0], "sum"), "must be one number for each of 1 adapters"),
        ((["default", "default"], [1.0, 2.0], "sum"), "names one adapter twice"),
        (([], [], "sum"), "must be one number for each of 0 adapters"),
        ((["default"], [float("nan")], "sum"), "must be finite"),
        ((["default"], [1.0], "default"), "exists already"),
        ((["nobody"], [1.0], "sum"), "'nobody' does not exist"),
        ((["default", "wide"], [1.0, 1.0], "sum"), "rank=34, which is larger than 32"),
    ],
)
def test_weighted_sum_refuses(arguments, message):
    model = adapted()
    model.add_adapter("wide", config(rank=30))
    names = set(model.state_dict())
    with pytest.raises(ValueError, match=message):
        model.add_weighted_adapter(*arguments)
    assert set(model.peft_config) == {"default", "wide"} and set(model.state_dict()) == names


# Scale


def test_scale_changes_after_training_and_is_saved(tmp_path):
    model = adapted()
    model.set_scale("default", 6.0)
    assert torch.equal(scores(model), scores(adapted(scale=6.0)))
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_backbone("vit"), tmp_path)
    assert loaded.peft_config["default"].scale == 6.0
    assert torch.equal(scores(loaded), scores(model))
    for scale, message in ((0.0, "scale=0"), (float("inf"), "scale=inf")):
        with pytest.raises(ValueError, match=message):
            model.set_scale("default", scale)
    with pytest.raises(ValueError, match="'nobody' does not exist"):
        model.set_scale("nobody", 1.0)


def test_adapters_of_one_config_keep_their_own_scale(tmp_path):
    shared = config()
    model = get_peft_model(make_backbone("vit"), shared)
    model.add_adapter("other", shared)
    model.set_scale("other", 9.0)
    model.save_pretrained(tmp_path)
    assert FacTConfig.from_pretrained(tmp_path).scale == 3.0
    assert FacTConfig.from_pretrained(tmp_path / "other").scale == 9.0


# Hot-swapping and compilation


@everywhere
def test_hotswap_gives_the_other_adapter(decomposition, backbone, tmp_path):
    other = adapted(decomposition, backbone, seed=1, scale=0.5)
    other.save_pretrained(tmp_path)
    model = adapted(decomposition, backbone)
    hotswap_adapter(model, tmp_path)
    torch.testing.assert_close(scores(model), scores(other), rtol=0, atol=1e-6)
    model.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(make_backbone(backbone), tmp_path / "again")
    assert torch.equal(scores(again), scores(model))


def test_hotswap_on_a_model_with_injected_layers_takes_the_head_too(tmp_path):
    swapped = adapted(seed=1)
    with torch.no_grad():
        for name, parameter in swapped.named_parameters():
            if ".modules_to_save." in name:
                parameter.add_(1)
    swapped.save_pretrained(tmp_path)
    injected = make_backbone("vit")
    injected.add_adapter(FacTConfig(rank=4, init_weights=False, scale=3.0), "default")
    hotswap_adapter(injected, tmp_path)
    assert torch.equal(scores(injected), scores(swapped))


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 2}, "rank=2"),
        ({"decomposition": "tk"}, "decomposition='tk'"),
        ({"target_modules": ["fc1"]}, "layout="),
    ],
)
def test_hotswap_refuses_another_shape(settings, message, tmp_path):
    adapted(**settings).save_pretrained(tmp_path)
    model = adapted()
    expected = scores(model)
    with pytest.raises(ValueError, match=message):
        hotswap_adapter(model, tmp_path)
    assert torch.equal(scores(model), expected)


# The compiler sees the decompositions alike but for the product that makes a core, and takes seconds for each.
@pytest.mark.parametrize(
    "decomposition", [name if name == "tt" else pytest.param(name, marks=pytest.mark.slow) for name in DECOMPOSITIONS]
)
def test_no_graph_break_and_no_recompilation_when_swapping(decomposition, tmp_path):
    other = adapted(decomposition, seed=1, scale=0.5)
    other.save_pretrained(tmp_path)
    model = adapted(decomposition)
    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=count, fullgraph=True)
    assert Adapter.of(compiled).state_dict().keys() == Adapter.of(model).state_dict().keys()
    assert convert_to_lora(compiled)[1].keys() == convert_to_lora(model)[1].keys()
    torch.testing.assert_close(scores(compiled), scores(model))
    hotswap_adapter(compiled, tmp_path)
    torch.testing.assert_close(scores(compiled), scores(other), rtol=0, atol=1e-6)
    assert len(compilations) == 1
    loss = logits(compiled.train(), images()).square().sum()
    loss.backward()
    assert model.get_base_model().factors["32x32"].fact_U["default"].grad.abs().max() > 0


# Gradient checkpointing


# Swin nests its checkpoints: the inner one runs first inside the outer one's forward, which records no gradients.
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True:UserWarning")
@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("decomposition, backbone", [(d, b) for d, b in EVERYWHERE if b != "timm"])
def test_gradient_checkpointing_gives_the_same_gradients(decomposition, backbone, use_reentrant):
    # In float64: the passes with and without gradients multiply in another order.
    model = adapted(decomposition, backbone).double()
    expected = gradients(model)
    # Newer versions of transformers have another name for it.
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": use_reentrant})
    # A reentrant checkpoint passes gradients on only if its input needs one, and images do not.
    model.get_base_model().get_submodule(
        {"vit": "vit.embeddings", "deit": "deit.embeddings", "swin": "swin.embeddings.patch_embeddings"}[backbone]
    ).register_forward_hook(lambda module, inputs, output: require_grad(output))
    torch.testing.assert_close(gradients(model), expected)


def require_grad(output):
    (output if isinstance(output, torch.Tensor) else output[0]).requires_grad_(True)


# Injection


@everywhere
def test_injection_without_a_peft_model(decomposition, backbone):
    reference = adapted(decomposition, backbone)
    model = make_backbone(backbone)
    injected = inject_adapter_in_model(config(decomposition), model)
    assert injected is model and type(model) is type(make_backbone(backbone))
    state = {name.removeprefix("base_model.model."): v for name, v in get_peft_model_state_dict(reference).items()}
    set_peft_model_state_dict(model, state)
    assert torch.equal(scores(model), scores(reference))
    assert {name for name, p in model.named_parameters() if p.requires_grad} == {
        name.removeprefix("base_model.model.") for name, p in reference.named_parameters() if p.requires_grad
    }
    assert get_peft_model_state_dict(model).keys() == state.keys()


@pytest.mark.compatibility
@pytest.mark.parametrize("modules_to_save", [None, []])
@pytest.mark.parametrize("decomposition, backbone", [(d, b) for d, b in EVERYWHERE if b != "timm"])
def test_transformers_own_adapter_methods(decomposition, backbone, modules_to_save, tmp_path):
    skip_where_lora_is_refused(*(verb for verb in VERBS if modules_to_save is None or "head" not in verb))
    torch.manual_seed(1)
    model = make_backbone(backbone)
    model.save_pretrained(tmp_path / "backbone")
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
    plain = scores(model)
    model.add_adapter(config(decomposition, modules_to_save=modules_to_save))
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        logits(model, images()).square().sum().backward()
        optimizer.step()
    expected = scores(model)
    model.disable_adapters()
    assert torch.equal(scores(model), plain)
    if modules_to_save == []:  # transformers' enable_adapters leaves every method's trained heads disabled
        model.enable_adapters()
        assert torch.equal(scores(model), expected)
    model.save_pretrained(tmp_path / "adapter")

    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "backbone")
    loaded.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(scores(loaded), expected)
    direct = AutoModelForImageClassification.from_pretrained(tmp_path / "adapter", num_labels=5)
    assert torch.equal(scores(direct), expected)
    through_peft = PeftModel.from_pretrained(
        AutoModelForImageClassification.from_pretrained(tmp_path / "backbone"), tmp_path / "adapter"
    )
    assert torch.equal(scores(through_peft), expected)

    loaded.delete_adapter("default")
    assert torch.equal(scores(loaded), plain)
    assert not any("default" in name for name in loaded.state_dict())


# FSDP


@pytest.fixture
def process_group(tmp_path):
    """A group of this process alone."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_fully_sharded_blocks_train_and_save_the_same_adapter(decomposition, process_group):
    """FSDP2, a unit per block and one for the rest, which holds the shared factors."""
    plain, sharded = adapted(decomposition), adapted(decomposition)
    for block in sharded.get_base_model().vit.layers:
        fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
    fully_shard(sharded, mesh=init_device_mesh("cpu", (1,)))
    for model in (plain, sharded):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            logits(model.train(), images()).square().sum().backward()
            optimizer.step()
    # Code that asks a sharded layer for its weight gets it as it is stored.
    layer = sharded.get_base_model().vit.layers[0].mlp.fc1
    assert layer.weight is layer.base_layer.weight
    whole = get_model_state_dict(sharded, options=StateDictOptions(full_state_dict=True))
    saved = get_peft_model_state_dict(sharded, state_dict=whole)
    torch.testing.assert_close(saved, dict(get_peft_model_state_dict(plain)), rtol=0, atol=1e-6)
    assert len(saved) == 4 + len(DECOMPOSITIONS[decomposition].core_factors)  # U, V and the head have two each


# Beyond vision


def test_rectangular_stacks_of_a_language_model():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 11}
    llama = LlamaForCausalLM(LlamaConfig(num_attention_heads=4, num_key_value_heads=2, **shape)).eval()
    tokens = torch.arange(10)[None]
    plain = llama(tokens).logits
    model = get_peft_model(llama, config(rank=3, task_type="CAUSAL_LM")).eval()
    stacks = model.get_base_model().factors
    # q and o; k and v, half as wide; gate and up; down
    assert set(stacks) == {"32x32", "16x16", "32x48", "48x32"}
    assert stacks["32x48"].fact_U["default"].shape == (32, 3) and stacks["32x48"].fact_V["default"].shape == (48, 3)
    adapted_logits = model(input_ids=tokens).logits
    assert (adapted_logits - plain).abs().max() > 1e-2
    torch.testing.assert_close(model.merge_and_unload()(tokens).logits, adapted_logits, rtol=0, atol=1e-5)


def test_no_memory_is_kept_after_unloading():
    model = adapted()
    factors = [weakref.ref(parameter) for name, parameter in model.named_parameters() if ".fact_" in name]
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert len(factors) == 3 and all(factor() is None for factor in factors)
    assert isinstance(merged, nn.Module)


def test_peft_can_switch_the_casting_of_inputs_off():
    model = adapted().eval()
    with torch.no_grad():
        expected = logits(model, images())
        with disable_input_dtype_casting(model):
            assert torch.equal(logits(model, images()), expected)


@pytest.mark.parametrize("clients", [2, 3])
def test_federated_averaging_is_the_mean_of_the_increments(clients):
    models = []
    for seed in range(clients):
        torch.manual_seed(seed)
        models.append(get_peft_model(make_backbone("vit"), config(rank=2 + seed)))
    mean = weighted_sum([Adapter.of(model) for model in models], [1 / clients] * clients)
    together = make_backbone("vit")
    mean.attach(together)
    layers = [[m for m in model.modules() if isinstance(m, FacTLinear)] for model in [*models, together]]
    for *ours, summed in zip(*layers, strict=True):
        expected = torch.stack([layer.get_delta_weight("default") for layer in ours]).mean(0)
        torch.testing.assert_close(summed.get_delta_weight("default"), expected, rtol=1e-4, atol=1e-6)
    heads = torch.stack([Adapter.of(model).others["classifier.weight"] for model in models])
    torch.testing.assert_close(mean.others["classifier.weight"], heads.mean(0))


def test_a_sum_of_heads_without_the_base_needs_weights_that_add_up_to_one():
    adapter = Adapter.of(adapted())
    with pytest.raises(ValueError, match="add up to 2; pass the base model's own tensor"):
        weighted_sum([adapter, adapter], [1.0, 1.0])
