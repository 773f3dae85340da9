"""Saving a classifier over another one, killed at random moments.

    python -m benchmarks.interruption.saving

A process saves one classifier after the other into one folder. They differ in config, weights and image processor, each
of which says which classifier it belongs to. The process is killed with SIGKILL at a random moment and the folder is
loaded. A folder that is refused is loaded again after the command of the error message was run. The command prints how
often the folder held the classifier that was saved last, the one that was being saved, or a mixture.
"""

import argparse
import os
import random
import signal
import subprocess
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from transformers import AutoImageProcessor, ViTConfig, ViTForImageClassification, ViTImageProcessor

from fact_peft import FacTConfig, save_image_classifier

SHAPE = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2}


def backbone() -> ViTForImageClassification:
    """A tiny ViT, always the same."""
    torch.manual_seed(0)
    return ViTForImageClassification(ViTConfig(**SHAPE, num_attention_heads=2, num_labels=2))


class Saver:
    """Classifiers by number, saved one over the other.

    Args:
        folder: Where to.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.model = get_peft_model(backbone(), FacTConfig(rank=2))

    @torch.no_grad()
    def save(self, number: int) -> None:
        """Save the classifier of this number; every third has another config than the one before and after it."""
        config = self.model.peft_config["default"]
        config.labels = [f"number {number}", "other"] if number % 3 == 0 else ["two", "labels"]
        for parameter in self.model.parameters():
            if parameter.requires_grad:
                parameter.fill_(number)
        processor = ViTImageProcessor(image_mean=[float(number)] * 3)
        save_image_classifier(self.model, processor, self.folder, {"number": number})


def is_whole(number: int, labels: list[str] | None) -> bool:
    """Whether the config of a folder is that of the classifier of this number."""
    return labels == ([f"number {number}", "other"] if number % 3 == 0 else ["two", "labels"])


def numbers_of(model: torch.nn.Module) -> set[float]:
    """All numbers that the trained parameters of a model have."""
    trained = [value for name, value in model.named_parameters() if ".fact_" in name or ".modules_to_save." in name]
    return {number for value in trained for number in value.detach().unique().tolist()}


def loaded_number(folder: Path) -> int | None:
    """The number of the classifier in a folder; None if it is a mixture.

    Raises:
        ValueError: If the folder is refused.
    """
    config = PeftConfig.from_pretrained(folder)
    by_peft = PeftModel.from_pretrained(backbone(), folder)
    processor = AutoImageProcessor.from_pretrained(folder)
    found = numbers_of(by_peft) | set(processor.image_mean)
    assert isinstance(config, FacTConfig)
    if len(found) > 1 or not is_whole(int(*found), config.labels):
        return None
    return int(*found)


def kill_while_saving(saver: Saver, start: int, delay: float) -> int:
    """Save classifiers `start`, `start` + 1, ... in a process that is killed after `delay` seconds.

    Returns:
        The number of the last one that was saved to the end.
    """
    reading, writing = os.pipe()
    process = os.fork()
    if process == 0:
        os.close(reading)
        try:
            for number in range(start, start + 10_000):
                saver.save(number)
                os.write(writing, b".")
        finally:
            os._exit(1)
    os.close(writing)
    os.read(reading, 1)  # the first, after which all is warm
    time.sleep(delay)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    with os.fdopen(reading, "rb") as pipe:
        return start + len(pipe.read())


def run(kills: int, seed: int, report: Callable[[str], None] = lambda line: None) -> Counter[str]:
    """Kill so often, and count what was found in the folder."""
    moments, found = random.Random(seed), Counter[str]()
    with tempfile.TemporaryDirectory() as name:
        saver = Saver(Path(name, "classifier"))
        number = 0
        for kill in range(kills):
            last = kill_while_saving(saver, number + 1, moments.uniform(0, 0.2))
            found["saves"] += last - number
            try:
                loaded = loaded_number(saver.folder)
            except ValueError as error:
                command = str(error).partition("Complete the save with: ")[2].removesuffix(".")
                subprocess.run(command, shell=True, check=True)
                found["refused, completed by the command"] += 1
                loaded = loaded_number(saver.folder)
            if loaded == last:
                found["the last one saved"] += 1
            elif loaded == last + 1:
                found["the one being saved"] += 1
            else:
                found["mixed or lost"] += 1
                report(f"kill {kill}: {last} was saved last, {loaded} is there")
            number = last + 1
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200, help="how often to kill (default: 200)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the random moments (default: 0)")
    arguments = parser.parse_args()
    found = run(arguments.kills, arguments.seed, print)
    print(f"{arguments.kills} kills in {found['saves']:,} saves:")
    for outcome in ("the last one saved", "the one being saved", "mixed or lost", "refused, completed by the command"):
        print(f"  {outcome}: {found[outcome]}")


if __name__ == "__main__":
    main()
