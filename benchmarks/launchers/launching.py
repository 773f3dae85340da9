"""Short training runs in one process and under each configuration file of examples/accelerate."""

import itertools
import os
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.launchers.short_training import train
from tests.backbones import make_backbone

HERE = Path(__file__).parent
ROOT = Path(__file__).parents[2]
LAUNCHERS = ("ddp", "fsdp2", "zero2", "zero3")
BACKBONES = ("vit", "swin")
Setting = tuple[str, str, bool]  # backbone, decomposition, and whether activations are checkpointed
SETTINGS: list[Setting] = list(itertools.product(BACKBONES, ("tt", "tk"), (False, True)))


def name_of(backbone: str, decomposition: str, checkpointing: bool) -> str:
    """Of the folder with the results of one setting."""
    return f"{backbone}-{decomposition}" + ("-checkpointing" if checkpointing else "")


def save_backbones(folder: Path) -> None:
    for backbone in BACKBONES:
        make_backbone(backbone).save_pretrained(folder / backbone)


def train_single(folder: Path, settings: Iterable[Setting] = SETTINGS) -> None:
    """Train every setting in this process; results in ``folder/single``."""
    for backbone, decomposition, checkpointing in settings:
        results = folder / "single" / name_of(backbone, decomposition, checkpointing)
        train("single", folder / backbone, decomposition, checkpointing, results)


def commands(launcher: str, folder: Path, settings: Iterable[Setting] = SETTINGS) -> list[list[str]]:
    """What to run under a launcher to train every setting; results in ``folder/<launcher>``."""
    return [
        [
            str(HERE / "short_training.py"),
            launcher,
            str(folder / backbone),
            decomposition,
            str(folder / launcher / name_of(backbone, decomposition, checkpointing)),
            *(["--checkpointing"] if checkpointing else []),
        ]
        for backbone, decomposition, checkpointing in settings
    ]


def launch(launcher: str, scripts: list[list[str]], *options: str) -> str:
    """Run scripts one after another in one launch of two processes on CPU; what they printed.

    Args:
        launcher: Which configuration file.
        scripts: A script and its arguments each.
        options: More options of `accelerate launch`, which go before those of the file.

    Raises:
        RuntimeError: If one fails.
    """
    launch_file = [sys.executable, "-m", "accelerate.commands.launch", *options]
    file = ["--config_file", str(ROOT / f"examples/accelerate/{launcher}.yaml"), "--main_process_port", "0"]
    chained = [argument for script in scripts for argument in ("--then", *script)][1:]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    result = subprocess.run(
        [*launch_file, *file, str(HERE / "launch_without_gpu.py"), *chained],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode != 0:
        raise RuntimeError(f"Training under {launcher} failed:\n{result.stdout}")
    return result.stdout


def parameters(folder: Path, launcher: str, setting: str) -> list[dict[str, Tensor]]:
    """All parameters after training, whole, as each rank had them."""
    return [load_file(file) for file in sorted((folder / launcher / setting).glob("rank*.safetensors"))]


def largest_difference(folder: Path, launcher: str, setting: str) -> float:
    """From the single process, over the factors and all ranks."""
    (single,) = parameters(folder, "single", setting)
    return max(
        (rank[name] - single[name]).abs().max().item()
        for rank in parameters(folder, launcher, setting)
        for name in single
        if ".fact_" in name
    )
