"""What an adapter's folder says of itself, against the live model that it was saved from."""

import pytest
import torch
from backbones import make_backbone
from peft import LoraConfig, get_peft_model

from fact_peft import Adapter, FacTConfig, FacTLinear
from fact_peft.operations.inspection import increment_map


@pytest.fixture(params=[("vit", "tt"), ("vit", "tk"), ("swin", "tt"), ("timm", "tk")])
def adapted(request, tmp_path):
    """A randomly trained model and the folder it is saved in."""
    backbone, decomposition = request.param
    config = FacTConfig(rank=3, decomposition=decomposition, init_weights=False, scale=0.7, bias="fact_only")
    model = get_peft_model(make_backbone(backbone), config)
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_norms_are_those_of_the_increments_of_the_live_model(adapted):
    model, folder = adapted
    norms = Adapter.read(folder).increment_norms()
    expected = {
        name.removeprefix("base_model.model."): layer.get_delta_weight("default").norm().item()
        for name, layer in model.named_modules()
        if isinstance(layer, FacTLinear)
    }
    assert list(norms) == list(expected)
    assert norms == pytest.approx(expected, rel=1e-5)  # those of the live model are float32


def test_the_map_of_increments_has_a_row_per_block():
    norms = {f"encoder.layers.encoder_layer_{block}.mlp.{layer}": 1.0 * layer for block in (0, 1) for layer in (0, 3)}
    blocks, matrices, grid = increment_map(norms)
    assert blocks == ["encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_1"]
    assert matrices == ["mlp.0", "mlp.3"] and grid.tolist() == [[0.0, 3.0], [0.0, 3.0]]


def test_factors_and_the_rest_are_all_that_is_trained(adapted):
    model, folder = adapted
    adapter = Adapter.read(folder)
    factors = [factor for stack in adapter.factors.values() for factor in stack.values()]
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    assert sum(tensor.numel() for tensor in [*factors, *adapter.others.values()]) == trained


def test_the_command_prints_and_draws(adapted, tmp_path, run_module):
    pytest.importorskip("matplotlib")
    model, folder = adapted
    picture = tmp_path / "map.png"
    printed = run_module("fact_peft", "show", folder, "--map", picture)
    config = model.peft_config["default"]
    num_factors = sum(p.numel() for name, p in model.named_parameters() if ".fact_" in name)
    title = {"tt": "FacT-TT, tensor-train", "tk": "FacT-TK, Tucker"}[config.decomposition]
    assert f"{title}, rank 3, scale 0.7" in printed
    assert f"{num_factors:,} in the factors" in printed
    size = sum((folder / name).stat().st_size for name in ("adapter_model.safetensors", "adapter_config.json"))
    assert f"bytes       {size:,}: " in printed
    assert all(line in printed for line in config.layout)
    with pytest.importorskip("PIL.Image").open(picture) as image:
        assert len(image.convert("RGB").getcolors(maxcolors=1 << 20)) > 50  # a map with its colour bar, not a blank


def test_an_adapter_of_another_method_is_refused(tmp_path):
    get_peft_model(make_backbone("vit"), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="not a FacT adapter but one of"):
        Adapter.read(tmp_path)


def test_a_folder_without_weights_is_refused(adapted):
    _, folder = adapted
    (folder / "adapter_model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no adapter_model.safetensors"):
        Adapter.read(folder)


def test_an_untrained_adapter_does_nothing_anywhere(tmp_path):
    get_peft_model(make_backbone("vit"), FacTConfig(rank=3)).save_pretrained(tmp_path)
    assert set(Adapter.read(tmp_path).increment_norms().values()) == {0.0}


def test_norms_of_a_wide_layer_count_every_slice(tmp_path):
    """fc1 owns four slices; with identity cores for them alone, and U, V orthonormal, each adds r to the square."""
    model = get_peft_model(make_backbone("vit"), FacTConfig(rank=2, scale=1.0))
    stack = model.base_model.model.factors["32x32"]
    with torch.no_grad():
        stack.fact_Sigma["default"].zero_()
        stack.fact_Sigma["default"][4:8] = torch.eye(2)  # after q, k, v, o of the first block
        stack.fact_U["default"].copy_(torch.eye(32, 2))
        stack.fact_V["default"].copy_(torch.eye(32, 2))
    model.save_pretrained(tmp_path)
    norms = Adapter.read(tmp_path).increment_norms()
    assert {name: norm for name, norm in norms.items() if norm} == {"vit.layers.0.mlp.fc1": pytest.approx(8**0.5)}
