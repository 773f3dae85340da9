"""Small synthetic stand-ins for VTAB-1K, the few-shot sets and a backbone, with real files in the published layouts.

    python -m benchmarks.paper.synthetic FOLDER

writes FOLDER/vtab, FOLDER/few_shot and FOLDER/backbone. Every task has up to four classes; the class of an image is the
colour of its noise, so that a few steps learn it. Accuracies on such data mean nothing.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.paper.folders import FEW_SHOT_SETS, few_shot_train_list, vtab_folder
from benchmarks.paper.published import SHOTS, TASKS

IMAGE_SIZE = 32
COLOURS = ((200, 60, 60), (60, 200, 60), (60, 60, 200), (180, 180, 60))


def write_images(folder: Path, prefix: str, labels: list[int], random: np.random.Generator) -> list[str]:
    """One file per label, named below `prefix` of `folder`; returns the lines of a list of them."""
    (folder / prefix).mkdir(parents=True, exist_ok=True)
    lines = []
    for index, label in enumerate(labels):
        pixels = random.normal(COLOURS[label], 40, (IMAGE_SIZE, IMAGE_SIZE, 3)).clip(0, 255).astype(np.uint8)
        name = str(Path(prefix, f"{index:06d}.jpg"))
        Image.fromarray(pixels).save(folder / name)
        lines.append(f"{name} {label}")
    return lines


def write_list(file: Path, lines: list[str]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(f"{line}\n" for line in lines))


def write_vtab(folder: Path, random: np.random.Generator) -> None:
    """The 19 tasks with 16 images to train on, 8 to select on and 16 to test on."""
    for task, (_, num_classes, _) in TASKS.items():
        classes = list(range(min(num_classes, len(COLOURS))))
        splits = {
            split: write_images(folder / vtab_folder(task), f"images/{split}", (classes * size)[:size], random)
            for split, size in (("train800", 16), ("val200", 8), ("test", 16))
        }
        splits["train800val200"] = splits["train800"] + splits["val200"]
        for split, lines in splits.items():
            write_list(folder / vtab_folder(task) / f"{split}.txt", lines)


def write_few_shot(folder: Path, random: np.random.Generator) -> None:
    """The five sets with three classes, all shots of the paper and three seeds."""
    classes = list(range(3))
    for few_shot_set in FEW_SHOT_SETS.values():
        place = folder / few_shot_set.folder
        for split in ("val", "test"):
            write_list(
                place / "annotations" / f"{split}_meta.list", write_images(place / "images", split, classes * 3, random)
            )
        for seed in range(3):
            # Class by class in turn, so that the first `shots` rounds are the images of fewer shots.
            lines = write_images(place / "images", f"seed_{seed}", classes * max(SHOTS), random)
            for shots in SHOTS:
                write_list(place / "annotations" / few_shot_train_list(shots, seed), lines[: shots * len(classes)])


def write_backbone(folder: Path) -> None:
    """An untrained ViT for images of `IMAGE_SIZE`."""
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=IMAGE_SIZE,
        patch_size=8,
        hidden_size=32,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        initializer_range=0.2,  # as large as in trained models, else every image looks alike
    )
    ViTForImageClassification(config).save_pretrained(folder)


def write_synthetic(folder: Path) -> Path:
    """Write all three into `folder`, unless it is there; returns it."""
    if not folder.exists():
        part = folder.with_name(f"{folder.name}.part")
        write_vtab(part / "vtab", np.random.default_rng(0))
        write_few_shot(part / "few_shot", np.random.default_rng(1))
        write_backbone(part / "backbone")
        part.rename(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    print(write_synthetic(parser.parse_args().folder))


if __name__ == "__main__":
    main()
