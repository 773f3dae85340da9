"""The training script: what it leaves behind, what it refuses, and what a kill costs."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage
from transformers import AutoModelForImageClassification, SwinConfig, SwinForImageClassification, pipeline

from benchmarks.interruption.killing import largest_difference, run, run_and_kill, whole_checkpoints
from examples import image_classification as script
from fact_peft import load_image_classifier

NAMES = ["ant", "bee"]


def picture(seed: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype="uint8"))


def dataset(labels: list, feature: object = None) -> Dataset:
    features = Features(image=Image(), label=feature or ClassLabel(names=NAMES))
    return Dataset.from_dict({"image": [picture(row) for row in range(len(labels))], "label": labels}, features)


@pytest.fixture(autouse=True)
def offline_and_single_threaded(monkeypatch, tmp_path_factory):
    """For the processes that a test starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.mark.slow
@pytest.mark.parametrize("storage", [None, "int4"])
def test_without_arguments_for_data_it_leaves_a_ready_classifier(storage, tmp_path, monkeypatch):
    options = ["--num_train_epochs", "3", "--orthogonal", "--scales", "1", "10", "--output_dir", "out"]
    options += ["--storage", storage, "--straight_through", "1"] if storage else []
    done = subprocess.run(
        [sys.executable, script.__file__, *options], cwd=tmp_path, env=os.environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    accuracies = re.findall(r"^scale (\d+): validation accuracy (\S+) %$", done.stdout, re.MULTILINE)
    assert [scale for scale, _ in accuracies] == ["1", "10"]
    folder = tmp_path / "out"
    config = json.loads((folder / "adapter_config.json").read_text())
    best = max(accuracies, key=lambda pair: float(pair[1]))  # the first of equals, as the script takes it
    assert (config["scale"], config["init_weights"]) == (float(best[0]), "orthogonal")
    assert config.get("storage") == storage
    with PILImage.open(folder / "picture.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 100
    assert "import fact_peft" in (folder / "README.md").read_text()
    assert list(folder.rglob("model.safetensors")) == [folder / "backbone" / "model.safetensors"]

    # What was printed is what the saved classifier does, through transformers' own pipeline.
    monkeypatch.chdir(tmp_path)
    model, processor = load_image_classifier("out")
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    _, splits = script.upright_and_shifted_digits()
    answers = [answer[0]["label"] for answer in classify([row["image"].convert("RGB") for row in splits["test"]])]
    right = np.mean([answer == str(label) for answer, label in zip(answers, splits["test"]["label"], strict=True)])
    assert f"test accuracy {100 * right:.1f} %" in done.stdout


@pytest.mark.slow
def test_a_killed_run_ends_as_one_that_was_not(tmp_path):
    options = ["--num_train_epochs", "3", "--decomposition", "tk"]
    run(tmp_path / "peaceful", options)
    for attempt in range(5):  # on a busy machine the checkpoint may be whole before the kill
        killed = tmp_path / f"killed{attempt}"
        shutil.copytree(tmp_path / "peaceful" / "backbone", killed / "backbone")
        step = run_and_kill(killed, options, delay=0.0)
        if step not in whole_checkpoints(killed):
            break
    else:
        pytest.fail("was never killed while the checkpoint was written")
    run(killed, options)
    assert largest_difference(tmp_path / "peaceful", killed) == 0.0


@pytest.fixture
def whole(tmp_path):
    """Two whole checkpoints of one run."""
    checkpoints = script.WholeCheckpoints({"rank": 8, "labels": NAMES})
    arguments = script.Recipe(str(tmp_path))
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"12345")
        checkpoints.on_save(arguments, script.TrainerState(global_step=step, is_world_process_zero=True), None)
    return checkpoints, tmp_path


def test_the_newest_whole_checkpoint_is_found(whole):
    checkpoints, folder = whole
    assert checkpoints.last(folder) == str(folder / "checkpoint-10")


@pytest.mark.parametrize("damage", ["unmarked", "truncated", "partly removed"])
def test_a_half_written_checkpoint_is_passed_over(whole, damage):
    checkpoints, folder = whole
    if damage == "unmarked":
        (folder / "checkpoint-10" / "complete.json").unlink()
    elif damage == "truncated":
        (folder / "checkpoint-10" / "optimizer.pt").write_bytes(b"123")
    else:
        (folder / "checkpoint-10" / "optimizer.pt").unlink()
    assert checkpoints.last(folder) == str(folder / "checkpoint-9")


def test_a_checkpoint_of_another_run_is_refused(whole):
    _, folder = whole
    with pytest.raises(ValueError, match=r"checkpoint-10 belongs to another run \(rank: 8 there, 4 here\)"):
        script.WholeCheckpoints({"rank": 4, "labels": NAMES}).last(folder)


def test_labels_outside_the_head_are_refused_with_split_and_row():
    train, test = dataset([0, 1, 1], Value("int64")), dataset([0, 1, -1, 5], Value("int64"))
    names = script.class_names(train, "label")
    assert names == ["0", "1"]
    with pytest.raises(ValueError, match=r"2 of 4 labels of split 'test'.*2 classes.*first is -1 in row 2"):
        script.with_checked_labels("test", test, "label", names)


def test_labels_given_as_text_become_classes_in_alphabetical_order():
    train = dataset(["bee", "ant", "bee"], Value("string"))
    names = script.class_names(train, "label")
    assert names == NAMES
    assert script.with_checked_labels("train", train, "label", names)["label"][:] == [1, 0, 1]
    with pytest.raises(ValueError, match="first is 'cat' in row 1"):
        script.with_checked_labels("test", dataset(["ant", "cat"], Value("string")), "label", names)


def test_a_dataset_without_images_is_refused():
    features = Features(text=Value("string"), label=ClassLabel(names=NAMES))
    with pytest.raises(ValueError, match=r"--image_column was not given: .* has 0 such columns.*text"):
        script.find_columns(script.Arguments(dataset="reviews"), features)


def test_one_of_several_label_columns_has_to_be_named():
    label = ClassLabel(names=NAMES)
    features = Features(image=Image(), fine=label, coarse=label)
    with pytest.raises(ValueError, match=r"--label_column was not given: .* has 2 such columns: fine, coarse"):
        script.find_columns(script.Arguments(dataset="both"), features)
    assert script.find_columns(script.Arguments(label_column="coarse"), features) == ("image", "coarse")
    with pytest.raises(ValueError, match="--label_column breed: "):
        script.find_columns(script.Arguments(label_column="breed"), features)


@pytest.fixture
def image_folder(tmp_path):
    """Six good images of two classes, one that is cut off and one that is text."""
    for row, name in enumerate(NAMES * 3):
        (tmp_path / name).mkdir(exist_ok=True)
        picture(row).save(tmp_path / name / f"{row}.png")
    whole = (tmp_path / "ant" / "0.png").read_bytes()
    (tmp_path / "ant" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "bee" / "text.png").write_text("no picture")
    return tmp_path


def test_corrupt_images_are_counted_and_named_and_the_user_decides(image_folder, caplog):
    args = script.Arguments(dataset="imagefolder", data_dir=str(image_folder))
    train = script.read_splits(args)["train"]
    assert len(train) == 8
    with pytest.raises(ValueError, match=r"2 of 8 images of split 'train' cannot be read:") as error:
        script.readable("train", train, "image", "stop")
    assert "cut.png" in str(error.value) and "text.png" in str(error.value)
    with caplog.at_level("WARNING", logger="transformers"):  # which benchmarks silence
        kept = script.readable("train", train, "image", "skip")
    assert "2 of 8 images" in caplog.text and "cut.png" in caplog.text
    assert len(kept) == 6 and kept["label"][:] == [0, 0, 0, 1, 1, 1]


def test_a_dataset_without_a_train_split_is_refused(monkeypatch):
    monkeypatch.setattr(script, "load_dataset", lambda *args, **kwargs: DatasetDict(test=dataset([0, 1])))
    with pytest.raises(ValueError, match="--dataset cats has no split 'train' but test"):
        script.read_splits(script.Arguments(dataset="cats"))


def test_drop_path_and_labels_reach_a_model_that_has_them(tmp_path):
    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    SwinForImageClassification(SwinConfig(window_size=4, num_labels=7, **shape)).save_pretrained(tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    model = script.make_model(script.Arguments(model=str(tmp_path), drop_path=0.3, rank=2), 0.5, NAMES, seed=0)
    assert model.config.drop_path_rate == 0.3 and plain.config.drop_path_rate != 0.3
    assert model.config.id2label == {0: "ant", 1: "bee"}
    assert model(torch.randn(1, 3, 16, 16)).logits.shape == (1, 2)
    assert model.peft_config["default"].scale == 0.5 and model.peft_config["default"].fact_dropout == 0.1
