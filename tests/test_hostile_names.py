"""Names that somebody else chose: in a card they are text, in its code they are strings, and they never pile up."""

import ast
import re

import pytest
import torch
from backbones import image_processor, make_backbone
from huggingface_hub import ModelCard
from peft import get_peft_model
from transformers import AutoModelForImageClassification

from fact_peft import FacTConfig, push_image_classifier, save_image_classifier
from fact_peft.adapter.names import as_code, for_markdown, for_python, for_terminal
from fact_peft.sharing.card import BEGIN, END

NASTY = [
    "<img src=x onerror=alert(1)>",
    "</code><script>alert(1)</script>",
    "a`<b>`b``c",
    "`",
    "",
    "  ",
    "\n\n# forged\n\n<b>",
    f"\n{END}\n",
    END,
    BEGIN,
    "a | b \\| c",
    "[click](javascript:alert(1))",
    "![x](http://x)",
    '"); __import__("os").system("true") #',
    "'''\"\"\"\\",
    "```\n</pre>",
    "\x1b[31mred\x07",
    "\u202egnirts",
    "&lt;&amp;",
    "\ud800",
    "\U0001d4a2änse",
]


@pytest.fixture(autouse=True)
def no_hub(monkeypatch):
    """PEFT looks for the config of the base model there when it saves."""
    monkeypatch.setattr("peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *args, **kwargs: False)


def adapted(**settings):
    return get_peft_model(make_backbone("vit"), FacTConfig(**{"rank": 2, "init_weights": False, **settings}))


def card(folder):
    return ModelCard((folder / "README.md").read_text(encoding="utf-8"))


def outside_code(text):
    """Markdown without code blocks and code spans, as CommonMark finds them: a run of backticks to the next such."""
    text = re.sub(r"^```python\n.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"(?<!`)(`+)(?!`)(.*?)(?<!`)\1(?!`)", "", text, flags=re.DOTALL)


def snippets(text):
    return [ast.parse(code) for code in re.findall(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)]


def calls(tree):
    return {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}


@pytest.mark.parametrize("name", [name for name in NASTY if name != "\ud800"], ids=ascii)
def test_a_label_is_text_and_the_card_does_not_grow(name, tmp_path):
    model = adapted(labels=["cat", name, "dog", name, "owl"])
    for metric in (name, name):
        save_image_classifier(model, image_processor(), tmp_path / "adapter", {metric: 0.5})
    first = card(tmp_path / "adapter").content
    save_image_classifier(model, image_processor(), tmp_path / "adapter", {name: 0.5})
    text = card(tmp_path / "adapter").content
    assert text == first and text.splitlines().count(END) == text.splitlines().count(BEGIN) == 1
    assert text.count("## Labels") == 1
    visible = outside_code(text.partition("---\n")[2].partition("---\n")[2])
    assert set(re.findall(r"<[^>]*>", visible)) == {BEGIN, END}
    assert "](javascript" not in visible and "](http://x" not in visible
    assert all(character.isprintable() or character == "\n" for character in text)
    rows = [line for line in text.splitlines() if line.startswith("|") and "0.5" in line]
    assert len(rows) == 1 and len(re.findall(r"(?<!\\)\|", rows[0].replace("\\\\", ""))) == 3


@pytest.mark.parametrize("name", [name for name in NASTY if name and name != "\ud800"], ids=ascii)
def test_names_in_the_code_of_a_card_are_strings(name, tmp_path):
    folder = tmp_path / name.replace("/", "_")
    model = adapted(revision=name)
    model.peft_config["default"].base_model_name_or_path = "me/base"
    save_image_classifier(model, image_processor(), folder)
    first, second = snippets(card(folder).text)
    assert calls(first) == {"load_image_classifier", "pipeline", "classify", "print"}
    assert calls(second) == {"ViTForImageClassification.from_pretrained", "PeftModel.from_pretrained"}
    strings = {node.value for tree in (first, second) for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    assert name in strings and folder.resolve().name in strings


@pytest.mark.parametrize("name", NASTY, ids=ascii)
def test_each_quotation_is_one_of_its_kind(name):
    assert ast.literal_eval(for_python(name)) == name and "\n" not in for_python(name)
    assert for_terminal(name).isprintable()
    assert not outside_code(as_code(name)) and "\n" not in as_code(name)
    assert not re.search(r"(?<!\\)[<>`*|\[\]]", for_markdown(name).replace("\\\\", ""))
    assert for_markdown("vit-base-patch16, 224.") == "vit-base-patch16, 224."


@pytest.mark.parametrize(
    "metrics",
    [{"accuracy": "0.5"}, {"accuracy": None}, {"accuracy": [0.5]}, {3: 0.5}, {"accuracy": torch.zeros(2)}, {"a": 1j}],
)
def test_metrics_that_are_no_numbers_are_noticed_before_anything_is_saved(metrics, tmp_path):
    save_image_classifier(adapted(), image_processor(), tmp_path / "adapter", {"accuracy": torch.tensor(0.25)})
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    with pytest.raises(ValueError, match=r"metrics has .*which is no number under a name"):
        save_image_classifier(adapted(scale=2.0), image_processor(), tmp_path / "adapter", metrics)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    with pytest.raises(ValueError, match="metrics has"):
        push_image_classifier(adapted(), image_processor(), "me/x", metrics=metrics, base_model="me/base")
    with pytest.raises(ValueError, match="metrics has"):
        save_image_classifier(adapted(), image_processor(), tmp_path / "other", metrics)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("save", [save_image_classifier, push_image_classifier])
def test_of_two_active_adapters_none_is_saved_as_if_it_were_both(save, tmp_path):
    model = adapted(modules_to_save=[])
    model.add_adapter("other", FacTConfig(rank=2, modules_to_save=[], init_weights=False))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(
        ValueError, match=r"2 active adapters, \['default', 'other'\].*set_adapter.*add_weighted_adapter"
    ):
        save(model, image_processor(), str(tmp_path / "adapter"), base_model="me/base")
    assert not (tmp_path / "adapter").exists()
    model.add_weighted_adapter(["default", "other"], [1.0, 1.0], "sum")
    model.set_adapter("sum")
    save_image_classifier(model, image_processor(), tmp_path / "adapter")


@pytest.mark.parametrize("name", ["base", "me/base"])
def test_a_relative_folder_is_no_hub_id_wherever_one_is(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    make_backbone("vit").save_pretrained(name)
    model = get_peft_model(AutoModelForImageClassification.from_pretrained(name), FacTConfig(rank=2))
    assert model.peft_config["default"].base_model_name_or_path == f"./{name}"
    injected = AutoModelForImageClassification.from_pretrained(name)
    injected.add_adapter(FacTConfig(rank=2))
    assert injected.peft_config["default"].base_model_name_or_path == f"./{name}"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    save_image_classifier(model, image_processor(), "adapter")
    saved = card(tmp_path / "elsewhere" / "adapter")
    assert "base_model" not in saved.data.to_dict() and not {f'"{name}"', f"[{name}]"} & set(
        re.findall(r"\"[^\"]*\"|\[[^]]*\]", saved.text)
    )
    with pytest.raises(ValueError, match="is not on the Hub"):
        push_image_classifier(model, image_processor(), "me/adapter")


def test_a_name_that_is_no_folder_stays_as_it_is():
    model = make_backbone("vit")
    model.name_or_path = "google/vit-base"
    assert get_peft_model(model, FacTConfig(rank=2)).peft_config["default"].base_model_name_or_path == "google/vit-base"
