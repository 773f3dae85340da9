"""Every mistake gets an error that names argument, value, constraint and a fix, and changes nothing."""

import math

import pytest
import torch
from backbones import make_backbone
from peft import get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from fact_peft import FacTConfig


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"rank": 0}, "rank=0 is less than 1; .* such as rank=8"),
        ({"rank": -3}, "rank=-3 is less than 1"),
        ({"rank": 10**400}, "rank is more than 2147483647, .* such as rank=8"),
        ({"rank": 4.0}, "rank=4.0 is not an integer"),
        ({"rank": True}, "rank=True is not an integer"),
        ({"rank": "8"}, "rank='8' is not an integer"),
        ({"decomposition": "svd"}, "decomposition='svd' is unknown; choose one of 'tt', 'tk', 'cp'"),
        ({"scale": 0}, r"scale=0 switches the adapter off .* \[0.01, 100\]"),
        ({"scale": math.nan}, "scale=nan is not finite"),
        ({"scale": math.inf}, "scale=inf is not finite"),
        ({"scale": "1"}, "scale='1' is not a number"),
        ({"fact_dropout": 1.0}, r"fact_dropout=1.0 is not a probability in \[0, 1\)"),
        ({"fact_dropout": -0.1}, r"fact_dropout=-0.1 is not a probability in \[0, 1\)"),
        ({"fact_dropout": math.nan}, "fact_dropout=nan is not finite"),
        ({"bias": "lora_only"}, "bias='lora_only' is unknown; choose one of 'none', 'all', 'fact_only'"),
        ({"fan_in_fan_out": 1}, "fan_in_fan_out=1 is not a bool"),
        ({"init_weights": "pissa"}, r"init_weights='pissa' is unknown; choose 'orthogonal' \(zero cores\), True"),
        ({"init_weights": 1}, "init_weights=1 is unknown"),
        ({"scale": 10**400}, "scale is an integer too large for a float"),
        ({"scale": 1e308}, r"scale=1e\+308 does not fit a float32, .* use a scale in \[0.01, 100\]"),
        ({"scale": -1e-60}, "scale=-1e-60 does not fit a float32"),
        ({"fact_dropout": 10**400}, "fact_dropout is an integer too large for a float"),
        ({"target_modules": 5}, r"target_modules=5 is not a list of names or one regex.* target_modules=\['name'\]"),
        ({"target_modules": ["q_proj", 5]}, r"target_modules=\['q_proj', 5\] is not a list of names"),
        ({"target_modules": {"q_proj": 1}}, "target_modules={'q_proj': 1} is not a list of names"),
        ({"target_modules": ""}, "target_modules='' is not a list of names"),
        ({"target_modules": "q_proj("}, r"target_modules='q_proj\(' is no regex.* backslash"),
        ({"exclude_modules": "*"}, r"exclude_modules='\*' is no regex"),
        ({"exclude_modules": [None]}, r"exclude_modules=\[None\] is not a list of names"),
        ({"modules_to_save": [""]}, r"modules_to_save=\[''\] is not a list of names, none of them empty"),
        ({"modules_to_save": "classifier"}, r"modules_to_save='classifier' .* modules_to_save=\['classifier'\]"),
        ({"modules_to_save": ["head["]}, r"modules_to_save=\['head\['\] is no regex"),
        ({"modules_to_save": True}, "modules_to_save=True is not a list of names"),
        ({"layers_to_transform": "0"}, r"layers_to_transform='0' is neither an integer nor a list of them.*\[0, 1\]"),
        ({"layers_to_transform": [0, 1.0]}, r"layers_to_transform=\[0, 1.0\] is neither"),
        ({"layers_pattern": ["("], "layers_to_transform": [0]}, r"layers_pattern=\['\('\] is no regex"),
        ({"layers_pattern": 5, "layers_to_transform": [0]}, "layers_pattern=5 is not a list of names or one name"),
        ({"base_model_name_or_path": 5}, "base_model_name_or_path=5 is not a string"),
        ({"revision": ["main"]}, r"revision=\['main'\] is not a string"),
        ({"layers_pattern": "layers"}, "layers_pattern='layers' needs layers_to_transform"),
        ({"layers_to_transform": [0], "target_modules": ".*q_proj"}, "cannot be combined with the regex"),
    ],
)
def test_config_refuses(settings, message):
    with pytest.raises(ValueError, match=message):
        FacTConfig(**settings)


@pytest.mark.parametrize(
    "settings, error, message",
    [
        (
            {"rank": 33},
            ValueError,
            "rank=33 is larger than 32, the width of vit.layers.0.attention.q_proj .* at most 32",
        ),
        (
            {"target_modules": ["nowhere"]},
            NoMatchingPeftModuleError,
            "target_modules={'nowhere'} .* no linear layer of",
        ),
        (
            {"target_modules": "no.*where"},
            NoMatchingPeftModuleError,
            "has, among others, vit.layers.0.attention.q_proj",
        ),
        ({"layers_to_transform": [7]}, NoMatchingPeftModuleError, r"layers_to_transform=\[7\]"),
        ({"exclude_modules": ".*"}, NoMatchingPeftModuleError, r"exclude_modules='\.\*'"),
        ({"target_modules": ["layernorm"]}, ValueError, "matches vit.layernorm, a LayerNorm; FacT adapts nn.Linear"),
        ({"target_modules": ["projection"]}, ValueError, "vit.embeddings.patch_embeddings.projection, a Conv2d"),
        ({"target_modules": r".*attention"}, ValueError, "vit.layers.0.attention, a ViTAttention"),
    ],
)
def test_model_refuses_and_stays_as_it_was(settings, error, message):
    backbone = make_backbone("vit")
    config = FacTConfig(**{"rank": 4, **settings})
    before = dict(vars(config))
    with pytest.raises(error, match=message):
        get_peft_model(backbone, config)
    assert not any(isinstance(module, BaseTunerLayer) for module in backbone.modules())
    assert backbone.state_dict().keys() == make_backbone("vit").state_dict().keys()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert vars(config) == before


def test_adding_a_bad_adapter_keeps_the_good_one():
    model = get_peft_model(make_backbone("vit"), FacTConfig(rank=4))
    names = set(model.state_dict())
    with pytest.raises(ValueError, match="rank=33"):
        model.add_adapter("bad", FacTConfig(rank=33))
    assert list(model.peft_config) == ["default"] and set(model.state_dict()) == names


@pytest.mark.filterwarnings("ignore:Adapter name '' should not be contained in the prefix")
@pytest.mark.parametrize("name", ["", "a.b", "copy", "values"])
def test_adapter_names_that_cannot_be_parameters_are_refused(name):
    backbone = make_backbone("vit")
    with pytest.raises(ValueError, match=r"adapter_name=.* choose another name"):
        get_peft_model(backbone, FacTConfig(rank=4), adapter_name=name)
    assert not any(isinstance(module, BaseTunerLayer) for module in backbone.modules())


def test_model_without_blocks_asks_for_targets():
    with pytest.raises(
        ValueError, match=r"Please specify `target_modules` .* no repeated transformer blocks .* linear layers: 0"
    ):
        get_peft_model(nn.Sequential(nn.Linear(8, 8)), FacTConfig(rank=2))


def test_projection_that_is_read_but_never_called_is_refused():
    model = nn.Sequential(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))  # q, k and v of different widths
    with pytest.raises(ValueError, match=r"matches 0.out_proj, .* FacT adapts nn.Linear and Conv1D"):
        get_peft_model(model, FacTConfig(rank=2, target_modules=["out_proj"]))


def test_model_with_an_attribute_in_the_place_of_the_factors_is_refused():
    class Clash(nn.Module):
        def __init__(self):
            super().__init__()
            self.factors = nn.Linear(8, 8)
            self.layer = nn.Linear(8, 8)

    with pytest.raises(ValueError, match="Clash has an attribute 'factors' of its own"):
        get_peft_model(Clash(), FacTConfig(rank=2, target_modules=["layer"]))


def test_unusual_but_legal_values_are_accepted():
    for settings in ({"scale": -2.0}, {"scale": 5}, {"rank": 32}, {"fact_dropout": 0}, {"target_modules": ("q_proj",)}):
        model = get_peft_model(make_backbone("vit"), FacTConfig(**settings))
        assert torch.isfinite(model(torch.zeros(1, 3, 16, 16)).logits).all()
