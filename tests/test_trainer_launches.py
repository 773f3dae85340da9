"""The Trainer script with two processes on CPU under each configuration of examples/accelerate, against one process."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from benchmarks.launchers.launching import LAUNCHERS, ROOT, launch
from fact_peft import load_image_classifier

pytest.importorskip("PIL")
pytest.importorskip("sklearn")
pytest.importorskip("torchvision")

from classification.digits import upright_and_shifted_digits

TOLERANCE = {"rtol": 0, "atol": 1e-5}  # for its reason see test_launchers.py
TRAINER = str(ROOT / "examples" / "image_classification.py")
ADAPTER = "adapter_model.safetensors"
SMALL = {"num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def options(folder: Path) -> list[str]:
    """Two epochs of the Trainer script without dropout; what one process makes of it is in ``single/trainer``."""
    backbone = folder / "vit-with-head"  # since a fresh head is initialised from other random numbers under ZeRO-3
    torch.manual_seed(0)
    config = ViTConfig(image_size=8, patch_size=4, hidden_size=32, intermediate_size=64, num_labels=10, **SMALL)
    ViTForImageClassification(config).save_pretrained(backbone)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(backbone)
    _, splits = upright_and_shifted_digits()
    for name, split in splits.items():
        split.to_parquet(folder / f"{name}.parquet")
    files = [f"{name}={folder / name}.parquet" for name in splits]
    options = ["--model", str(backbone), "--dataset", "parquet", "--data_files", *files, "--num_train_epochs", "2"]
    options += ["--learning_rate", "1e-2", "--warmup_steps", "0", "--augment", "none"]
    single = [sys.executable, TRAINER, *options, "--output_dir", str(folder / "single" / "trainer"), "--use_cpu"]
    subprocess.run(single, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, check=True)
    return options


@pytest.mark.slow
@pytest.mark.parametrize("launcher_name", LAUNCHERS)
def test_the_trainer_script_ends_as_in_one_process_also_when_it_goes_on(launcher_name, folder, options):
    results = folder / launcher_name / "trainer"
    command = [TRAINER, *options, "--per_device_train_batch_size", "32", "--output_dir", str(results)]
    again = [*command[:-1], str(folder / launcher_name / "again")]
    launch(launcher_name, [command], "--mixed_precision", "no")
    # Its first epoch is all that the second run finds.
    shutil.copytree(results / "checkpoint-5", folder / launcher_name / "again" / "checkpoint-5")
    launch(launcher_name, [again], "--mixed_precision", "no")
    single = load_file(folder / "single" / "trainer" / ADAPTER)
    for run in (results, folder / launcher_name / "again"):
        torch.testing.assert_close(load_file(run / ADAPTER), single, **TOLERANCE)
        assert not list(run.rglob("model.safetensors"))
    model, _ = load_image_classifier(results)
    assert model.config.id2label[3] == "3"
