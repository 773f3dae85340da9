"""Every architecture of the registry: FacT finds the layers it should, trains, comes back from disk, and merges.

Then what discovery decides on models that are not in the registry, and the choices a user has.

    pytest tests/test_architectures.py -k "DINOv3 or SAM"
"""

import copy
import re
from dataclasses import replace

import pytest
import torch
from architectures import ARCHITECTURES, Architecture, Inputs
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers.pytorch_utils import Conv1D

from fact_peft import FacTConfig, FacTLinear
from fact_peft.architecture.blocks import find_block_linears
from fact_peft.tuner.factors import FacTStack

TOLERANCE = {torch.float32: {"rtol": 1e-4, "atol": 1e-5}}
# A slice whose gradient is below this share of the largest in its stack has none but rounding errors. The least share
# of a slice that matters is 1e-7, in DETR's decoder, whose queries are almost equal at first, and 2e-4 elsewhere; of
# one that does not matter, 5e-10.
NO_GRADIENT = 1e-8

every_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES.values(), ids=ARCHITECTURES)


def build(architecture: Architecture) -> tuple[nn.Module, Inputs]:
    """The same tiny model and batch every time."""
    torch.manual_seed(0)
    return architecture.build(), architecture.inputs()


def adapt(model: nn.Module) -> PeftModel:
    """As a user would, but for V, which is not zero: every factor gets a gradient in the first step already."""
    return get_peft_model(model, FacTConfig(rank=4, init_weights=False)).eval()


def expected_targets(architecture: Architecture, model: nn.Module) -> dict[str, tuple[int, int]]:
    """(in_features, out_features) of the layers the registry names."""
    shapes = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.MultiheadAttention) and re.fullmatch(architecture.targets, f"{name}.in_proj"):
            shapes[f"{name}.in_proj"] = tuple(module.in_proj_weight.shape)[::-1]
        if isinstance(module, (nn.Linear, Conv1D)) and re.fullmatch(architecture.targets, name):
            shape = tuple(module.weight.shape)
            shapes[name] = shape if isinstance(module, Conv1D) else shape[::-1]
    return shapes


def adapted_layers(peft_model: PeftModel) -> dict[str, FacTLinear]:
    return {name: layer for name, layer in peft_model.get_base_model().named_modules() if isinstance(layer, FacTLinear)}


def stacks(peft_model: PeftModel) -> dict[str, FacTStack]:
    return dict(peft_model.get_base_model().factors)


def outputs(model: nn.Module, inputs: Inputs) -> list[Tensor]:
    """All floating-point tensors a model puts out, in order."""
    torch.manual_seed(0)
    with torch.no_grad():
        leaves = tree_leaves(model(**inputs))
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def loss_of(model: nn.Module, inputs: Inputs) -> Tensor:
    """A scalar that depends on every element of the first output.

    With random signs: a plain sum does not change at all where a LayerNorm comes last.
    """
    torch.manual_seed(0)
    output = model(**inputs)
    first = output if isinstance(output, Tensor) else output[0]
    return (first * torch.randn_like(first)).sum()


def layer_types(model: nn.Module) -> dict[str, type]:
    return {name: type(module) for name, module in model.named_modules()}


@every_architecture
def test_targets_are_the_linear_layers_of_the_blocks(architecture: Architecture) -> None:
    model, _ = build(architecture)
    expected = expected_targets(architecture, model)
    peft_model = adapt(model)
    assert adapted_layers(peft_model).keys() == expected.keys()
    assert len(expected) == architecture.count
    assert tuple(peft_model.active_peft_config.modules_to_save or ()) == architecture.heads


@every_architecture
def test_slices_cover_the_layers_and_fill_the_stacks(architecture: Architecture) -> None:
    model, _ = build(architecture)
    expected = expected_targets(architecture, model)
    peft_model = adapt(model)
    ends = dict.fromkeys(stacks(peft_model), 0)
    for name, layer in adapted_layers(peft_model).items():
        owned = layer.fact_slices["default"]
        assert (owned.in_features, owned.out_features) == expected[name]
        assert owned.first == ends[owned.stack]
        ends[owned.stack] += owned.count
    for name, stack in stacks(peft_model).items():
        assert stack.fact_Sigma["default"].shape == (ends[name], 4, 4)


@every_architecture
def test_full_size_model_gets_the_same_layers(architecture: Architecture) -> None:
    with torch.device("meta"):
        model = architecture.build_full()
        expected = expected_targets(architecture, model)
        peft_model = adapt(model)
    assert adapted_layers(peft_model).keys() == expected.keys()
    assert tuple(peft_model.active_peft_config.modules_to_save or ()) == architecture.heads


@every_architecture
def test_training_moves_every_factor_and_nothing_frozen(architecture: Architecture) -> None:
    model, inputs = build(architecture)
    peft_model = adapt(model)
    trained = {
        name: parameter
        for name, parameter in peft_model.named_parameters()
        if ".factors." in name or ".modules_to_save.default." in name
    }
    assert {name for name, p in peft_model.named_parameters() if p.requires_grad} == trained.keys()
    before = copy.deepcopy(peft_model.state_dict())

    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0)
    for _ in range(3):
        optimizer.zero_grad()
        loss_of(peft_model, inputs).backward()
        for name, parameter in trained.items():
            assert parameter.grad is not None and parameter.grad.any(), name
        for name, layer in adapted_layers(peft_model).items():
            has_gradient = share_of_gradient(peft_model, layer) > NO_GRADIENT
            assert (has_gradient != bool(re.fullmatch(architecture.no_gradient, name))).all(), name
        optimizer.step()

    for name, value in peft_model.state_dict().items():
        assert torch.equal(value, before[name]) != (name in trained), name


def share_of_gradient(peft_model: PeftModel, layer: FacTLinear) -> Tensor:
    """Gradient norm of the core of each slice of a layer, relative to the largest in the stack.

    The cores are the only factor that no other layer has a share in.
    """
    owned = layer.fact_slices["default"]
    gradient = stacks(peft_model)[owned.stack].fact_Sigma["default"].grad
    assert gradient is not None
    norms = gradient.flatten(1).norm(dim=1)
    return norms[owned.first : owned.first + owned.count] / norms.max()


@every_architecture
def test_reloaded_adapter_gives_bit_equal_outputs(architecture: Architecture, tmp_path) -> None:
    model, inputs = build(architecture)
    fresh = copy.deepcopy(model)
    plain = outputs(model, inputs)
    peft_model = adapt(model)
    with torch.no_grad():  # what a reload that makes the heads anew would get wrong
        for parameter in peft_model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.01)
    adapted = outputs(peft_model, inputs)
    assert not all(map(torch.equal, adapted, plain))

    peft_model.save_pretrained(tmp_path)
    reloaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    for got, expected in zip(outputs(reloaded, inputs), adapted, strict=True):
        assert torch.equal(got, expected)


@every_architecture
def test_merged_model_is_plain_and_gives_equal_outputs(architecture: Architecture) -> None:
    model, inputs = build(architecture)
    types = layer_types(model)
    peft_model = adapt(model)
    adapted = outputs(peft_model, inputs)
    merged = peft_model.merge_and_unload()
    assert layer_types(merged) == types
    assert not any("fact" in name for name, _ in merged.named_parameters())
    for got, expected in zip(outputs(merged, inputs), adapted, strict=True):
        torch.testing.assert_close(got, expected, **TOLERANCE[expected.dtype])


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.fc2 = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(self.fc1(self.norm(x)).relu())


class CrossBlock(Block):
    """A second class of block."""


def test_blocks_of_two_classes_are_found_in_one_list_and_over_stages() -> None:
    model = nn.ModuleDict({"layers": nn.Sequential(Block(8), CrossBlock(8), Block(8), CrossBlock(8))})
    assert len(find_block_linears(model)) == 4 * 2
    stages = (nn.ModuleDict({"blocks": nn.Sequential(Block(8), Block(8), CrossBlock(8))}) for _ in range(2))
    assert len(find_block_linears(nn.ModuleDict({"stages": nn.Sequential(*stages)}))) == 6 * 2


def test_head_after_the_blocks_in_one_sequential_is_not_found() -> None:
    backbone = nn.ModuleDict({"layers": nn.Sequential(Block(8), Block(8))})
    head = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    model = nn.ModuleDict({"whole": nn.Sequential(backbone, head)})
    assert find_block_linears(model).keys() == {f"whole.0.layers.{i}.fc{j}" for i in (0, 1) for j in (1, 2)}


def test_bottleneck_of_a_block_is_no_stage_transition() -> None:
    """Its second layer widens as Hiera's shortcut does, but what another layer of the block has narrowed."""

    class Bottleneck(Block):
        def __init__(self, width: int) -> None:
            super().__init__(width)
            self.down = nn.Linear(width, width // 2)
            self.up = nn.Linear(width // 2, width)

    assert len(find_block_linears(nn.ModuleDict({"layers": nn.Sequential(Bottleneck(8), Bottleneck(8))}))) == 2 * 4


def test_narrow_tower_of_a_model_without_submodels_is_kept() -> None:
    """Only transformers' models say which of their parts is a model of its own; elsewhere it may be a text tower."""
    model = nn.ModuleDict({"vision": nn.Sequential(Block(16), Block(16)), "text": nn.Sequential(Block(8), Block(8))})
    assert len(find_block_linears(model)) == 4 * 2


def test_head_of_sam_can_be_trained_in_full_beside_the_adapter() -> None:
    model, inputs = build(ARCHITECTURES["SAM"])
    config = FacTConfig(rank=4, modules_to_save=["mask_decoder"])
    peft_model = get_peft_model(model, config)
    assert all(name.startswith("vision_encoder.") for name in adapted_layers(peft_model))
    loss_of(peft_model, inputs).backward()
    assert peft_model.get_base_model().mask_decoder.modules_to_save["default"].iou_token.weight.grad is not None


@pytest.mark.parametrize(
    ("choice", "adapted"),
    [
        ({"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]}, r"vit\.layers\.[012]\.attention\.[qkvo]_proj"),
        ({"target_modules": r".*\.attention\..*_proj"}, r"vit\.layers\.[012]\.attention\.[qkvo]_proj"),
        ({"target_modules": ["fc1", "fc2"]}, r"vit\.layers\.[012]\.mlp\.fc[12]"),
        ({"exclude_modules": ["fc1", "fc2"]}, r"vit\.layers\.[012]\.attention\.[qkvo]_proj"),
        ({"layers_to_transform": [0, 1]}, r"vit\.layers\.[01]\..*"),
    ],
    ids=["attention only", "attention only, regex", "MLP only", "all but MLP", "first two blocks"],
)
def test_ablations_are_one_argument(choice: dict, adapted: str) -> None:
    model = replace(ARCHITECTURES["ViT"], tiny={**ARCHITECTURES["ViT"].tiny, "num_hidden_layers": 3}).build()
    expected = {
        name for name, module in model.named_modules() if isinstance(module, nn.Linear) and re.fullmatch(adapted, name)
    }
    assert expected
    assert adapted_layers(get_peft_model(model, FacTConfig(rank=4, **choice))).keys() == expected


@pytest.mark.parametrize(
    ("name", "adapted"),
    [
        ("ViT", r"vit\.layers\.0\..*"),
        ("timm ViT", r"blocks\.0\..*"),
        ("Swin", r"swin\.encoder\.layers\.0\..*"),
        ("timm Swin", r"layers\.0\..*"),
    ],
)
def test_layers_to_transform_counts_blocks_or_stages(name: str, adapted: str, tmp_path) -> None:
    model, _ = build(ARCHITECTURES[name])
    fresh = copy.deepcopy(model)
    expected = {target for target in expected_targets(ARCHITECTURES[name], model) if re.fullmatch(adapted, target)}
    assert expected
    peft_model = get_peft_model(model, FacTConfig(rank=4, layers_to_transform=0))
    assert adapted_layers(peft_model).keys() == expected
    peft_model.save_pretrained(tmp_path)
    assert adapted_layers(PeftModel.from_pretrained(fresh, tmp_path)).keys() == expected


def test_reading_the_weight_of_a_layer_equals_calling_it() -> None:
    model, _ = build(ARCHITECTURES["ViT"])
    peft_model = adapt(model)
    layer = adapted_layers(peft_model)["vit.layers.0.mlp.fc1"]
    x = torch.randn(5, layer.in_features)

    def assert_equal() -> None:
        torch.testing.assert_close(nn.functional.linear(x, layer.weight, layer.bias), layer(x))

    assert_equal()
    with peft_model.disable_adapter():
        assert layer.weight is layer.base_layer.weight
    peft_model.merge_adapter()
    assert_equal()
    with peft_model.disable_adapter():  # takes the increment out of the weight first
        assert_equal()
    assert_equal()
