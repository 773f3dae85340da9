"""``python -m fact_peft`` on folders made by somebody careless or hostile: one line, and a status that is not 0."""

import json
import re

import pytest
import torch
from backbones import make_backbone
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file

from fact_peft import Adapter, FacTConfig
from fact_peft.method.tensorization import read_layout
from fact_peft.operations.inspection import describe

BLOCK = "vit.layers.0-1: attention.q_proj 32x32"


@pytest.fixture
def folder(tmp_path):
    get_peft_model(make_backbone("vit"), FacTConfig(rank=3, init_weights=False)).save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder, **changes):
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def printed_refusal(run_module, *arguments):
    with pytest.raises(SystemExit) as exit:
        run_module("fact_peft", "show", *arguments)
    message = exit.value.code
    assert isinstance(message, str) and message.startswith("python -m fact_peft: ")  # which exits with status 1
    assert message.isprintable()
    return message


@pytest.mark.parametrize(
    "layout, message",
    [
        (["vit.layers.0-999999999: attention.q_proj 32x32"], "more than 100,000 layers"),
        (["vit.layers.0-99999: " + "q 8x8, " * 1000 + "q 8x8"], "more than 100,000 layers"),
        ([f"vit.layers.{i * 99999}-{i * 99999 + 99998}: q 8x8" for i in range(2)], "more than 100,000 layers"),
        (["vit.layers.0-1: attention.q_proj"], "not of the form"),
        (["vit.layers.0-1: attention.q_proj 32"], "not of the form"),
        (["vit.layers.0-1: attention.q_proj 0x32"], "not of the form"),
        (["vit.layers.0-1: attention.q_proj -32x32"], "not of the form"),
        (["vit.layers.0-1: attention.q_proj 1e9x32"], "not of the form"),
        (["vit.layers.x: attention.q_proj 32x32"], "not of the form"),
        ([f"vit.layers.0-{'9' * 5000}: attention.q_proj 32x32"], "not of the form"),
        ([f"q {'9' * 5000}x8"], "not of the form"),
        (["vit.layers.1-0: "], "not of the form"),
        ([""], "not of the form"),
        ([BLOCK, BLOCK], "lists 'vit.layers.0.attention.q_proj' twice"),
        ([BLOCK], "does not fit its config"),
        ([], "no part of the adapter"),
        (None, "has no layout"),
        (5, "layout=5 is not a list of strings"),
        ([5], r"layout=\[5\] is not a list of strings"),
        (BLOCK, "is not a list of strings"),
        ({"a": 1}, "is not a list of strings"),
    ],
    ids=repr,
)
def test_bad_layout(layout, message, folder, run_module):
    edit(folder, layout=layout)
    assert re.search(message, printed_refusal(run_module, folder))


@pytest.mark.parametrize(
    "content, message",
    [
        ("", "Expecting value"),
        ("[]", "is not the config of an adapter"),
        ("5", "is not the config of an adapter"),
        ("null", "is not the config of an adapter"),
        ("{}", "is not a FacT adapter"),
        ('{"peft_type": "NOTHING"}', "is not the config of an adapter"),
        ('{"peft_type": ["FACT"]}', "is not the config of an adapter"),
        ('{"peft_type": "FACT", "rank": 1e400}', "rank=inf is not an integer"),
        ('{"peft_type": "FACT", "scale": NaN}', "scale=nan is not finite"),
        ("[" * 100_000, "is not the config of an adapter"),
        (b"\xff\xfe\x00", "decode"),
    ],
)
def test_bad_config(content, message, folder, run_module):
    (folder / "adapter_config.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    assert message in printed_refusal(run_module, folder)


def test_missing_paths(folder, tmp_path, run_module):
    assert "neither a folder nor a name on the Hub" in printed_refusal(run_module, tmp_path / "nowhere")
    assert "neither a folder nor a name on the Hub" in printed_refusal(run_module, "no such/folder/x")
    assert "neither a folder nor a name on the Hub" in printed_refusal(run_module, "a\x1b[31mb")
    assert "has no adapter_config.json" in printed_refusal(run_module, tmp_path)
    assert "has no adapter_config.json" in printed_refusal(run_module, folder / "adapter_model.safetensors")
    printed_refusal(run_module, folder, "--map", tmp_path / "nowhere" / "map.png")
    printed_refusal(run_module, folder, "--map", tmp_path / "map.nothing")
    (folder / "adapter_model.safetensors").unlink()
    assert "has no adapter_model.safetensors" in printed_refusal(run_module, folder)


def test_damaged_and_foreign_files(folder, run_module):
    file = folder / "adapter_model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9])
    assert "is not a whole safetensors file" in printed_refusal(run_module, folder)
    save_file({"\x1b[31m\nred": torch.zeros(1)}, file)
    assert r"\x1b[31m" in printed_refusal(run_module, folder)
    get_peft_model(make_backbone("vit"), LoraConfig(target_modules=["q_proj"])).save_pretrained(folder)
    assert "is not a FacT adapter" in printed_refusal(run_module, folder)


def test_names_reach_the_terminal_quoted(folder):
    nasty = ["\x1b[2J\x1b]0;owned\x07", "a\nlabels      forged", "\u202egnirts", "\r", "plain", "Gänseblümchen"]
    edit(folder, labels=nasty[:5], base_model_name_or_path="\x1b[31mred")
    text = describe(Adapter.read(folder))
    assert all(line.isprintable() for line in text.split("\n"))
    assert r"\x1b[2J\x1b]0;owned\x07, a\nlabels      forged, \u202egnirts, \r, plain" in text
    assert r"base        \x1b[31mred" in text
    edit(folder, labels=["Gänseblümchen", "日本"] * 2 + ["e"])
    assert "Gänseblümchen, 日本" in describe(Adapter.read(folder))


def test_names_with_formulas_are_drawn_as_they_are(tmp_path, run_module):
    model = torch.nn.ModuleDict({"$\\frac{": torch.nn.Linear(8, 8)})
    get_peft_model(model, FacTConfig(rank=2, target_modules=["$\\frac{"])).save_pretrained(tmp_path)
    assert "map.png" in run_module("fact_peft", "show", tmp_path, "--map", tmp_path / "map.png")


def test_as_many_layers_as_models_have_are_read():
    shapes, _ = read_layout(["model.layers.0-999: " + ", ".join(f"experts.{i}.up 8x8" for i in range(99))])
    assert len(shapes) == 99_000
