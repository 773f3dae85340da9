"""Throughput of examples/batch_prediction beside a plain loop over the same pool, images and adapters.

    python -m benchmarks.serving.offline

The ViT-Ti, adapters and JPEG pictures of `workload.py`, on this machine: one worker with one torch thread, beside one
process that decodes, prepares and classifies in the same batches. Both sizes of the collection are timed in turn,
--rounds times; the difference of their times divided by that of their sizes is the time per image without the start.
"""

import argparse
import contextlib
import io
import sys
import time
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import numpy as np
import ray
import torch

from benchmarks.serving.workload import pictures, save_adapters, save_backbone

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "examples" / "batch_prediction"
SIZES = 128, 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=4, help="number of adapters (default: 4)")
    parser.add_argument("--rounds", type=int, default=3, help="repetitions (default: 3)")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    sys.path.append(str(EXAMPLE))
    import predict

    seconds: dict[tuple[str, int], list[float]] = {}
    with TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        save_backbone(folder / "backbone")
        save_adapters(folder / "backbone", folder / "adapters", arguments.adapters)
        (folder / "adapters" / "first").rename(folder / "first")  # of which the others are copies
        for size in SIZES:
            (folder / str(size)).mkdir()
            for number, picture in enumerate(pictures(8) * (size // 8)):
                (folder / str(size) / f"{number}.jpg").write_bytes(picture)
        ray.init("local", num_cpus=4, include_dashboard=False, runtime_env={"working_dir": str(EXAMPLE)})
        for turn in range(arguments.rounds):
            for size in SIZES:
                options = predict.Arguments(
                    str(folder / "backbone"),
                    str(folder / "adapters"),
                    str(folder / str(size)),
                    str(folder / f"scores-{size}-{turn}"),
                )
                for kind, run in (("Ray Data", predict.predict), ("plain loop", plain_loop)):
                    start = time.perf_counter()
                    run(options)
                    seconds.setdefault((kind, size), []).append(time.perf_counter() - start)
        ray.shutdown()
    print("| | start, s | images a second | passes a second |\n|---|--:|--:|--:|")
    for kind in ("plain loop", "Ray Data"):
        small, large = (median(seconds[kind, size]) for size in SIZES)
        per_image = (large - small) / (SIZES[1] - SIZES[0])
        rate = 1 / per_image
        print(f"| {kind} | {small - SIZES[0] * per_image:.1f} | {rate:.1f} | {rate * arguments.adapters:.0f} |")


def plain_loop(options) -> None:
    """What `predict` does, without Ray."""
    import predict
    from transformers import AutoImageProcessor

    processor = AutoImageProcessor.from_pretrained(options.backbone)
    folders = {folder.name: str(folder) for folder in sorted(Path(options.adapters).iterdir())}
    classify = predict.Classify(options.backbone, folders, options.top, "cpu")
    files = sorted(Path(options.images).iterdir())
    for start in range(0, len(files), options.batch_size):
        batch = files[start : start + options.batch_size]
        images = {"id": np.array([str(file) for file in batch]), "image": [file.read_bytes() for file in batch]}
        classify(predict.prepare(images, processor, "RGB"))


if __name__ == "__main__":
    main()
