"""Training that is killed and started again, against training that is not.

    python -m benchmarks.interruption

runs examples/image_classification.py once in peace. Then it starts the same run, kills it with SIGKILL while a
checkpoint is being written or at a random later moment, starts it again, and so on until it ends. It prints where each
attempt went on, the largest difference of the factors and the head at the end, and the sizes of what lies on disk.
"""

import argparse
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[1] / "examples" / "image_classification.py"


def command(folder: Path, options: list[str]) -> list[str]:
    return [sys.executable, str(SCRIPT), "--output_dir", str(folder), *options]


def newest_checkpoint(folder: Path) -> int:
    """Step of the newest checkpoint folder, whole or not; 0 if there is none."""
    return max((int(path.name.partition("-")[2]) for path in folder.glob("checkpoint-*")), default=0)


def run(folder: Path, options: list[str]) -> None:
    """Run to the end.

    Raises:
        RuntimeError: If the run fails; with what it printed.
    """
    done = subprocess.run(command(folder, options), capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(done.stdout + done.stderr)


def run_and_kill(folder: Path, options: list[str], delay: float) -> int:
    """Run until the next checkpoint folder appears, `delay` seconds more, and kill.

    Returns:
        The step of the newest checkpoint folder then, half-written or not.

    Raises:
        RuntimeError: If the run ends before it is killed.
    """
    before = newest_checkpoint(folder)
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(command(folder, options), stdout=output, stderr=subprocess.STDOUT)
        try:
            while newest_checkpoint(folder) == before:
                if process.poll() is not None:
                    output.seek(0)
                    raise RuntimeError(f"The run ended before it was killed:\n{output.read()}")
                time.sleep(0.001)
            time.sleep(delay)
        finally:
            process.kill()
            process.wait()
    return newest_checkpoint(folder)


def whole_checkpoints(folder: Path) -> list[int]:
    """Steps of the checkpoints that are marked as whole."""
    return sorted(int(path.parent.name.partition("-")[2]) for path in folder.glob("checkpoint-*/complete.json"))


def largest_difference(one: Path, other: Path) -> float:
    """Largest absolute difference between two adapter folders, over all tensors of their files."""
    ours, theirs = (load_file(folder / SAFETENSORS_WEIGHTS_NAME) for folder in (one, other))
    assert ours.keys() == theirs.keys()
    return max((ours[name] - theirs[name]).abs().max().item() for name in ours)


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the files of a folder, all steps and ranks of a kind as one."""
    return {path.name: path.stat().st_size for path in sorted(folder.iterdir()) if path.is_file()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4, help="how often to kill the run (default: 4)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs, a checkpoint each (default: 12)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    arguments = parser.parse_args()
    moments = random.Random(arguments.seed)
    print(f"| decomposition | killed | at checkpoint | whole ones | largest difference at the end |\n|{'---|' * 5}")
    with tempfile.TemporaryDirectory() as name:
        for decomposition in ("tt", "tk"):
            options = ["--num_train_epochs", str(arguments.epochs), "--decomposition", decomposition]
            peaceful, killed = Path(name, decomposition, "peaceful"), Path(name, decomposition, "killed")
            run(peaceful, options)
            killed.mkdir(parents=True)
            shutil.copytree(peaceful / "backbone", killed / "backbone")
            for kill in range(arguments.kills):
                delay = 0.0 if kill % 2 == 0 else moments.uniform(0, 0.5)
                step = run_and_kill(killed, options, delay)
                when = "as it appears" if delay == 0 else f"{delay:.2f} s later"
                print(f"| {decomposition} | {when} | {step} | {whole_checkpoints(killed)} | |", flush=True)
            run(killed, options)
            print(f"| {decomposition} | - | | | {largest_difference(peaceful, killed):.1e} |", flush=True)
        checkpoint = peaceful / f"checkpoint-{newest_checkpoint(peaceful)}"
        print(f"\n{checkpoint.name}, bytes: {json.dumps(sizes(checkpoint))}")
        print(f"finished adapter, bytes: {json.dumps(sizes(peaceful))}")


if __name__ == "__main__":
    main()
