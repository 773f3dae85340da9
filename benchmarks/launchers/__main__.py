"""How far distributed training ends from training in one process, with 2 processes on CPU.

    python -m benchmarks.launchers

Trains tiny backbones for ten AdamW steps on the same global batches: once in a single process, then under
`accelerate launch` with each configuration file of `examples/accelerate`. The table has the largest absolute difference
of a factor from the single process, over all factors and all ranks.
"""

import argparse
import itertools
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

from benchmarks.ten_steps import train
from tests.backbones import make_backbone

ROOT = Path(__file__).parents[1]
LAUNCHERS = ("ddp", "fsdp2", "zero2", "zero3")
BACKBONES = ("vit", "swin")
SETTINGS = list(itertools.product(BACKBONES, ("tt", "tk"), (False, True)))


def name_of(backbone: str, decomposition: str, checkpointing: bool) -> str:
    """Of the folder with the results of one setting."""
    return f"{backbone}-{decomposition}" + ("-checkpointing" if checkpointing else "")


def save_backbones(folder: Path) -> None:
    for backbone in BACKBONES:
        make_backbone(backbone).save_pretrained(folder / backbone)


def train_single(folder: Path) -> None:
    """Train every setting in this process; results in ``folder/single``."""
    for backbone, decomposition, checkpointing in SETTINGS:
        results = folder / "single" / name_of(backbone, decomposition, checkpointing)
        train("single", folder / backbone, decomposition, checkpointing, results)


def commands(launcher: str, folder: Path) -> list[list[str]]:
    """What to run under a launcher to train every setting; results in ``folder/<launcher>``."""
    return [
        [
            str(ROOT / "benchmarks" / "ten_steps.py"),
            launcher,
            str(folder / backbone),
            decomposition,
            str(folder / launcher / name_of(backbone, decomposition, checkpointing)),
            *(["--checkpointing"] if checkpointing else []),
        ]
        for backbone, decomposition, checkpointing in SETTINGS
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
        [*launch_file, *file, str(ROOT / "benchmarks" / "on_cpu.py"), *chained],
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launchers", nargs="+", choices=LAUNCHERS, default=LAUNCHERS)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_backbones(folder)
        train_single(folder)
        print("| launcher | backbone | decomposition | checkpointing | largest difference |\n|---|---|---|---|---|")
        for launcher in arguments.launchers:
            launch(launcher, commands(launcher, folder))
            for setting in SETTINGS:
                backbone, decomposition, checkpointing = setting
                difference = largest_difference(folder, launcher, name_of(*setting))
                cells = (launcher, backbone, decomposition, "yes" if checkpointing else "no", f"{difference:.1e}")
                print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
