"""The training script: what it leaves behind, what it refuses, and what a kill costs."""

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, List, Value
from transformers import (
    AutoModelForImageClassification,
    EvalPrediction,
    SwinConfig,
    SwinForImageClassification,
    TrainerState,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    pipeline,
)
from transformers.trainer_utils import PredictionOutput

import fact_peft
from fact_peft import FacTConfig, load_image_classifier

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

import command_line
from classification import data as image_data
from classification import digits as shifted_digits
from classification import metrics as image_metrics
from classification.checkpoints import WholeCheckpoints
from PIL import Image as PILImage
from rgb import to_rgb
from sklearn.metrics import average_precision_score, confusion_matrix, f1_score
from sklearn.utils.class_weight import compute_class_weight

from benchmarks.interruption.killing import largest_difference, run, run_and_kill, whole_checkpoints
from examples import image_classification as script

NAMES = ["ant", "bee"]
COLOURS = {"red": (220, 40, 40), "green": (40, 200, 60), "blue": (50, 60, 210)}


def picture(seed: int) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype="uint8"))


def dataset(labels: list, feature: object = None) -> Dataset:
    features = Features(image=Image(), label=feature or ClassLabel(names=NAMES))
    return Dataset.from_dict({"image": [picture(row) for row in range(len(labels))], "label": labels}, features)


def colours(per_class: int, seed: int) -> Dataset:
    """Noisy images of three colours."""
    rng = np.random.default_rng(seed)
    labels = [label for _ in range(per_class) for label in range(3)]
    pixels = [np.array([*COLOURS.values()])[label] + rng.normal(0, 30, (20, 24, 3)) for label in labels]
    images = [PILImage.fromarray(array.clip(0, 255).astype("uint8")) for array in pixels]
    features = Features(image=Image(), label=ClassLabel(names=[*COLOURS]))
    return Dataset.from_dict({"image": images, "label": labels}, features)


@pytest.fixture(autouse=True)
def offline_and_single_threaded(monkeypatch, tmp_path_factory):
    """For the processes that a test starts."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Folder with a tiny ViT and the splits of `colours` as parquet files."""
    folder = tmp_path_factory.mktemp("source")
    shape = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "intermediate_size": 64}
    torch.manual_seed(0)
    config = ViTConfig(num_hidden_layers=2, num_attention_heads=2, **shape)
    ViTForImageClassification(config).vit.save_pretrained(folder / "vit")
    size = {"height": 16, "width": 16}
    ViTImageProcessor(size={"height": 18, "width": 18}, do_center_crop=True, crop_size=size).save_pretrained(
        folder / "vit"
    )
    colours(12, 0).to_parquet(folder / "train.parquet")
    colours(6, 1).to_parquet(folder / "validation.parquet")
    colours(7, 2).to_parquet(folder / "test.parquet")
    return folder


@pytest.fixture
def train(source, tmp_path, monkeypatch, capsys):
    """Runs the script on `source` in this process, into ``tmp_path / "out"``; what it printed."""

    def train(*options, data=source):
        files = [f"{file.stem}={file}" for file in sorted(data.glob("*.parquet"))]
        command = ["--model", str(source / "vit"), "--dataset", "parquet", "--data_files", *files, "--use_cpu"]
        command += ["--output_dir", str(tmp_path / "out"), "--report_to", "none", "--disable_tqdm", "True"]
        command += ["--num_train_epochs", "2", "--per_device_train_batch_size", "12", *options]
        monkeypatch.setattr("sys.argv", ["image_classification.py", *command])
        script.main()
        return capsys.readouterr().out

    return train


# The recipe


def test_the_defaults_are_those_of_the_library(source):
    assert script.make_config(script.Arguments(), None) == FacTConfig()
    assert script.rate_of_width(str(source / "vit")) == 0.8 / 32


def test_the_papers_recipe_is_one_flag(monkeypatch):
    def config_and_rate(*options):
        monkeypatch.setattr("sys.argv", ["script", "--paper", *options])
        args, training = command_line.parse(script.Arguments, script.Recipe, defaults=script.PAPER)
        return script.make_config(args, None), training.learning_rate, training.num_train_epochs, args.augment

    paper = FacTConfig(rank=8, init_weights=True, fact_dropout=0.1)
    assert config_and_rate() == (paper, 1e-3, 100, "none")
    assert config_and_rate("--rank", "4")[0].rank == 4


def test_what_is_saved_is_what_was_reported(train, source, tmp_path, monkeypatch):
    printed = train("--target_modules", "q_proj", "v_proj", "--augment", "randaugment", "--mixup", "0.2")
    model, processor = load_image_classifier(tmp_path / "out")
    config = model.peft_config["default"]
    assert (config.target_modules, config.rank) == ({"q_proj", "v_proj"}, 16)
    test = colours(7, 2)
    pixels = processor([image.convert("RGB") for image in test["image"]], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        predicted = model(pixel_values=pixels).logits.argmax(-1).tolist()
    expected = confusion_matrix(test["label"][:], predicted, labels=range(3))
    table = pd.read_csv(tmp_path / "out" / "confusion.csv", index_col="true class")
    assert [*table.columns] == [*table.index] == [*COLOURS]
    assert np.array_equal(table.to_numpy(), expected)
    accuracy = np.trace(expected) / len(test)
    assert f"test accuracy {100 * accuracy:.1f} %" in printed
    report = (tmp_path / "out" / "report.txt").read_text()
    macro_f1 = f1_score(test["label"][:], predicted, average="macro", zero_division=0)
    assert re.search(rf"accuracy +{accuracy:.3f}", report)
    assert re.search(rf"macro avg.* {macro_f1:.3f} +21", report)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "test accuracy" in card and "validation accuracy" in card
    with PILImage.open(tmp_path / "out" / "picture.png") as drawn:
        assert len(drawn.convert("RGB").getcolors(1 << 20)) > 100


def test_training_images_are_augmented_and_others_are_not(source):
    processor = ViTImageProcessor.from_pretrained(source / "vit")
    images = colours(4, 0)
    columns = ("image", "label")
    plain = image_data.prepared(images, columns, processor, 3)
    expected = processor(images[:]["image"], return_tensors="pt")["pixel_values"]
    assert torch.equal(torch.stack(plain[:]["pixel_values"]), expected)
    for augment in ("crop", "randaugment"):
        torch.manual_seed(0)
        changed = image_data.prepared(images, columns, processor, 3, augment)
        first, second = (torch.stack(changed[:]["pixel_values"]) for _ in range(2))
        assert first.shape == expected.shape and not torch.equal(first, second)
        assert torch.stack(changed[:]["labels"]).tolist() == images["label"][:]


@pytest.mark.parametrize("mix", ["mixup", "cutmix"])
def test_images_and_labels_are_mixed_by_the_same_share(source, mix):
    processor = ViTImageProcessor.from_pretrained(source / "vit")
    black, white = (PILImage.new("RGB", (18, 18), colour) for colour in ("black", "white"))
    features = Features(image=Image(), label=ClassLabel(names=NAMES))
    images = Dataset.from_dict({"image": [black, white], "label": [0, 1]}, features)
    torch.manual_seed(0)
    rows = image_data.prepared(images, ("image", "label"), processor, 2, **{mix: 1.0})[:]
    for pixels, label in zip(rows["pixel_values"], rows["labels"], strict=True):
        assert 0 < label[0] < 1
        torch.testing.assert_close((pixels.mean() + 1) / 2, label[1])  # the processor maps black to -1, white to 1


def test_class_weights_are_those_of_scikit_learn():
    labels = [0, 0, 0, 1, 2, 2]
    weights = image_data.balanced_weights(dataset(labels, ClassLabel(names=[*COLOURS])), "label", 3)
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    torch.testing.assert_close(weights, torch.tensor(expected, dtype=torch.float32))
    several = dataset([[0], [0, 1], [], [0]], List(ClassLabel(names=NAMES)))
    torch.testing.assert_close(image_data.balanced_weights(several, "label", 2), torch.tensor([1 / 3, 3]))


def test_class_weights_of_a_class_without_images_and_of_a_label_of_all_images():
    # Label smoothing would else pull towards the empty class.
    empty = dataset([1, 1, 2], ClassLabel(names=[*COLOURS]))
    assert image_data.balanced_weights(empty, "label", 3).tolist() == [0.0, 0.5, 1.0]
    always = dataset([[0], [0, 1]], List(ClassLabel(names=NAMES)))
    assert image_data.balanced_weights(always, "label", 2).tolist() == [0.5, 1.0]


def test_the_report_has_the_macro_f1_of_the_scores(tmp_path):
    prediction = PredictionOutput(np.array([0, 1, 1, 0]), np.array([0, 1, 0, 0]), {})  # nothing of the third class
    image_metrics.write_reports(tmp_path, prediction, [*COLOURS], [])
    macro_f1 = image_metrics.scores_of(prediction)["macro_f1"]
    line = next(line for line in (tmp_path / "report.txt").read_text().splitlines() if "macro avg" in line)
    assert float(line.split()[-2]) == pytest.approx(macro_f1, abs=5e-4)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_the_loss_is_that_of_transformers(problem, source, tmp_path):
    labels = torch.tensor([0, 1, 1]) if problem.startswith("single") else torch.tensor([[0.0, 1], [1, 1], [0, 0]])
    model = AutoModelForImageClassification.from_pretrained(source / "vit", num_labels=2, problem_type=problem)
    trainer = image_metrics.ImageTrainer(
        model.eval(),
        script.Recipe(
            str(tmp_path),
            use_cpu=True,
            eval_strategy="no",
            load_best_model_at_end=False,
            learning_rate=1e-3,
            report_to="none",
        ),
    )
    pixels = torch.randn(3, 3, 16, 16)
    loss = trainer.compute_loss(model, {"pixel_values": pixels, "labels": labels})
    torch.testing.assert_close(loss, model(pixel_values=pixels, labels=labels).loss)
    trainer.class_weights = torch.tensor([1.0, 1e6])  # the other class no longer counts
    if problem.startswith("single"):
        rare = trainer.compute_loss(model, {"pixel_values": pixels, "labels": labels})
        expected = model(pixel_values=pixels[1:], labels=labels[1:]).loss
        torch.testing.assert_close(rare, expected, rtol=1e-4, atol=0)


def test_a_column_of_lists_of_labels_makes_a_multi_label_classifier(train, tmp_path):
    features = Features(image=Image(), label=List(ClassLabel(names=[*COLOURS])))
    for name, seed in (("train", 0), ("test", 1)):
        rows = colours(12, seed)
        several = [[label, (label + 1) % 3] if row % 2 else [label] for row, label in enumerate(rows["label"])]
        rows = Dataset.from_dict({"image": rows["image"][:], "label": several}, features)
        rows.to_parquet(tmp_path / f"{name}.parquet")
    printed = train("--mixup", "0.2", "--class_weights", data=tmp_path)
    assert re.search(r"validation mAP \d+\.\d %", printed) and re.search(r"test macro_f1 \d+\.\d %", printed)
    model, _ = load_image_classifier(tmp_path / "out")
    assert model.config.id2label == dict(enumerate(COLOURS))
    table = pd.read_csv(tmp_path / "out" / "confusion.csv", index_col="label")
    assert [*table.index] == [*COLOURS] and (table.sum(axis=1) == 36).all()


def test_mean_average_precision_is_that_of_the_classes_that_occur():
    rng = np.random.default_rng(0)
    labels, scores = rng.integers(0, 2, (20, 4)), rng.normal(size=(20, 4))
    labels[:, 2] = 0
    expected = np.mean([average_precision_score(labels[:, k], scores[:, k]) for k in (0, 1, 3)])
    assert image_metrics.scores_of(EvalPrediction(scores, labels))["mAP"] == pytest.approx(expected)


def test_it_stops_early(train, tmp_path):
    train("--num_train_epochs", "9", "--early_stopping", "1", "--learning_rate", "1e-9")
    states = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("checkpoint-*/trainer_state.json")]
    assert max(state["epoch"] for state in states) == 2
    train("--num_train_epochs", "9", "--early_stopping", "1", "--learning_rate", "1e-9")  # it goes no further
    epochs = [json.loads(file.read_text())["epoch"] for file in (tmp_path / "out").glob("checkpoint-*/*state.json")]
    assert max(epochs) == 2
    train("--num_train_epochs", "9", "--early_stopping", "2", "--learning_rate", "1e-9")  # one more than before
    epochs = [json.loads(file.read_text())["epoch"] for file in (tmp_path / "out").glob("checkpoint-*/*state.json")]
    assert max(epochs) == 3


def test_the_scale_with_the_lowest_loss_is_kept_and_called_so(train, tmp_path):
    metric = ("--metric_for_best_model", "loss", "--greater_is_better", "False")
    printed = train("--scales", "300", "0.001", *metric)
    losses = {
        float(s): float(loss) for s, loss in re.findall(r"scale (\S+): validation loss (\d+\.\d+)$", printed, re.M)
    }
    assert losses.keys() == {300.0, 0.001} and losses[300.0] != losses[0.001]
    config = FacTConfig.from_pretrained(str(tmp_path / "out"))
    assert config.scale == min(losses, key=losses.get)
    assert "validation loss" in (tmp_path / "out" / "README.md").read_text()


def test_storage_is_no_part_of_what_a_checkpoint_depends_on(train, tmp_path):
    train()
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("checkpoint-*/optimizer.pt")}
    train("--storage", "int8")
    assert before == {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("checkpoint-*/optimizer.pt")}
    assert FacTConfig.from_pretrained(str(tmp_path / "out")).storage == "int8"
    with pytest.raises(ValueError, match=r"belongs to another run .*rank: 16 there, 4 here"):
        train("--rank", "4")
    with pytest.raises(ValueError, match=r"metric_for_best_model: accuracy there, loss here"):
        train("--metric_for_best_model", "loss")


def test_without_training_it_reports_the_model_as_it_starts(train):
    assert re.search(r"validation accuracy \d+\.\d %", train("--num_train_epochs", "0"))


def test_it_writes_for_tensorboard(train, tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard, an optional reader of the training curves, is missing")
    train("--report_to", "tensorboard")
    assert list((tmp_path / "out").rglob("events.out.tfevents.*"))


def test_it_starts_from_the_gradients_of_unmixed_images(train, monkeypatch):
    batches = []
    start = getattr(fact_peft, "initialize_from_gradients", lambda model, batches: None)

    def recorded(model, dataloader):
        batches.extend(dataloader)
        return start(model, dataloader)

    monkeypatch.setattr(fact_peft, "initialize_from_gradients", recorded, raising=False)
    train("--init", "gradients", "--mixup", "1")
    labels = torch.cat([batch["labels"] for batch in batches])
    assert sorted(labels.tolist()) == sorted([*range(3)] * 12) and labels.tolist() != [*range(3)] * 12


# What is refused at the start


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--storage", "int3"], "storage='int3' is unknown"),
        (["--head_storage", "int9"], "head_storage='int9' is unknown"),
        (["--scales", "1", "0"], "scale=0 switches the adapter off"),
        (["--rank", "0"], "rank=0 is less than 1"),
        (["--report_to", "nobody"], "nobody is not supported"),
        (["--push_to_hub"], "--push_to_hub needs --hub_model_id"),
        (["--lerning_rate", "1"], "unknown argument --lerning_rate: did you mean --learning_rate?"),
        (["--target-module", "qkv"], "did you mean --target_modules?"),
    ],
)
def test_what_cannot_work_is_refused_before_the_data_are_read(options, message, train, monkeypatch):
    monkeypatch.setattr(script, "read_splits", lambda *args: pytest.fail("the data were read"))
    with pytest.raises((ValueError, SystemExit), match=re.escape(message)):
        train(*options)


def test_a_metric_that_is_not_computed_is_refused_before_training(train, monkeypatch):
    monkeypatch.setattr(script, "read_task", lambda *args: pytest.fail("the images were read"))
    with pytest.raises(
        SystemExit, match="--metric_for_best_model f1 is unknown; choose one of accuracy, macro_f1, loss"
    ):
        train("--metric_for_best_model", "f1")


# Images


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I"])
def test_16_bit_grey_keeps_its_greys(mode, tmp_path):
    grey = np.linspace(0, 65535, 256).round().reshape(16, 16)
    kind = {"I;16": "<u2", "I;16B": ">u2", "I": "int32"}[mode]
    image = PILImage.frombytes(mode, (16, 16), grey.astype(kind).tobytes())
    assert np.asarray(image.convert("RGB")).min(axis=(1, 2)).tolist() != list(range(0, 256, 16))  # Pillow clips
    rgb = np.asarray(to_rgb(image))
    assert rgb.shape == (16, 16, 3) and abs(rgb[..., 0].ravel() - np.arange(256.0)).max() <= 1


def test_16_bit_images_reach_the_model_as_their_8_bit_copies_do(source, tmp_path):
    processor = ViTImageProcessor.from_pretrained(source / "vit")
    grey = np.random.default_rng(0).integers(0, 256, (20, 20))
    PILImage.fromarray((grey * 257).astype("uint16")).save(tmp_path / "deep.png")
    PILImage.fromarray(grey.astype("uint8")).save(tmp_path / "shallow.png")
    files = [str(tmp_path / name) for name in ("deep.png", "shallow.png")]
    rows = Dataset.from_dict({"image": files, "label": [0, 1]}, Features(image=Image(), label=ClassLabel(names=NAMES)))
    deep, shallow = image_data.prepared(rows, ("image", "label"), processor, 2)[:]["pixel_values"]
    assert torch.equal(deep, shallow) and deep.std() > 0.1


def test_images_of_an_unknown_range_are_refused_by_name(tmp_path):
    PILImage.fromarray(np.full((8, 8), 0.5, dtype="float32")).save(tmp_path / "depth.tiff")
    picture(0).save(tmp_path / "photo.png")
    files = [str(tmp_path / name) for name in ("photo.png", "depth.tiff")]
    rows = Dataset.from_dict({"image": files}, Features(image=Image()))
    with pytest.raises(
        ValueError, match=r"1 of 2 images .*\n.*depth.tiff: An image of mode 'F' has pixels from 0.5 to"
    ):
        image_data.readable("train", rows, "image", "stop")


# The run as a user starts it


@pytest.mark.slow
def test_without_arguments_for_data_it_leaves_a_ready_classifier(tmp_path, monkeypatch):
    options = ["--num_train_epochs", "3", "--scales", "1", "10", "--output_dir", "out", "--storage", "int4"]
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
    assert config["storage"] == "int4"
    assert "import fact_peft" in (folder / "README.md").read_text()
    assert list(folder.rglob("model.safetensors")) == [folder / "backbone" / "model.safetensors"]

    # What was printed is what the saved classifier does, through transformers' own pipeline.
    monkeypatch.chdir(tmp_path)
    model, processor = load_image_classifier("out")
    classify = pipeline("image-classification", model=model, image_processor=processor, device="cpu")
    _, splits = shifted_digits.upright_and_shifted_digits()
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
    checkpoints = WholeCheckpoints({"rank": 8, "labels": NAMES})
    arguments = script.Recipe(str(tmp_path))
    for step in (9, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(b"12345")
        checkpoints.on_save(arguments, TrainerState(global_step=step, is_world_process_zero=True), None)
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
        WholeCheckpoints({"rank": 4, "labels": NAMES}).last(folder)


# Datasets


def test_labels_outside_the_head_are_refused_with_split_and_row():
    train, test = dataset([0, 1, 1], Value("int64")), dataset([0, 1, -1, 5], Value("int64"))
    names = image_data.class_names(train, "label")
    assert names == ["0", "1"]
    with pytest.raises(ValueError, match=r"2 of 4 labels of split 'test'.*2 classes.*first is -1 in row 2"):
        image_data.with_checked_labels("test", test, "label", names)
    several = dataset([[0], [1, 3]], List(Value("int64")))
    with pytest.raises(ValueError, match=r"1 of 3 labels of split 'test'.*first is 3 in row 1"):
        image_data.with_checked_labels("test", several, "label", names)


@pytest.mark.parametrize(
    ("labels", "feature", "message"),
    [
        ([0.5, 1.0], Value("float32"), "labels such as 0.5; number the classes from 0"),
        ([[1, 0, 1], [0, 0, 1]], List(Value("int64")), "list the numbers of the classes that an image has"),
    ],
)
def test_labels_of_another_form_are_refused(labels, feature, message):
    with pytest.raises(ValueError, match=message):
        image_data.class_names(dataset(labels, feature), "label")


def test_a_missing_name_of_a_class_is_named():
    train = dataset(["bee", None, "ant"], Value("string"))
    assert image_data.class_names(train, "label") == NAMES
    with pytest.raises(ValueError, match="first is None in row 1"):
        image_data.with_checked_labels("train", train, "label", NAMES)


@pytest.mark.parametrize("several", [False, True])
def test_labels_given_as_text_become_classes_in_alphabetical_order(several):
    values, feature = ["bee", "ant", "bee"], Value("string")
    train = dataset([[value] for value in values], List(feature)) if several else dataset(values, feature)
    names = image_data.class_names(train, "label")
    assert names == NAMES
    indices = image_data.with_checked_labels("train", train, "label", names)["label"][:]
    assert indices == ([[1], [0], [1]] if several else [1, 0, 1])
    with pytest.raises(ValueError, match="first is 'cat' in row 1"):
        image_data.with_checked_labels("test", dataset(["ant", "cat"], Value("string")), "label", names)


def test_a_dataset_without_images_is_refused():
    features = Features(text=Value("string"), label=ClassLabel(names=NAMES))
    with pytest.raises(ValueError, match=r"--image_column was not given: .* has 0 such columns.*text"):
        image_data.find_columns(features, None, None)


def test_one_of_several_label_columns_has_to_be_named():
    label = ClassLabel(names=NAMES)
    features = Features(image=Image(), fine=label, coarse=label)
    with pytest.raises(ValueError, match=r"--label_column was not given: .* has 2 such columns: fine, coarse"):
        image_data.find_columns(features, None, None)
    assert image_data.find_columns(features, None, "coarse") == ("image", "coarse")
    with pytest.raises(ValueError, match="--label_column breed: "):
        image_data.find_columns(features, None, "breed")


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
    train = image_data.read_splits("imagefolder", str(image_folder))["train"]
    assert len(train) == 8
    with pytest.raises(ValueError, match=r"2 of 8 images of split 'train' cannot be read:") as error:
        image_data.readable("train", train, "image", "stop")
    assert "cut.png" in str(error.value) and "text.png" in str(error.value)
    with caplog.at_level("WARNING", logger="transformers"):  # which benchmarks silence
        kept = image_data.readable("train", train, "image", "skip")
    assert "2 of 8 images" in caplog.text and "cut.png" in caplog.text
    assert len(kept) == 6 and kept["label"][:] == [0, 0, 0, 1, 1, 1]


def test_a_dataset_without_a_train_split_is_refused(monkeypatch):
    monkeypatch.setattr(image_data, "load_dataset", lambda *args, **kwargs: DatasetDict(test=dataset([0, 1])))
    with pytest.raises(ValueError, match="--dataset cats has no split 'train' but test"):
        image_data.read_splits("cats")


def test_drop_path_and_labels_reach_a_model_that_has_them(tmp_path):
    shape = {"image_size": 16, "patch_size": 2, "embed_dim": 16, "depths": [1, 1], "num_heads": [1, 2]}
    SwinForImageClassification(SwinConfig(window_size=4, num_labels=7, **shape)).save_pretrained(tmp_path)
    plain = AutoModelForImageClassification.from_pretrained(tmp_path)
    args = script.Arguments(model=str(tmp_path), drop_path=0.3, rank=2, fact_dropout=0.1)
    task = image_data.Task(NAMES, False, None, {})
    model = script.make_model(args, script.make_config(args, 0.5), task, seed=0)
    assert model.config.drop_path_rate == 0.3 and plain.config.drop_path_rate != 0.3
    assert model.config.id2label == {0: "ant", 1: "bee"}
    assert model(torch.randn(1, 3, 16, 16)).logits.shape == (1, 2)
    assert model.peft_config["default"].scale == 0.5 and model.peft_config["default"].fact_dropout == 0.1
