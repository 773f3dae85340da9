"""examples/batch_prediction as its users run it, on a tiny model: scores beside PEFT's, and stopped runs."""

import importlib.util
import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from peft import PeftModel

pytest.importorskip("ray.data", reason='Ray is not installed: pip install ".[serving]"')

from PIL import Image
from served import LABELS, save_adapter, save_backbone
from transformers import AutoImageProcessor, ViTForImageClassification

pytestmark = pytest.mark.slow
PREDICT = Path(__file__).parents[1] / "examples" / "batch_prediction" / "predict.py"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A backbone, two adapters, and ten images of which one is damaged."""
    folder = tmp_path_factory.mktemp("batch")
    save_backbone(folder / "backbone")
    for seed, (name, labels) in enumerate(LABELS.items()):
        save_adapter(folder / "backbone", folder / "adapters" / name, labels, seed)
    (folder / "images" / "more").mkdir(parents=True)
    for seed in range(10):
        save_image(folder / "images" / ("more" if seed % 2 else "") / f"{seed}.png", seed)
    (folder / "images" / "9.jpg").write_bytes(b"hello")
    return folder


def save_image(file: Path, seed: int) -> None:
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype="uint8")).save(file)


def predict(folder: Path, **options: object) -> list[dict]:
    """The rows of the output, sorted, after a run of the command."""
    options = {"backbone": "backbone", "adapters": "adapters", "images": "images", "batch_size": 4, **options}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    environment.pop("RAY_ADDRESS", None)
    ran = subprocess.run([sys.executable, PREDICT, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr[-5000:]
    files = (folder / str(options["output"]) / "scores").glob("*.parquet")
    rows = [row for file in files for row in pq.read_table(file).to_pylist()]
    return sorted(rows, key=lambda row: row["id"])


def expected(folder: Path, name: str, image: Path) -> dict[str, float]:
    """What PEFT alone says of the image."""
    base = ViTForImageClassification.from_pretrained(
        folder / "backbone", num_labels=len(LABELS[name]), ignore_mismatched_sizes=True
    )
    model = PeftModel.from_pretrained(base, folder / "adapters" / name).eval()
    pixels = AutoImageProcessor.from_pretrained(folder / "backbone")(Image.open(image), return_tensors="pt")
    with torch.no_grad():
        return dict(zip(LABELS[name], model(**pixels).logits[0].softmax(-1).tolist(), strict=True))


def test_every_adapter_scores_every_image_as_in_peft_and_a_later_run_adds_what_is_missing(folder):
    rows = predict(folder, output="scores")
    images = sorted((folder / "images").rglob("*.*"))
    assert [row["id"] for row in rows] == sorted(map(str, images))
    for row in rows:
        if row["id"].endswith(".jpg"):
            assert (row["predictions"], row["error"].split(":")[0]) == ([], "UnidentifiedImageError")
            continue
        assert row["error"] == ""
        assert [prediction["adapter"] for prediction in row["predictions"]] == list(LABELS)
        for prediction in row["predictions"]:
            assert prediction["scores"] == sorted(prediction["scores"], reverse=True)
            scores = dict(zip(prediction["labels"], prediction["scores"], strict=True))
            # float32, other order of sums
            assert scores == pytest.approx(expected(folder, prediction["adapter"], Path(row["id"])), abs=1e-5)

    # As after a run that was killed: one file is lost, another was being written; and there is a new image.
    files = sorted((folder / "scores" / "scores").glob("*.parquet"))
    lost, kept = files[0], {file: file.stat().st_mtime_ns for file in files[1:]}
    lost.rename(folder / "lost")
    (folder / "scores" / "scores" / "half.parquet").write_bytes((folder / "lost").read_bytes()[:-20])
    save_image(folder / "images" / "new.png", 11)
    again = predict(folder, output="scores")
    assert [row for row in again if not row["id"].endswith("new.png")] == rows
    assert len(again) == len(rows) + 1
    assert kept == {file: file.stat().st_mtime_ns for file in kept}


@pytest.fixture
def module():
    spec = importlib.util.spec_from_file_location("predict", PREDICT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_16_bit_greys_are_scored_as_their_8_bit_copies(folder, module):
    grey = np.arange(256, dtype="uint8").reshape(16, 16)
    encoded = []
    for pixels in (grey, grey.astype("uint16") * 257):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "PNG")
        encoded.append(file.getvalue())
    batch = {"id": np.array(["8", "16"]), "image": np.array(encoded, dtype=object)}
    prepared = module.prepare(batch, AutoImageProcessor.from_pretrained(folder / "backbone"), "RGB")
    assert np.array_equal(*prepared["pixels"]) and prepared["pixels"].std() > 0.1 and not any(prepared["error"])


def test_scores_of_other_adapters_are_not_mixed(folder, tmp_path, module):
    fruit, sky = (folder / "adapters" / name for name in LABELS)
    arguments = module.Arguments("backbone", "adapters", "images", str(tmp_path))
    for _ in range(2):
        module.check_settings(arguments, {"a": fruit})
    with pytest.raises(ValueError, match="says other backbone, adapters or top than this command"):
        module.check_settings(arguments, {"a": sky})
    with pytest.raises(ValueError, match="has no folders in it"):
        module.check_settings(arguments, {})


def test_parquet_is_read_as_datasets_writes_it_and_resumed(folder):
    encoded = []
    for seed in range(6):
        file = io.BytesIO()
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (40, 30, 3), dtype="uint8")).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    names = [f"image {seed}" for seed in range(6)]
    table = pa.table({"image": encoded, "name": names, "label": [0] * 6})
    (folder / "parquet").mkdir()
    pq.write_table(table.slice(0, 4), folder / "parquet" / "first.parquet")
    pq.write_table(table.slice(4), folder / "parquet" / "second.parquet")
    (folder / "from parquet" / "scores").mkdir(parents=True)
    done = pa.table({"id": names[1:5], "error": ["done"] * 4})  # by an earlier run
    pq.write_table(done, folder / "from parquet" / "scores" / "earlier.parquet")
    rows = predict(folder, images="parquet", output="from parquet", id_column="name", top=1)
    assert [row["id"] for row in rows] == names
    assert [row["error"] for row in rows] == ["", *["done"] * 4, ""]
    for seed in (0, 5):
        save_image(folder / "one.png", seed)
        for prediction in rows[seed]["predictions"]:
            scores = expected(folder, prediction["adapter"], folder / "one.png")
            assert prediction["labels"] == [max(scores, key=scores.get)]
            assert prediction["scores"] == pytest.approx([max(scores.values())], abs=1e-5)
