"""An export is the adapted model: torch.export, ONNX and torch.jit.trace, with the adapter active and merged.

`python -m benchmarks.coverage.exports` exports every architecture, which takes an hour on one core.
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

pytestmark = [
    pytest.mark.filterwarnings("ignore:.torch.jit.trace:FutureWarning"),  # deprecated, and still in use
    pytest.mark.filterwarnings("ignore:Converting a tensor to a Python"),  # comparisons of shapes
    pytest.mark.filterwarnings("ignore:While compiling, we found certain side effects"),  # in transformers
]


def check(name, way, merged):
    if way == "ONNX":
        pytest.importorskip("onnxscript")
        pytest.importorskip("onnxruntime")
    assert difference(ARCHITECTURES[name], way, merged, any_size=True) < TOLERANCE


@pytest.mark.parametrize("way", WAYS)
def test_a_model_that_reads_weights_is_exported(way):
    check("timm EVA", way, merged=False)


@pytest.mark.parametrize("name, merged", [("ViT", False), ("ViT", True), ("torchvision ViT", False)])
def test_others_are_exported(name, merged):
    check(name, "export", merged)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["DINOv3", "Swin v2", "SigLIP pooled"])
def test_more_architectures_are_exported(name, way):
    check(name, way, merged=False)


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
