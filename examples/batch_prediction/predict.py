"""Score a large collection of images with many adapters, on Ray Data.

    python examples/batch_prediction/predict.py --backbone google/vit-base-patch16-224-in21k --adapters my-adapters \\
        --images photos --output scores

runs on this machine; with RAY_ADDRESS set, the same command runs on that cluster. If a run was stopped, the same
command computes what is missing. README.md beside this file describes input, output and costs.
"""

import hashlib
import io
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import ray
import torch
from PIL import Image, ImageOps
from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageClassification, HfArgumentParser

from fact_peft import AdapterPool

IMAGES = (".jpg", ".jpeg", ".png", ".webp")
IDS = {"path": "id", "bytes": "image"}
PREDICTION = pa.struct({"adapter": pa.string(), "labels": pa.list_(pa.string()), "scores": pa.list_(pa.float32())})


@dataclass
class Arguments:
    backbone: str = field(metadata={"help": "Hub name or folder of the frozen model."})
    adapters: str = field(metadata={"help": "Folder with one folder per adapter."})
    images: str = field(metadata={"help": "Folder of images, or a parquet file or a folder of them."})
    output: str = field(metadata={"help": "Folder for the scores. On a cluster all machines must share it."})
    image_column: str = field(default="image", metadata={"help": "Of parquet: encoded images, or structs with bytes."})
    id_column: str = field(default="path", metadata={"help": "Of parquet: a unique name of each image."})
    top: int = field(default=5, metadata={"help": "Number of labels kept of each adapter."})
    batch_size: int = field(default=32, metadata={"help": "Images in one forward pass."})
    workers: int = field(default=1, metadata={"help": "Processes with a model."})
    gpus_per_worker: float = field(default=0, metadata={"help": "GPUs of each worker."})


def prepare(batch: dict[str, np.ndarray], processor: Callable, mode: str) -> dict[str, np.ndarray]:
    """Decode images to pixels (B, channels, height, width). If one cannot be decoded, it gets an error and zeros."""

    def pixels_of(image: Image.Image) -> np.ndarray:
        if image.mode.startswith("I"):  # 16-bit greys, which Pillow would clip: scaled as for training, in rgb.py
            image = Image.fromarray(np.clip(np.asarray(image) // 257, 0, 255).astype("uint8"))
        return processor(image.convert(mode), return_tensors="np")["pixel_values"][0].astype(np.float32)

    pixels, errors = [], []
    for data in batch["image"]:
        try:
            encoded = data["bytes"] if isinstance(data, dict) else data
            pixels.append(pixels_of(ImageOps.exif_transpose(Image.open(io.BytesIO(encoded)))))
            errors.append("")
        except Exception as error:  # decoders fail in many ways; one file must not end the run
            pixels.append(np.zeros_like(pixels_of(Image.new(mode, (64, 64)))))
            errors.append(f"{type(error).__name__}: {error}")
    return {"id": batch["id"], "pixels": np.stack(pixels), "error": np.array(errors, dtype=object)}


class Classify:
    """Passes a batch through the backbone once per adapter, since adapters change all of its layers."""

    def __init__(self, backbone: str, adapters: dict[str, str], top: int, device: str) -> None:
        self.device, self.top = device, top
        self.pool = AdapterPool(AutoModelForImageClassification.from_pretrained(backbone).eval().to(device))
        for name, folder in adapters.items():
            self.pool.load(name, folder)

    def __call__(self, batch: dict[str, np.ndarray]) -> pa.Table:
        pixels = torch.from_numpy(np.array(batch["pixels"])).to(self.device)
        rows: list[list[dict]] = [[] for _ in pixels]
        for name in self.pool.names():
            predictions = self.pool(pixels, [name] * len(pixels))
            # All scores of the batch together: copying them from a GPU one by one would take longer than the pass.
            scores = torch.stack([prediction.logits for prediction in predictions]).float().softmax(-1)
            best = scores.topk(min(self.top, scores.shape[1]))
            labels = predictions[0].labels or [str(index) for index in range(scores.shape[1])]
            for row, values, indices in zip(rows, best.values.tolist(), best.indices.tolist(), strict=True):
                row.append({"adapter": name, "labels": [labels[index] for index in indices], "scores": values})
        kept = [[] if error else row for row, error in zip(rows, batch["error"], strict=True)]
        columns = {"id": pa.array(batch["id"]), "error": pa.array(batch["error"], pa.string())}
        return pa.table({**columns, "predictions": pa.array(kept, pa.list_(PREDICTION))})


def finished(scores: Path) -> set[str]:
    """The ids of the images that are finished. A file that a killed run was writing is deleted."""
    done: set[str] = set()
    for file in scores.glob("*.parquet"):
        try:
            done.update(pq.read_table(file, columns=["id"])["id"].to_pylist())
        except pa.ArrowInvalid:
            file.unlink()
    return done


def read(arguments: Arguments, done: set[str]) -> ray.data.Dataset | None:
    """The encoded images that are not finished, as columns ``id`` and ``image``; None if there are none."""
    source = Path(arguments.images).resolve()
    if source.suffix == ".parquet" or any(source.glob("*.parquet")):
        names = {arguments.id_column: "id", arguments.image_column: "image"}
        data, reference = ray.data.read_parquet(str(source), columns=list(names)), ray.put(done)
        return data.rename_columns(names).filter(lambda row: row["id"] not in ray.get(reference))
    files = sorted(str(file) for file in source.rglob("*") if file.suffix.lower() in IMAGES)
    data = [file for file in files if file not in done]
    return ray.data.read_binary_files(data, include_paths=True).rename_columns(IDS) if data else None


def check_settings(arguments: Arguments, folders: dict[str, Path]) -> None:
    """Record backbone, adapters and top. Raises a ValueError if the output has scores with others, or no adapters."""
    if not folders:
        raise ValueError(f"--adapters {arguments.adapters} has no folders in it; pass a folder with one per adapter.")
    weights = {name: (folder / "adapter_model.safetensors").read_bytes() for name, folder in folders.items()}
    digests = {name: hashlib.sha256(content).hexdigest() for name, content in weights.items()}
    settings = {"backbone": arguments.backbone, "top": arguments.top, "adapters": digests}
    file = Path(arguments.output) / "settings.json"
    if file.is_file() and json.loads(file.read_text()) != settings:
        raise ValueError(f"{file} says other backbone, adapters or top than this command; pass another --output.")
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(settings, indent=1))


def predict(arguments: Arguments) -> None:
    """Write ``OUTPUT/scores/*.parquet``: id, error, and for each adapter its best labels with their scores."""
    folders = {folder.name: folder for folder in sorted(Path(arguments.adapters).resolve().glob("*/"))}
    check_settings(arguments, folders)
    scores = Path(arguments.output).resolve() / "scores"
    data = read(arguments, finished(scores))
    if data is None:
        return
    device = "cuda" if arguments.gpus_per_worker else "cpu"
    mode = "L" if getattr(AutoConfig.from_pretrained(arguments.backbone), "num_channels", 3) == 1 else "RGB"
    processor = AutoImageProcessor.from_pretrained(arguments.backbone)
    adapters = {name: str(folder) for name, folder in folders.items()}
    data = data.map_batches(prepare, batch_size=arguments.batch_size, fn_args=(processor, mode)).map_batches(
        Classify,
        fn_constructor_args=(arguments.backbone, adapters, arguments.top, device),
        batch_size=arguments.batch_size,
        compute=ray.data.ActorPoolStrategy(size=arguments.workers),
        num_gpus=arguments.gpus_per_worker,
    )
    data.write_parquet(str(scores))


def main() -> None:
    (arguments,) = HfArgumentParser(Arguments).parse_args_into_dataclasses()
    if "RAY_ADDRESS" in os.environ:
        ray.init()
    else:  # with more CPUs than workers, so that reading and writing never wait for a worker
        ray.init("local", num_cpus=(os.cpu_count() or 1) + arguments.workers, include_dashboard=False)
    predict(arguments)


if __name__ == "__main__":
    main()
