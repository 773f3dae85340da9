"""Importing fact_peft changes nothing of other packages but PEFT's list of methods."""

import json

import pytest

pytestmark = pytest.mark.compatibility

SNAPSHOT = """
import importlib, inspect, json, pkgutil, sys, types
import peft, transformers, accelerate, torch
import peft.auto, peft.mapping_func, peft.peft_model, peft.helpers, peft.utils.save_and_load
import peft.tuners.tuners_utils, peft.utils.other, peft.utils.peft_types, peft.utils.hotswap
import transformers.integrations.peft, transformers.modeling_utils, transformers.trainer, transformers.pipelines.base

def members(owner, name, depth=0):
    for key, value in sorted(vars(owner).items()):
        raw = value.__func__ if isinstance(value, (classmethod, staticmethod)) else value
        raw = raw.fget if isinstance(raw, property) else raw
        if callable(raw):
            try:
                signature = str(inspect.signature(raw))
            except (TypeError, ValueError):
                signature = ""
            yield f"{name}.{key}", (id(raw), signature)
        if inspect.isclass(value) and depth == 0 and value.__module__.partition(".")[0] in PACKAGES:
            yield from members(value, f"{name}.{key}", 1)

PACKAGES = {"peft", "transformers", "accelerate", "torch"}

def snapshot(modules):
    return {key: value for module in modules for key, value in members(sys.modules[module], module)}

modules = [
    name for name, module in list(sys.modules.items())
    if name.partition(".")[0] in {"peft", "accelerate"} or name in (
        "transformers.integrations.peft", "transformers.modeling_utils", "transformers.trainer",
        "transformers.pipelines.base", "torch.nn.functional", "torch.nn.modules.module", "torch.nn.modules.linear",
        "torch", "torch.utils.checkpoint",
    )
]
before = snapshot(modules)
import fact_peft
after = snapshot(modules)
changed = sorted(key for key in before.keys() | after.keys() if before.get(key) != after.get(key))
print(json.dumps({"looked at": len(before), "changed": changed}))
"""


@pytest.fixture
def last_line(fork, tmp_path):
    """Of what a program prints that has not imported fact_peft before."""

    def run(code):
        status, output = fork(code, tmp_path)
        assert status == 0, output
        return output.splitlines()[-1]

    return run


def test_no_function_class_or_signature_of_another_package_is_changed(last_line):
    found = json.loads(last_line(SNAPSHOT))
    assert found["looked at"] > 3000
    # The enum member is a string, which is not callable; the maps are dictionaries. So nothing is left.
    assert found["changed"] == []


def test_a_change_would_be_seen(last_line):
    patch = "import fact_peft\nPeftConfig = peft.PeftConfig\nPeftConfig.from_pretrained = classmethod(lambda cls: 1)"
    found = json.loads(last_line(SNAPSHOT.replace("import fact_peft", patch)))
    assert any("PeftConfig" in key and key.endswith("from_pretrained") for key in found["changed"])


def test_config_of_another_method_is_read_by_its_keyword(last_line, tmp_path):
    code = f"""
import fact_peft
from peft import LoraConfig
LoraConfig(r=3).save_pretrained({str(tmp_path)!r})
print(LoraConfig.from_pretrained(pretrained_model_name_or_path={str(tmp_path)!r}).r)
"""
    assert last_line(code) == "3"
