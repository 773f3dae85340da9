"""FacT on bases quantised with torchao or bitsandbytes: training, inference, saving; and what merging does."""

import pytest
import torch
from backbones import images, logits, to_int8, vit
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForImageClassification, BitsAndBytesConfig, TorchAoConfig

from fact_peft import FacTConfig
from fact_peft.method.decomposition import DECOMPOSITIONS

pytestmark = [
    pytest.mark.filterwarnings("ignore:TypedStorage is deprecated:UserWarning"),
    pytest.mark.filterwarnings("ignore:_check_is_size will be removed:FutureWarning"),
]

HEAD = ["classifier"]


def int8_weights():
    return pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig()


BASES = {
    "torchao int8": lambda skip: TorchAoConfig(int8_weights(), modules_to_not_convert=skip),
    "bitsandbytes 8 bit": lambda skip: BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip),
    "bitsandbytes 4 bit": lambda skip: BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skip),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT wide enough for the blocks of 64 numbers that 4-bit quantisation works on."""
    torch.manual_seed(7)
    path = tmp_path_factory.mktemp("backbone")
    vit(hidden_size=64, intermediate_size=256).save_pretrained(path)
    return path


def load(folder, base, skip=HEAD):
    pytest.importorskip(base.partition(" ")[0])
    return AutoModelForImageClassification.from_pretrained(folder, quantization_config=BASES[base](skip))


@torch.no_grad()
def scores(model):
    return logits(model.eval(), images())


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("base", BASES)
def test_training_saving_and_merging(base, decomposition, folder, tmp_path):
    torch.manual_seed(0)
    config = FacTConfig(rank=4, decomposition=decomposition, init_weights=False, scale=3.0)
    model = get_peft_model(load(folder, base), config).train()
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.clone() for parameter in trainable]
    optimizer = torch.optim.AdamW(trainable, lr=1e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        losses.append(logits(model, images()).square().sum())
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    assert not any(torch.equal(old, new) for old, new in zip(before, trainable, strict=True))

    expected = scores(model)
    model.save_pretrained(tmp_path)
    assert torch.equal(scores(PeftModel.from_pretrained(load(folder, base), tmp_path)), expected)

    # The rounding of the base alone is the measure of what merging may change.
    rounding = (
        (scores(load(folder, base)) - scores(AutoModelForImageClassification.from_pretrained(folder))).abs().max()
    )
    with pytest.warns(UserWarning, match=r"Merging into .* weights quantises W \+ dW again"):
        merged = model.merge_and_unload()
    assert (scores(merged) - expected).abs().max() < 4 * rounding
    assert (scores(merged) - scores(load(folder, base))).abs().max() > 4 * rounding


def test_weights_quantised_by_hand_train_but_do_not_merge():
    torch.manual_seed(7)
    base = vit()
    to_int8(base, lambda module, name: isinstance(module, nn.Linear) and "vit." in name)
    model = get_peft_model(base, FacTConfig(rank=4, init_weights=False))
    logits(model, images()).square().sum().backward()
    assert model.get_base_model().factors["32x32"].fact_U["default"].grad.abs().max() > 0
    with pytest.raises(TypeError, match="not loaded with a TorchAoConfig"):
        model.merge_adapter()


@pytest.mark.parametrize("base", BASES)
def test_quantised_head_is_refused_unless_it_is_left_alone(base, folder):
    model = load(folder, base, skip=["no such module"])
    with pytest.raises(ValueError, match=r"The module classifier is quantised .* modules_to_save=\[\]"):
        get_peft_model(model, FacTConfig(rank=4))
    get_peft_model(model, FacTConfig(rank=4, modules_to_save=[]))
