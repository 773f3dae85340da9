"""Adapters that earlier versions saved load to the same bits, for ever."""

import json

import pytest
import torch
from peft import PeftModel
from released.freeze import ADAPTERS, HERE, LABELS, backbone, scores
from safetensors.torch import load_file

pytestmark = pytest.mark.compatibility

FROZEN = sorted(path.parent for path in HERE.glob("*/*/adapter_config.json"))


def read_config(folder):
    config = json.loads((folder / "adapter_config.json").read_text())
    del config["peft_version"]
    return {**config, "target_modules": sorted(config["target_modules"])}  # a set, written in any order


def test_every_kind_of_adapter_is_frozen():
    assert {path.name for path in FROZEN} == set(ADAPTERS)


@pytest.mark.parametrize("folder", FROZEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_adapter_of_an_earlier_version_loads_to_the_same_bits(folder, tmp_path):
    model = PeftModel.from_pretrained(backbone(folder.name), str(folder))
    model.save_pretrained(str(tmp_path))
    saved, again = load_file(folder / "adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    assert saved.keys() == again.keys()
    assert all(torch.equal(saved[key], again[key]) and saved[key].dtype == again[key].dtype for key in saved)

    config, before = (read_config(path) for path in (tmp_path, folder))
    assert {key: config[key] for key in before} == before
    assert "labels" not in ADAPTERS[folder.name] or config["labels"] == LABELS


@pytest.mark.parametrize("folder", FROZEN, ids=lambda folder: f"{folder.parent.name}-{folder.name}")
def test_adapter_of_an_earlier_version_gives_the_same_logits(folder):
    model = PeftModel.from_pretrained(backbone(folder.name), str(folder))
    expected = load_file(folder / "logits.safetensors")["logits"]
    # Float64 to rounding: other versions of torch may add in another order.
    torch.testing.assert_close(scores(model), expected, rtol=1e-10, atol=1e-10)
    assert (scores(backbone(folder.name)) - expected).abs().max() > 1e-2
