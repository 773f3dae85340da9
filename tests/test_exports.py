"""An export is the adapted model: torch.export, ONNX and torch.jit.trace, with the adapter active and merged.

pytest tests/test_exports.py -m slow -k "DINOv3"    # every architecture takes about half an hour
"""

import pytest
import torch
from architectures import ARCHITECTURES
from backbones import images, make_backbone
from exporting import WAYS, adapt, difference
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call

from fact_peft import FacTConfig, FacTLinear

# In float32, of the adapter's effect. An export that has lost an adapter differs by 0.3 to 1.
TOLERANCE = 1e-4
# Their depth is far larger than what the adapter changes in it, so that float32 rounds more of that.
LARGE_OUTPUTS = {"DPT": 1e-2, "Depth Anything": 1e-2}

# What cannot be exported without an adapter either, in torch 2.14 and transformers 5.23: the flow depends on numbers.
BY_NUMBERS = {"VideoMAE, pre-training", "EoMT"}
NOT_EXPORTED = {way: BY_NUMBERS for way in ("export", "strict export", "ONNX")} | {"trace": set()}
# What is exported for one number of images.
ONE_SIZE = {"SigLIP 2 vision"}

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning"),  # deprecated, and still in use
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python"),  # comparisons of shapes
]


def check(name, way, merged):
    if way == "ONNX":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    if name in NOT_EXPORTED[way]:
        pytest.skip(f"{name} cannot be exported without an adapter either")
    found = difference(ARCHITECTURES[name], way, merged, any_size=name not in ONE_SIZE)
    assert found < LARGE_OUTPUTS.get(name, TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_reads_weights_is_exported(way):
    check("timm EVA", way, merged=False)


@pytest.mark.parametrize("name, merged", [("ViT", False), ("ViT", True), ("torchvision ViT", False)])
def test_others_are_exported(name, merged):
    check(name, "export", merged)


@pytest.mark.slow
@pytest.mark.parametrize("merged", [False, True], ids=["active", "merged"])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_is_exported(name, way, merged):
    check(name, way, merged)


class Weight(nn.Module):
    """Gives the weight of a layer of a model."""

    def __init__(self, model, path):
        super().__init__()
        self.model, self.path = model, path

    def forward(self):
        return self.model.get_submodule(self.path).weight


def test_a_fake_weight_has_the_increment_too():
    model = adapt(ARCHITECTURES["timm EVA"].build())
    path = next(name for name, module in model.named_modules() if isinstance(module, FacTLinear))
    reading = Weight(model, path)
    assert reading().requires_grad
    with FakeTensorMode() as mode:
        fakes = {name: mode.from_tensor(parameter) for name, parameter in reading.named_parameters()}
        weight = functional_call(reading, fakes, ())
    assert isinstance(weight, FakeTensor)
    assert weight.requires_grad


def test_an_adapter_is_added_and_deleted_after_an_export():
    """torch.export replaces plain dicts of the modules by copies, which then no longer agree."""
    model = get_peft_model(make_backbone("vit"), FacTConfig(rank=2)).eval()
    names = model.state_dict().keys()
    torch.export.export(model, (images(),), strict=False)
    model.add_adapter("other", FacTConfig(rank=2))
    model.delete_adapter("other")
    assert model.state_dict().keys() == names
