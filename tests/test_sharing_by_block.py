"""``share="block"``: one U, V and core tensor in every block, against dW added by hand in float64."""

import pytest
import torch
from architectures import ARCHITECTURES
from backbones import alone, images, logits, make_backbone
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from torch.utils._pytree import tree_leaves

from benchmarks.exactness.equations import reference_increment
from fact_peft import Adapter, AdapterPool, FacTConfig, FacTLinear, hotswap_adapter, save_as_lora
from fact_peft.operations.inspection import describe

EXACT = {"rtol": 1e-10, "atol": 1e-10}


def adapt(backbone, dtype=torch.float64, **settings):
    torch.manual_seed(2)
    settings = {"rank": 3, "init_weights": False, "scale": 0.8, "share": "block", **settings}
    model = get_peft_model(make_backbone(backbone, dtype), FacTConfig(**settings), autocast_adapter_dtype=False)
    return model.eval()


def factors_of(model, adapter_name="default"):
    return {name: stack.factors(adapter_name) for name, stack in model.get_base_model().factors.items()}


@pytest.mark.parametrize("decomposition", ["tt", "tk", "cp"])
@pytest.mark.parametrize("backbone", ["vit", "swin", "timm"])
@torch.no_grad()
def test_every_block_computes_with_factors_of_its_own(backbone, decomposition, tmp_path):
    model = adapt(backbone, decomposition=decomposition)
    by_hand = make_backbone(backbone, torch.float64)
    taken = {}
    for name, layer in model.get_base_model().named_modules():
        if not isinstance(layer, FacTLinear):
            continue
        block = name.rsplit(".", 2)[0]
        owned = layer.fact_slices["default"]
        stack = f"{owned.in_width}x{owned.out_width}@{block.replace('.', '-')}"
        assert owned.stack == stack and owned.first == taken.get(stack, 0)
        taken[stack] = owned.first + owned.count
        increment = reference_increment(factors_of(model)[stack], owned, 0.8)
        by_hand.get_submodule(name).weight += increment.T
    expected = logits(by_hand, images(torch.float64))
    torch.testing.assert_close(logits(model, images(torch.float64)), expected, **EXACT)

    rank, count = 3, 0
    for stack, num_slices in taken.items():
        d, e = map(int, stack.partition("@")[0].split("x"))
        core = {"tt": num_slices * rank**2, "tk": num_slices * rank + rank**3, "cp": num_slices * rank}[decomposition]
        count += (d + e) * rank + core
    assert sum(f.numel() for factors in factors_of(model).values() for f in factors.values()) == count
    head = sum(p.numel() for name, p in model.named_parameters() if ".modules_to_save." in name)
    assert model.get_nb_trainable_parameters()[0] == count + head

    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {name.split(".")[3] for name in saved if ".factors." in name} == set(taken)
    again = PeftModel.from_pretrained(make_backbone(backbone, torch.float64), tmp_path, autocast_adapter_dtype=False)
    assert torch.equal(logits(again, images(torch.float64)), logits(model, images(torch.float64)))
    again.merge_adapter()
    again.unmerge_adapter()
    torch.testing.assert_close(logits(again.merge_and_unload(), images(torch.float64)), expected, **EXACT)


def test_the_counts_of_a_vit_b():
    """2 d r + 12 r^2 in each of 12 blocks, where sharing takes 2 d r + 144 r^2."""
    with torch.device("meta"):
        model = ARCHITECTURES["timm ViT"].build_full()
        counts = {
            share: get_peft_model(
                model, FacTConfig(rank=8, share=share, modules_to_save=[]), low_cpu_mem_usage=True
            ).get_nb_trainable_parameters()[0]
            for share in ("block", "model")
            if (model := ARCHITECTURES["timm ViT"].build_full())
        }
    assert counts == {"block": 12 * (2 * 768 * 8 + 12 * 64), "model": 2 * 768 * 8 + 144 * 64}


# Adapted whole; nothing in them lies in a block that its name does not tell.
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_has_a_stack_a_block(architecture):
    torch.manual_seed(0)
    model = ARCHITECTURES[architecture].build()
    inputs = ARCHITECTURES[architecture].inputs()
    with torch.no_grad():
        before = [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, torch.Tensor)]
    model = get_peft_model(model, FacTConfig(rank=2, share="block")).eval()
    with torch.no_grad():
        after = [leaf for leaf in tree_leaves(model(**inputs)) if isinstance(leaf, torch.Tensor)]
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one, other, equal_nan=True)
    layers = [layer for layer in model.modules() if isinstance(layer, FacTLinear)]
    assert len(layers) == ARCHITECTURES[architecture].count
    stacks = {owned.stack.partition("@")[2] for layer in layers for owned in layer.fact_slices.values()}
    assert 1 < len(stacks) < len(layers)


def test_a_block_that_names_do_not_tell_is_refused_by_name():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.LayerNorm(8)
            self.experts = nn.ModuleDict({"0": nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)})})

    model = nn.ModuleDict({"layers": nn.ModuleList([Block(), Block()]), "head": nn.Linear(8, 8)})
    said = r"share='block' cannot be had on ModuleDict: layers\.0\.experts\.0\.up lies in the block layers\.0, but by"
    with pytest.raises(ValueError, match=said):
        get_peft_model(model, FacTConfig(rank=2, share="block"))
    with pytest.raises(ValueError, match=r"share=.block. needs layers that lie in blocks.*head lies in none"):
        get_peft_model(model, FacTConfig(rank=2, share="block", target_modules=["head"]))
    with pytest.raises(ValueError, match="share='layer' is unknown; choose one of 'model', 'block'"):
        FacTConfig(share="layer")


ADAPTERS = {
    "default": {"rank": 3, "share": "block"},
    "shared": {"rank": 2, "share": "model", "decomposition": "tk"},
    "part": {"rank": 4, "share": "block", "decomposition": "tk", "target_modules": ["qkv.v", "fc2"]},
}


def with_adapters():
    model = adapt("timm", **ADAPTERS["default"])
    for name, settings in list(ADAPTERS.items())[1:]:
        model.add_adapter(name, FacTConfig(**{"init_weights": False, "scale": 1.3, **settings}))
    for name, parameter in model.named_parameters():
        if ".modules_to_save." in name:
            parameter.data.normal_(std=0.3)
    return model.double().eval()


@torch.no_grad()
def test_mixed_batches_and_pools_of_both_kinds(tmp_path):
    model = with_adapters()
    model.save_pretrained(tmp_path)
    expected = {name: alone(model, name) for name in [*ADAPTERS, "__base__"]}
    pool = AdapterPool(make_backbone("timm"))
    for name in ADAPTERS:
        pool.load(name, tmp_path if name == "default" else tmp_path / name)
    for names in (["default", "shared", "part"], ["part", "__base__", "default"], ["default"] * 3, ["shared"] * 3):
        mixed = model(images(torch.float64), adapter_names=names)
        predictions = pool(images(), names)
        for image, name in enumerate(names):
            torch.testing.assert_close(mixed[image], expected[name][image], **EXACT)
            torch.testing.assert_close(predictions[image].logits.double(), expected[name][image], rtol=0, atol=2e-5)


def test_the_sum_with_a_shared_adapter_is_one_by_block():
    model = with_adapters()
    model.base_model.add_weighted_adapter(list(ADAPTERS), [1.0, -2.0, 0.5], "total")
    model.double()
    assert model.peft_config["total"].share == "block"
    for layer in model.modules():
        if isinstance(layer, FacTLinear):
            expected = sum(
                weight * layer.get_delta_weight(name)
                for name, weight in zip(ADAPTERS, [1.0, -2.0, 0.5], strict=True)
                if name in layer.fact_slices
            )
            torch.testing.assert_close(layer.get_delta_weight("total"), expected, **EXACT)


def test_an_adapter_that_is_deleted_takes_its_stacks_along():
    model = with_adapters()
    model.set_adapter("shared")
    model.delete_adapter("default")
    model.delete_adapter("part")
    assert list(model.get_base_model().factors) == ["32x32"]


def test_as_lora_it_gives_the_same_outputs(tmp_path):
    model = adapt("timm", exclude_modules=["qkv.k"])
    save_as_lora(model, tmp_path)
    lora = PeftModel.from_pretrained(make_backbone("timm", torch.float64), tmp_path, autocast_adapter_dtype=False)
    torch.testing.assert_close(logits(lora, images(torch.float64)), logits(model, images(torch.float64)), **EXACT)


def test_hot_swap_and_layout_tell_the_two_kinds_apart(tmp_path):
    blockwise = adapt("timm")
    blockwise.save_pretrained(tmp_path / "block")
    adapt("timm", share="model").save_pretrained(tmp_path / "model")
    model = adapt("timm", init_weights=True)
    hotswap_adapter(model, tmp_path / "block")
    torch.testing.assert_close(logits(model, images(torch.float64)), logits(blockwise, images(torch.float64)))
    with pytest.raises(ValueError, match="has share='model', but adapter 'default' was loaded with share='block'"):
        hotswap_adapter(model, tmp_path / "model")


def test_inspection_counts_every_block(tmp_path):
    model = adapt("timm")
    model.save_pretrained(tmp_path)
    adapter = Adapter.read(tmp_path)
    said = describe(adapter)
    count = 2 * (2 * 32 * 3 + 12 * 9)
    assert "rank 3, scale 0.8, U and V per block" in said
    assert f"{count:,} in the factors" in said and "12 slices of 32x32@blocks-1" in said
    live = {
        name: layer.get_delta_weight("default").norm().item()
        for name, layer in model.get_base_model().named_modules()
        if isinstance(layer, FacTLinear)
    }
    assert adapter.increment_norms() == pytest.approx(live)


def test_one_block_learns_without_the_others():
    """A gradient that comes through one block only moves factors of that block only."""
    model = adapt("timm", torch.float32, layers_to_transform=[0, 1])
    seen = []
    model.get_base_model().blocks[0].register_forward_hook(lambda module, args, output: seen.append(output))
    logits(model, images())
    seen[0].sum().backward()
    for name, factors in factors_of(model).items():
        assert all((factor.grad is not None) == name.endswith("blocks-0") for factor in factors.values())
