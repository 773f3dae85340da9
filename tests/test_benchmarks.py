"""The commands that print the numbers of the docs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from upstream import skip_where_lora_is_refused

from benchmarks.coverage import architectures, features, verbs
from benchmarks.reporting.markdown import write_generated
from tests.architectures import ARCHITECTURES

ROOT = Path(__file__).parents[1]
VERBS_OF_TRANSFORMERS = {
    features.transformers_add_and_load: ("add_adapter", "save_pretrained", "load_adapter, with a head"),
    features.auto_model_from_adapter: ("from_pretrained, with a head",),
}


@pytest.mark.parametrize("feature", features.FEATURES.values(), ids=features.FEATURES)
@pytest.mark.filterwarnings("ignore")  # torchao and transformers about their own deprecations
def test_fact_has_every_feature_of_the_table(feature):
    if feature is features.trains_on_int8:
        pytest.importorskip("torchao")
    skip_where_lora_is_refused(*VERBS_OF_TRANSFORMERS.get(feature, ()))
    feature("FacT")


FOR_LORA_BY_NAME = {"peft.utils.hotswap.hotswap_adapter", "rescale_adapter_scale", "load_adapter, hotswap"}
EVERY_VERB = {f"{package}: {name}": verb for package, named in verbs.VERBS.items() for name, verb in named.items()}


@pytest.mark.parametrize("name", EVERY_VERB)
def test_no_verb_is_wrong_and_what_is_right_for_lora_is_right_for_fact(name):
    lora, fact = (verbs.outcome(EVERY_VERB[name], method) for method in verbs.COMPARED)
    assert not fact.startswith("wrong"), fact
    assert fact == "right" or lora != "right" or name.partition(": ")[2] in FOR_LORA_BY_NAME, fact


def test_architecture_table_has_the_counts_of_the_paper():
    assert architectures.row("ViT", ARCHITECTURES["ViT"])[3:] == ("72", "144 of 768 x 768", "8,448")


def test_generated_text_replaces_only_what_is_between_its_markers(tmp_path):
    file = tmp_path / "page.md"
    file.write_text("above\n<!-- begin: it -->\nold\n<!-- end: it -->\nbelow\n")
    write_generated(file, "it", "new")
    assert file.read_text() == "above\n<!-- begin: it -->\nnew\n<!-- end: it -->\nbelow\n"
    with pytest.raises(ValueError, match="needs the lines <!-- begin: other -->"):
        write_generated(file, "other", "new")


@pytest.mark.parametrize("room", [file.parent.name for file in (ROOT / "benchmarks").glob("*/__init__.py")])
def test_a_room_imports_itself_and_reporting_only(room):
    code = "".join(file.read_text() for file in (ROOT / "benchmarks" / room).rglob("*.py"))
    assert set(re.findall(r"^ *(?:from|import) benchmarks(?:\.(\w+))?", code, re.M)) <= {room, "reporting"}


@pytest.mark.parametrize(
    "command, expected",
    [
        (["benchmarks.exactness", "--rank", "2"], "| float64 | q, k, v, o | tt |"),
        (["benchmarks.exactness.source_formats"], "| micro-sam | "),
        (["benchmarks.bytes.parameter_counts"], "| ViT-B/16 | FacT-TT | 4 | 8,448 | 8,448 | 33,792 |"),
    ],
)
def test_commands_print_their_tables(command, expected, run_module):
    if command == ["benchmarks.exactness.source_formats"]:
        pytest.importorskip("timm")
        pytest.importorskip("segment_anything")
    assert expected in run_module(*command)


@pytest.mark.slow
def test_the_command_that_compiles_prints_its_table():
    command = [sys.executable, "-m", "benchmarks.exactness.conversion", "--skip-conversion"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "| FacT-TT | 0 | 1 | 0 |\n| FacT-TK | 0 | 1 | 0 |" in result.stdout
