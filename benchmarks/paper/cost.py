"""What the VTAB-1K and few-shot benchmarks cost on one GPU: an estimate from counted operations, nothing is run.

    python -m benchmarks.paper.cost
    python -m benchmarks.paper.cost --write benchmarks/paper/MEASURED.md

Floating-point operations of one image are counted on a ViT-B/16 without numbers, forward and in a training step of
FacT-TT, rank 16; its products in place, some 1 %, escape torch's counter. Images come from the protocol and the sizes
of the published lists.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import torch
from peft import get_peft_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import ViTConfig, ViTForImageClassification

from benchmarks.paper.published import GRIDS, PAPER, SCALES, SHOTS
from benchmarks.reporting.markdown import table, write_generated
from fact_peft import FacTConfig

COMMAND = "python -m benchmarks.paper.cost"
EPOCHS, BATCH = PAPER["recipe"]["epochs"], PAPER["recipe"]["batch_size"]
OPERATIONS_A_SECOND = 100e12  # assumed: a third of the bfloat16 peak of an A100, 312e12
READ_A_SECOND = 1000  # assumed: images decoded and resized by the four processes of one job

# Test images of the 19 tasks, as in Jia et al., Visual Prompt Tuning, ECCV 2022, appendix.
VTAB_TEST = {
    "cifar100": 10_000,
    "caltech101": 6_084,
    "dtd": 1_880,
    "oxford_flowers102": 6_149,
    "oxford_iiit_pet": 3_669,
    "svhn": 26_032,
    "sun397": 21_750,
    "patch_camelyon": 32_768,
    "eurosat": 5_400,
    "resisc45": 6_300,
    "diabetic_retinopathy": 42_670,
    "clevr_count": 15_000,
    "clevr_dist": 15_000,
    "dmlab": 22_735,
    "kitti": 711,
    "dsprites_loc": 73_728,
    "dsprites_ori": 73_728,
    "smallnorb_azi": 12_150,
    "smallnorb_ele": 12_150,
}
# Classes, validation and test images of the public few-shot lists.
FEW_SHOT = {
    "food101": (101, 20_200, 30_300),
    "stanford_cars": (196, 1_635, 8_041),
    "flowers102": (102, 1_633, 2_463),
    "fgvc_aircraft": (100, 3_333, 3_333),
    "oxford_pets": (37, 736, 3_669),
}


class Work(NamedTuple):
    """Images of a benchmark: in training steps, in evaluations, and of those, read from disk."""

    trained: int
    evaluated: int
    read: int

    def __mul__(self, times: int) -> "Work":  # type: ignore[override]
        return Work(*(times * images for images in self))


def total(*parts: Work) -> Work:
    return Work(*map(sum, zip(*parts, strict=True)))


def run_of(train: int, val: int, test: int) -> Work:
    """One run: full batches only, ten validations, and with validation a second test, of the selected weights."""
    trained = max(min(train, BATCH), train // BATCH * BATCH) * EPOCHS
    tested = test * (2 if val else 1)
    return Work(trained, 10 * val + tested, train + val + tested)


def benchmarks() -> dict[str, Work]:
    """One decomposition of each command with its defaults, and of the search on the paper's grid."""
    vtab = total(*(total(run_of(1000, 0, test), run_of(800, 200, test)) for test in VTAB_TEST.values()))
    search = run_of(800, 200, 0) * (len(VTAB_TEST) * len(GRIDS["tt"]) * len(SCALES))
    few_shot = total(
        *(run_of(classes * shots, val, test) * 3 for classes, val, test in FEW_SHOT.values() for shots in SHOTS)
    )
    return {"VTAB-1K, one seed": vtab, "VTAB-1K, the search before it": search, "few-shot, three seeds": few_shot}


def operations() -> tuple[int, int]:
    """Floating-point operations per image of a ViT-B/16 with FacT-TT, r = 16: forward, and forward and backward."""
    with torch.device("meta"):
        model = get_peft_model(ViTForImageClassification(ViTConfig(num_labels=100)), FacTConfig(rank=16))
        model.base_model.model.factors.to("meta")
        pixels = torch.empty(1, 3, 224, 224)
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(pixel_values=pixels)
        with FlopCounterMode(display=False) as step:
            model(pixel_values=pixels).logits.sum().backward()
    return forward.get_total_flops(), step.get_total_flops()


def text() -> str:
    forward, step = operations()
    rows = []
    for name, work in benchmarks().items():
        computing = (work.trained * step + work.evaluated * forward) / OPERATIONS_A_SECOND / 3600
        reading = work.read / READ_A_SECOND / 3600
        images = [f"{count:,}" for count in work]
        rows.append([name, *images, f"{computing:.1f}", f"{reading:.1f}", f"{computing + reading:.1f}"])
    header = ["one decomposition", "images trained on", "evaluated", "read", "h computing", "h reading", "h on one GPU"]
    arithmetic = (
        f"Computing: (images trained on x {step / 1e9:.1f}e9 + images evaluated x {forward / 1e9:.1f}e9 operations) / "
        f"{OPERATIONS_A_SECOND / 1e12:.0f}e12 a second; reading: images read / {READ_A_SECOND:,} a second, as if "
        "nothing overlapped. Both rates are assumptions; starting processes is not counted."
    )
    return f"{table(header, rows)}\n\n{arithmetic}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="Markdown file to write the estimate into")
    file = parser.parse_args().write
    estimate = text()
    print(estimate)
    if file is not None:
        write_generated(file, COMMAND, estimate)


if __name__ == "__main__":
    main()
