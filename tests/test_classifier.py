"""A classifier saved as one thing comes back as one thing: adapter, head, labels, image processor, model card."""

import json
import re
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES
from backbones import NUM_LABELS, image_processor, images, logits, make_backbone
from huggingface_hub import ModelCard
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    DeiTForImageClassificationWithTeacher,
    PreTrainedModel,
    ViTImageProcessor,
)
from upstream import skip_where_lora_is_refused

from fact_peft import (
    Adapter,
    FacTConfig,
    hotswap_adapter,
    load_image_classifier,
    push_image_classifier,
    save_image_classifier,
)
from fact_peft.method.decomposition import DECOMPOSITIONS

pytestmark = pytest.mark.compatibility

NAMES = ["cat", "dog", "cat", "owl"]  # two classes of one name, as ImageNet has with its cranes
CLASSIFIERS = [name for name, entry in ARCHITECTURES.items() if "ForImageClassification" in entry.model]


def own_processor() -> ViTImageProcessor:
    return image_processor(image_mean=[0.1, 0.2, 0.3])


def base(folder: Path, labels: list[str] | None = NAMES, seed: int = 0) -> PreTrainedModel:
    """The tiny ViT, saved with `NUM_LABELS` labels, loaded from `folder` with a random head for others."""
    make_backbone("vit").save_pretrained(folder)
    head = {"id2label": dict(enumerate(labels)), "label2id": {}, "ignore_mismatched_sizes": True} if labels else {}
    torch.manual_seed(seed)
    return AutoModelForImageClassification.from_pretrained(folder, **head)


def adapted(folder: Path, labels: list[str] | None = NAMES, **settings) -> PeftModel:
    model = base(folder, labels, seed=1)
    return get_peft_model(model, FacTConfig(**{"rank": 4, "init_weights": False, **settings})).eval()


@torch.no_grad()
def scores(model: nn.Module) -> torch.Tensor:
    return logits(model.eval(), images())


def saved_labels(folder: Path) -> list[str] | None:
    return json.loads((folder / "adapter_config.json").read_text())["labels"]


# Labels.


def test_labels_of_the_model_are_saved_in_the_order_of_the_logits(tmp_path):
    adapted(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    assert saved_labels(tmp_path / "adapter") == NAMES


def test_labels_the_model_gets_after_the_adapter_are_saved(tmp_path):
    model = get_peft_model(make_backbone("vit"), FacTConfig())
    model.config.id2label = dict(enumerate("abcde"))
    Adapter.of(model).write(tmp_path)
    assert saved_labels(tmp_path) == list("abcde")


def test_labels_are_not_lost_on_a_model_that_knows_none(tmp_path):
    model = get_peft_model(make_backbone("vit"), FacTConfig(labels=list("abcde")))
    model.save_pretrained(tmp_path / "first")
    PeftModel.from_pretrained(make_backbone("vit"), tmp_path / "first").save_pretrained(tmp_path / "second")
    assert saved_labels(tmp_path / "second") == list("abcde")


def test_one_config_serves_models_with_other_labels(tmp_path):
    config = FacTConfig()
    first = get_peft_model(base(tmp_path, NAMES), config)
    second = get_peft_model(base(tmp_path, ["one", "two"]), config)
    assert first.peft_config["default"].labels == NAMES
    assert second.peft_config["default"].labels == ["one", "two"]
    assert config.labels is None and config.target_modules is None and config.layout is None


@pytest.mark.parametrize("settings", [{"modules_to_save": []}, {"modules_to_save": ["layernorm"]}])
def test_adapter_without_the_head_has_no_labels(settings):
    assert get_peft_model(make_backbone("vit"), FacTConfig(**settings)).peft_config["default"].labels is None


def test_model_that_names_no_labels_gives_none():
    assert get_peft_model(make_backbone("timm"), FacTConfig()).peft_config["default"].labels is None


@pytest.mark.parametrize("backbone", ["vit", "swin", "timm"])
def test_labels_that_do_not_fit_the_head_are_refused_and_nothing_changes(backbone):
    model = make_backbone(backbone)
    before = str(model)
    config = FacTConfig(labels=["one", "two"])
    with pytest.raises(ValueError, match=rf"2 labels.*has {NUM_LABELS}\b.*num_labels=2"):
        get_peft_model(model, config)
    assert str(model) == before and config == FacTConfig(labels=["one", "two"])


@pytest.mark.parametrize("labels", ["abc", [1, 2], ("a", "b")])
def test_labels_of_another_type_are_refused(labels):
    with pytest.raises(ValueError, match=r"labels=.*list of strings"):
        FacTConfig(labels=labels)


@pytest.mark.parametrize("way", ["peft", "transformers"])
def test_model_with_another_number_of_labels_is_refused_before_it_changes(way, tmp_path):
    adapted(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    model = make_backbone("vit")
    before, numbers = str(model), {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"4 labels.*has {NUM_LABELS}\b.*num_labels=4.*load_image_classifier"):
        if way == "peft":
            PeftModel.from_pretrained(model, tmp_path / "adapter")
        else:
            skip_where_lora_is_refused("load_adapter")
            model.load_adapter(str(tmp_path / "adapter"))
    assert str(model) == before
    assert all(torch.equal(value, numbers[name]) for name, value in model.state_dict().items())


def test_head_of_another_size_is_refused_also_without_labels(tmp_path):
    adapted(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "labels": None}))
    with pytest.raises(ValueError, match=rf"\(4, 32\) in the file, \({NUM_LABELS}, 32\) in the model(?s:.*)num_labels"):
        PeftModel.from_pretrained(make_backbone("vit"), tmp_path / "adapter")


def test_hotswap_exchanges_the_labels_too(tmp_path):
    adapted(tmp_path / "base", ["w", "x", "y", "z"]).save_pretrained(tmp_path / "other")
    model = adapted(tmp_path / "base")
    hotswap_adapter(model, tmp_path / "other")
    assert model.peft_config["default"].labels == ["w", "x", "y", "z"]
    assert [model.config.id2label[index] for index in range(4)] == ["w", "x", "y", "z"]  # of pipelines
    assert model.config.label2id["z"] == 3
    model.save_pretrained(tmp_path / "again")
    assert saved_labels(tmp_path / "again") == ["w", "x", "y", "z"]


@pytest.mark.parametrize("other, expected", [(NAMES, NAMES), (["w", "x", "y", "z"], None)])
def test_sum_of_adapters_keeps_labels_on_which_they_agree(other, expected, tmp_path):
    model = adapted(tmp_path, labels=None)
    for name, labels in [("first", [*NAMES, "fox"]), ("second", [*other, "fox"])]:
        model.add_adapter(name, FacTConfig(rank=2, labels=labels))
    model.add_weighted_adapter(["first", "second"], [0.5, 0.5], "sum")
    nobody = [f"LABEL_{index}" for index in range(NUM_LABELS)]
    assert model.peft_config["sum"].labels == ([*expected, "fox"] if expected else nobody)


# Saving and loading.


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_every_image_classifier_comes_back_bit_equal(name, tmp_path):
    entry = ARCHITECTURES[name]
    torch.manual_seed(0)
    backbone = entry.build()
    backbone.save_pretrained(tmp_path / "base")
    head = {"num_labels": len(NAMES), "id2label": dict(enumerate(NAMES)), "label2id": {}}
    model = type(backbone).from_pretrained(tmp_path / "base", ignore_mismatched_sizes=True, **head)
    model = get_peft_model(model, FacTConfig(rank=2, init_weights=False)).eval()
    save_image_classifier(model, own_processor(), tmp_path / "adapter")
    loaded, processor = load_image_classifier(tmp_path / "adapter")
    inputs = entry.inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert loaded(**inputs).logits.shape[-1] == len(NAMES)
    assert loaded.config.id2label == dict(enumerate(NAMES)) and not loaded.training
    assert processor.to_dict() == own_processor().to_dict()


def test_class_is_the_one_that_was_trained_also_if_the_base_is_saved_as_another(tmp_path):
    ARCHITECTURES["DeiT"].build().deit.save_pretrained(tmp_path / "base")
    backbone = DeiTForImageClassificationWithTeacher.from_pretrained(tmp_path / "base", num_labels=3)
    model = get_peft_model(backbone, FacTConfig(rank=2, init_weights=False)).eval()
    save_image_classifier(model, own_processor(), tmp_path / "adapter")
    loaded, _ = load_image_classifier(tmp_path / "adapter")
    inputs = ARCHITECTURES["DeiT"].inputs()
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize("kind", ["model", "folder", "name"])
def test_base_model_can_be_given(kind, tmp_path, monkeypatch):
    model = adapted(tmp_path / "base")
    save_image_classifier(model, own_processor(), tmp_path / "adapter", base_model="nobody/has-this")
    assert model.peft_config["default"].base_model_name_or_path == str(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    given = {"model": base(tmp_path / "base", list("wxyz")), "folder": tmp_path / "base", "name": "base"}[kind]
    loaded, _ = load_image_classifier(tmp_path / "adapter", base_model=given)
    assert torch.equal(scores(loaded), scores(model))
    assert loaded.config.id2label == dict(enumerate(NAMES))


def test_adapter_with_a_name_is_saved_as_the_classifier(tmp_path):
    model = adapted(tmp_path / "base")
    model.add_adapter("birds", FacTConfig(rank=2, init_weights=False, scale=3.0))
    model.set_adapter("birds")
    save_image_classifier(model, own_processor(), tmp_path / "adapter")
    loaded, _ = load_image_classifier(tmp_path / "adapter")
    assert torch.equal(scores(loaded), scores(model))


def test_adapter_that_the_tuner_has_active_is_saved(tmp_path):
    model = adapted(tmp_path / "base")
    model.add_adapter("birds", FacTConfig(rank=2, init_weights=False, scale=3.0))
    model.base_model.set_adapter("birds")  # PEFT's own wrapper still names "default"
    save_image_classifier(model, own_processor(), tmp_path / "adapter")
    assert FacTConfig.from_pretrained(tmp_path / "adapter").rank == 2


def test_head_of_the_base_serves_an_adapter_without_one(tmp_path):
    model = adapted(tmp_path / "base", labels=None, modules_to_save=[])
    save_image_classifier(model, own_processor(), tmp_path / "adapter")
    loaded, _ = load_image_classifier(tmp_path / "adapter")
    assert torch.equal(scores(loaded), scores(model))


def test_without_a_saved_image_processor_that_of_the_base_is_taken(tmp_path):
    adapted(tmp_path / "base").save_pretrained(tmp_path / "adapter")
    own_processor().save_pretrained(tmp_path / "base")
    _, processor = load_image_classifier(tmp_path / "adapter")
    assert processor.to_dict() == own_processor().to_dict()


def test_files_are_those_of_peft_and_transformers(tmp_path):
    model = adapted(tmp_path / "base")
    save_image_classifier(model, own_processor(), tmp_path / "adapter")
    assert torch.equal(scores(PeftModel.from_pretrained(base(tmp_path / "base"), tmp_path / "adapter")), scores(model))
    assert AutoImageProcessor.from_pretrained(tmp_path / "adapter").to_dict() == own_processor().to_dict()


def test_adapter_without_a_base_is_refused(tmp_path):
    save_image_classifier(get_peft_model(make_backbone("vit"), FacTConfig()), own_processor(), tmp_path)
    with pytest.raises(ValueError, match="base_model="):
        load_image_classifier(tmp_path)


def test_adapter_of_another_method_is_refused(tmp_path):
    model = get_peft_model(base(tmp_path / "base"), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ValueError, match="LORA"):
        save_image_classifier(model, own_processor(), tmp_path / "fact")
    assert not (tmp_path / "fact").exists()
    model.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match="LORA"):
        load_image_classifier(tmp_path / "lora")


def test_model_without_peft_around_it_is_refused(tmp_path):
    with pytest.raises(ValueError, match="model is a ViTForImageClassification"):
        save_image_classifier(make_backbone("vit"), own_processor(), tmp_path / "adapter")


def test_folder_that_does_not_exist_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither a folder nor a name on the Hub"):
        load_image_classifier(tmp_path / "nothing")
    for read in (load_image_classifier, Adapter.read):
        with pytest.raises(ValueError, match=r"'\./some/adapter' is neither a folder nor a name on the Hub"):
            read("./some/adapter")  # "some/adapter" could be on the Hub


def assert_base_is_missing_elsewhere(library: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the adapter in `folder`, which is the working directory."""
    load_image_classifier("adapter")
    (folder / "elsewhere").mkdir()
    monkeypatch.chdir(folder / "elsewhere")
    with pytest.raises(ValueError, match=rf"not found at './base'; pass base_model=.*{library} model"):
        load_image_classifier(folder / "adapter")
    with pytest.raises(ValueError, match="not found at '/no/folder'"):
        load_image_classifier(folder / "adapter", base_model="/no/folder")
    load_image_classifier(folder / "adapter", base_model=folder / "base")


def test_base_that_is_no_folder_here_is_said_to_be_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image_classifier(adapted(Path("base")), own_processor(), "adapter")
    assert_base_is_missing_elsewhere("transformers", tmp_path, monkeypatch)


@pytest.mark.parametrize("value", [None, 3, {}, {"size": 224}])
def test_what_is_no_image_processor_is_refused_and_nothing_is_written(value, tmp_path):
    vit = get_peft_model(make_backbone("timm" if value is None else "vit"), FacTConfig(rank=2))
    for save in (save_image_classifier, push_image_classifier):
        with pytest.raises(ValueError, match=rf"image_processor={re.escape(repr(value))} .*resolve_input_data_config"):
            save(vit, value, str(tmp_path / "adapter"), base_model="me/base")
    assert not (tmp_path / "adapter").exists()


# The model card.


def card_of(folder: Path) -> ModelCard:
    return ModelCard((folder / "README.md").read_text())


@pytest.mark.parametrize("decomposition", DECOMPOSITIONS)
def test_card_counts_what_peft_trains_and_the_file_holds(decomposition, tmp_path):
    model = adapted(tmp_path / "base", decomposition=decomposition, bias="all")
    save_image_classifier(model, own_processor(), tmp_path / "adapter", {"accuracy": 0.93125, "images": 12345})
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    trainable, _ = model.get_nb_trainable_parameters()
    factors = sum(value.numel() for name, value in load_file(file).items() if "factors" in name)
    text = card_of(tmp_path / "adapter").text
    assert f"| parameters of the factors | {factors:,} |" in text
    assert f"| other trained parameters (head: classifier) | {trainable - factors:,} |" in text
    size = sum((file.parent / name).stat().st_size for name in (file.name, "adapter_config.json"))
    assert f"| bytes on disk, head and config included | {size:,} |" in text
    assert "| accuracy | 0.93125 |\n| images | 12345 |" in text
    assert "`cat`, `dog`, `cat`, `owl`" in text


def test_card_names_no_local_folder(tmp_path):
    save_image_classifier(adapted(tmp_path / "base"), own_processor(), tmp_path / "adapter")
    assert str(tmp_path) not in card_of(tmp_path / "adapter").content
    assert "base_model" not in card_of(tmp_path / "adapter").data.to_dict()


def test_name_of_a_folder_here_is_no_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_image_classifier(adapted(tmp_path / "base"), own_processor(), tmp_path / "adapter", base_model="base")
    assert "base_model" not in card_of(tmp_path / "adapter").data.to_dict()


def test_card_is_brought_up_to_date_around_what_a_user_wrote(tmp_path):
    model = adapted(tmp_path / "base")
    save_image_classifier(model, own_processor(), tmp_path / "adapter", {"accuracy": 0.5}, base_model="me/old")
    card = card_of(tmp_path / "adapter")
    card.text = f"Above.\n{card.text}\nBelow.\n"
    card.data.license = "mit"
    card.data.tags = [*card.data.tags, "birds", 2024]
    card.save(tmp_path / "adapter" / "README.md")
    save_image_classifier(model, own_processor(), tmp_path / "adapter", {"accuracy": 0.75}, base_model="me/new")
    card = card_of(tmp_path / "adapter")
    assert card.data.license == "mit" and card.data.base_model == "me/new"
    assert card.data.tags == ["2024", "base_model:adapter:me/new", "birds", "fact", "transformers"]
    assert card.text.strip().startswith("Above.") and card.text.strip().endswith("Below.")
    assert card.text.count("| accuracy |") == 1 and "| accuracy | 0.75 |" in card.text
    before = card.content
    save_image_classifier(model, own_processor(), tmp_path / "adapter", {"accuracy": 0.75}, base_model="me/new")
    assert card_of(tmp_path / "adapter").content == before


def test_card_a_user_wrote_keeps_its_text(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n\nAll mine.\n")
    save_image_classifier(adapted(tmp_path / "base"), own_processor(), tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert card.text.strip() == "# Mine\n\nAll mine."
    assert card.data.license == "mit" and card.data.library_name == "peft"


def test_blank_form_that_peft_leaves_is_replaced(tmp_path):
    model = adapted(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    card = card_of(tmp_path / "adapter")
    assert "[More Information Needed]" in card.text and card.data.base_model == str(tmp_path / "base")
    card.data.license = "mit"
    card.save(tmp_path / "adapter" / "README.md")
    save_image_classifier(model, own_processor(), tmp_path / "adapter")
    text = (tmp_path / "adapter" / "README.md").read_text()
    assert "[More Information Needed]" not in text and str(tmp_path) not in text and "# adapter" in text
    assert card_of(tmp_path / "adapter").data.license == "mit"


def test_card_of_a_thousand_classes_lists_a_hundred(tmp_path):
    labels = [f"class{index}" for index in range(1000)]
    save_image_classifier(adapted(tmp_path / "base", labels), own_processor(), tmp_path / "adapter")
    text = card_of(tmp_path / "adapter").text
    assert text.count("`class") == 100 and "and 900 more" in text and "num_labels=1000" in text
