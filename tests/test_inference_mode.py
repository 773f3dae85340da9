"""Whatever is built, loaded or merged inside ``torch.inference_mode()`` can be trained afterwards."""

import pytest
import torch
from peft import PeftModel, get_peft_model, inject_adapter_in_model
from torch import nn

from fact_peft import FacTConfig
from fact_peft.method.decomposition import DECOMPOSITIONS


def base():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))


def config(**settings):
    return FacTConfig(rank=2, target_modules=["0"], modules_to_save=["1"], init_weights=False, **settings)


def built(model, fresh, settings, folder):
    return get_peft_model(fresh, settings)


def injected(model, fresh, settings, folder):
    return inject_adapter_in_model(settings, fresh)


def added(model, fresh, settings, folder):
    model.add_adapter("other", settings)
    model.set_adapter("other")
    return model


def summed(model, fresh, settings, folder):
    model.add_adapter("other", settings)
    model.add_weighted_adapter(["default", "other"], [1.0, -2.0], "sum")
    model.set_adapter("sum")
    return model


def loaded(model, fresh, settings, folder):
    return PeftModel.from_pretrained(fresh, folder, is_trainable=True)


def loaded_on_meta(model, fresh, settings, folder):
    return PeftModel.from_pretrained(fresh, folder, is_trainable=True, low_cpu_mem_usage=True)


def merged_and_unmerged(model, fresh, settings, folder):
    model.merge_adapter()
    model.unmerge_adapter()
    return model


def disabled_while_merged(model, fresh, settings, folder):
    model.merge_adapter()
    with model.disable_adapter():
        model(torch.randn(4, 8))
    return model


def merged_for_good(model, fresh, settings, folder):
    return model.merge_and_unload(safe_merge=True).requires_grad_(True)


WAYS = [built, injected, added, summed, loaded, loaded_on_meta]
WAYS += [merged_and_unmerged, disabled_while_merged, merged_for_good]


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
@pytest.mark.parametrize("prepare", WAYS)
def test_training_goes_on(prepare, decomposition, tmp_path):
    settings = config(decomposition=decomposition)
    model = get_peft_model(base(), settings)
    model.save_pretrained(tmp_path)
    fresh = base()  # made inside, not even its own weights could be trained
    with torch.inference_mode():
        model = prepare(model, fresh, settings, tmp_path)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    before = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.SGD(trained, lr=0.1)
    model(torch.randn(4, 8)).square().sum().backward()
    optimizer.step()
    assert trained and not any(map(torch.equal, trained, before))
    assert not any(parameter.is_inference() for parameter in model.parameters())
