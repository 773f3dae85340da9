"""Runs of examples/image_classification.py: in peace, or killed at a moment; and what they leave on disk."""

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

SCRIPT = Path(__file__).parents[2] / "examples" / "image_classification.py"


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
