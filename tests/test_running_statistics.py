"""Running statistics of frozen layers do not move in training, so a reloaded adapter is the one that was trained."""

import copy
from collections.abc import Callable

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import Tensor, nn
from transformers import CvtConfig, CvtForImageClassification, LevitConfig, LevitForImageClassification

from fact_peft import FacTConfig

IMAGES = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))


def levit() -> nn.Module:
    config = LevitConfig(
        image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[2, 2, 2], key_dim=[8, 8, 8]
    )
    return LevitForImageClassification(config)


def cvt() -> nn.Module:
    config = CvtConfig(embed_dim=[16, 16, 32], num_heads=[1, 2, 2], depth=[1, 2, 3], drop_path_rate=[0.0, 0.0, 0.0])
    return CvtForImageClassification(config)


def timm_levit() -> nn.Module:
    return pytest.importorskip("timm").create_model("levit_128s", num_classes=3, img_size=64)


def logits(model: nn.Module) -> Tensor:
    output = model(IMAGES)
    return output if isinstance(output, Tensor) else output.logits


def buffers(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.named_buffers() if "running" in name or "batches" in name}


def train(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model.train()
    for _ in range(3):
        logits(model).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


every_model = pytest.mark.parametrize("build", [levit, cvt, timm_levit], ids=lambda build: build.__name__)


@every_model
def test_reloaded_adapter_is_the_one_that_trained(build: Callable[[], nn.Module], tmp_path):
    torch.manual_seed(0)
    model = build()
    fresh = copy.deepcopy(model)
    adapted = get_peft_model(model, FacTConfig(rank=4))
    before = buffers(adapted)
    assert before
    train(adapted)
    after = buffers(adapted)
    assert all(
        torch.equal(after[name], value) for name, value in before.items() if "modules_to_save.default" not in name
    )
    adapted.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(fresh, tmp_path).eval()
    assert torch.equal(logits(loaded), logits(adapted))


@every_model
def test_injected_layers_keep_the_statistics_too(build: Callable[[], nn.Module]):
    torch.manual_seed(0)
    model = inject_adapter_in_model(FacTConfig(rank=4, modules_to_save=[]), build())
    before = buffers(model)
    train(model)
    after = buffers(model)
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_a_trained_head_learns_its_statistics_and_saves_them(tmp_path):
    torch.manual_seed(0)
    model = levit()  # whose classifier begins with a BatchNorm
    fresh = copy.deepcopy(model)
    adapted = get_peft_model(model, FacTConfig(rank=4, modules_to_save=["classifier"]))
    before = buffers(adapted)
    train(adapted)
    moved = {name for name, value in buffers(adapted).items() if not torch.equal(value, before[name])}
    assert moved and all("classifier.modules_to_save.default" in name for name in moved)
    adapted.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(fresh, tmp_path).eval()), logits(adapted))


def test_copies_keep_the_statistics_and_an_unloaded_model_does_not():
    torch.manual_seed(0)
    adapted = get_peft_model(levit().train(), FacTConfig(rank=4, modules_to_save=["classifier"]))
    copied = copy.deepcopy(adapted)
    for model in (adapted, copied, copy.deepcopy(copied).eval(), copied.train()):
        norms = {name: module for name, module in model.named_modules() if isinstance(module, nn.BatchNorm1d)}
        trained = {name for name, module in norms.items() if module.training}
        assert len(norms) > 10 and all(".modules_to_save." in name for name in trained)
        assert bool(trained) == model.training
    model = adapted.unload().train()
    assert all(module.training for module in model.modules())
