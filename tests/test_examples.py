"""The examples are run as a user runs them, in a process of their own, on settings that take seconds."""

import re
from pathlib import Path

import pytest
from forking import Fork
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

pytest.importorskip("PIL")
pytest.importorskip("matplotlib")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from PIL import Image
from sklearn.datasets import load_digits

EXAMPLES = Path(__file__).parents[1] / "examples"
METHODS = ("linear-probe", "full-tuning", "LoRA", "FacT-TT", "FacT-TK")
QUICK = ("--seeds", "0", "--learning_rates", "0.01", "--epochs", "1")


def run_quickstart(fork: Fork, folder: Path, *arguments: str | Path) -> str:
    """What the script prints; it must succeed without a network."""
    script = str(EXAMPLES / "quickstart.py")
    argv = [script, *QUICK, "--output_dir", str(folder / "out"), *map(str, arguments)]
    code = f"import runpy, sys; sys.argv = {argv}; sys.path.insert(0, {str(EXAMPLES)!r})"
    status, output = fork(f"{code}; runpy.run_path({script!r}, run_name='__main__')", folder)
    assert status == 0, output
    return output


def assert_is_whole(output: str, methods: tuple[str, ...]) -> None:
    rows = re.findall(r"^(\S+) +[\d,]+ +[\d,]+ +[\d,]+ +0\.01 +\d+\.\d \(", output, re.MULTILINE)
    assert rows == list(methods)
    for state in ("reloaded", "merged"):
        assert re.search(
            rf"{state}: largest difference of logits \S+e[+-]\d+, all predicted labels equal: True", output
        )


@pytest.fixture
def vit_folder(tmp_path: Path) -> Path:
    """A tiny untrained ViT for two classes of 16x16 colour images, with its image processor."""
    folder = tmp_path / "vit"
    config = ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    ViTForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 16, "width": 16}).save_pretrained(folder)
    return folder


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Grey digits as a folder of PNG files per class, six of each of three classes, without a test split."""
    folder = tmp_path / "images"
    images, labels = load_digits(n_class=3, return_X_y=True)
    for label in range(3):
        (folder / str(label)).mkdir(parents=True)
        for index, pixels in enumerate(images[labels == label][:6]):
            Image.fromarray((pixels.reshape(8, 8) * 15).astype("uint8")).save(folder / str(label) / f"{index}.png")
    return folder


def test_quickstart_compares_all_methods_without_arguments_for_data(fork: Fork, tmp_path: Path) -> None:
    output = run_quickstart(fork, tmp_path, "--pretraining_epochs", "1")
    assert_is_whole(output, METHODS)
    assert (tmp_path / "out" / "FacT-TT" / "adapter_model.safetensors").is_file()


def test_quickstart_adapts_a_saved_model_to_a_folder_of_images(
    fork: Fork, tmp_path: Path, vit_folder: Path, image_folder: Path
) -> None:
    few = ("--train_per_class", "2", "--val_per_class", "2", "--batch_size", "3")
    dataset = ("--dataset", "imagefolder", "--data_dir", image_folder)
    output = run_quickstart(fork, tmp_path, "--model", vit_folder, *dataset, *few, "--methods", "LoRA", "FacT-TK")
    assert "Adapting to 3 classes with 2 labels each" in output
    assert "on 6 test images" in output
    assert_is_whole(output, ("LoRA", "FacT-TK"))
