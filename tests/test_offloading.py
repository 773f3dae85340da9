"""Models of which accelerate keeps parts in memory or on disk: right before and after adapting, LoRA beside it."""

import copy

import accelerate
import pytest
import torch
from backbones import images, logits, make_backbone
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification

from fact_peft import FacTConfig

CPU = torch.device("cpu")
LAYERS = ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"]
CONFIGS = {
    "FacT": FacTConfig(rank=4, init_weights=False),
    "LoRA": LoraConfig(r=4, init_lora_weights=False, target_modules=LAYERS, modules_to_save=["classifier"]),
}
every_method = pytest.mark.parametrize("method", CONFIGS)
# Of merging, which adds in another order.
ROUNDING = 1e-5


def adapted(method, backbone=None):
    model = make_backbone("vit") if backbone is None else backbone
    torch.manual_seed(0)
    return get_peft_model(model, copy.deepcopy(CONFIGS[method])).eval()


def to_memory(model, folder):
    return accelerate.cpu_offload(model, execution_device=CPU)


def to_disk(model, folder):
    return accelerate.disk_offload(model, folder, execution_device=CPU)


def dispatched(model, folder):
    places = {name: "cpu" for name, _ in model.base_model.model.vit.named_children()} | {"layers.1": "disk"}
    del places["layers"]
    device_map = {f"base_model.model.vit.{name}": place for name, place in {**places, "layers.0": "cpu"}.items()}
    device_map |= {f"base_model.model.{name}": "disk" for name, _ in model.base_model.model.named_children()}
    del device_map["base_model.model.vit"]
    return accelerate.dispatch_model(model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True)


@every_method
@pytest.mark.parametrize("offload", [to_memory, to_disk, dispatched])
@torch.no_grad()
def test_after_adapting(method, offload, tmp_path):
    model = adapted(method)
    expected = logits(model, images())
    model = offload(model, tmp_path)
    assert any(parameter.is_meta for parameter in model.parameters())
    assert torch.equal(logits(model, images()), expected)


@pytest.mark.parametrize("offload", [to_memory, to_disk, dispatched])
def test_offloaded_factors_are_not_trained_silently(offload, tmp_path):
    model = offload(adapted("FacT"), tmp_path).train()
    with pytest.raises(RuntimeError, match="'default' are offloaded and cannot be trained"):
        logits(model, images())


@pytest.mark.parametrize("offload", [to_memory, to_disk])
@torch.no_grad()
def test_before_adapting(offload, tmp_path):
    """LoRA, whose matrices stay on the meta device, gives NaN."""
    model = adapted("FacT", offload(make_backbone("vit"), tmp_path))
    assert torch.equal(logits(model, images()), logits(adapted("FacT"), images()))


@pytest.mark.parametrize("blocks", [("cpu", "cpu"), ("cpu", "disk"), ("disk", "cpu")])
def test_a_device_map_before_adapting(blocks, tmp_path):
    make_backbone("vit").save_pretrained(tmp_path / "base")
    device_map = {"vit.embeddings": "cpu", "vit.layernorm": "cpu", "classifier": "cpu"}
    device_map |= {f"vit.layers.{index}": place for index, place in enumerate(blocks)}
    model = AutoModelForImageClassification.from_pretrained(
        tmp_path / "base",
        device_map="auto" if blocks == ("cpu", "cpu") else device_map,
        offload_folder=tmp_path / "offload",
    )
    model = adapted("FacT", model)
    with torch.no_grad():
        scores = logits(adapted("FacT"), images())
        torch.testing.assert_close(logits(model, images()), scores, rtol=0, atol=ROUNDING)
        model.merge_adapter()
        torch.testing.assert_close(logits(model, images()), scores, rtol=0, atol=ROUNDING)
        model.unmerge_adapter()
        torch.testing.assert_close(logits(model, images()), scores, rtol=0, atol=ROUNDING)
    nn.functional.cross_entropy(logits(model.train(), images()), torch.arange(3)).backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if ".fact_" in name)


def test_a_saved_adapter_on_a_device_map(tmp_path):
    make_backbone("vit").save_pretrained(tmp_path / "base")
    expected = adapted("FacT")
    expected.save_pretrained(tmp_path / "adapter")
    base = AutoModelForImageClassification.from_pretrained(tmp_path / "base", device_map="auto")
    model = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        assert torch.equal(logits(model, images()), logits(expected, images()))
