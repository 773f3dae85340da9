"""Train adapters for eight tasks at once on one frozen vision transformer, with images of all tasks in every batch.

    python examples/many_tasks.py

needs no network and no GPU. It pretrains a small ViT on scikit-learn's digits (8x8 pixels, light on dark, upright). The
tasks are other digits, dark on light, in each of the eight ways to turn and mirror a square, with 20 labels per class.
Each task has an adapter and a head. A step is one pass over a batch with 4 images of each task, and `adapter_names`
says which task an image belongs to. The loss is the sum of the tasks' losses, so every adapter gets the gradient that
it would get alone (tests/test_many_tasks.py). AdamW updates each number by its own gradient, so the result is that of
eight separate runs up to rounding. The script then makes the eight runs one after the other, on the same batches. On a
busy CPU (torch 2.15, transformers 5.23, peft 0.21) it prints

    Pretrained on 900 digits. Accuracy on 697 others: 96.8 % upright, 9.0 % inverted and rotated.
    Accuracy on 697 test images of each task:
                before at once in turn
    turned0        9.0    85.5    85.7
    turned90      12.3    85.4    85.2
    turned180     10.5    81.6    81.6
    turned270      1.3    56.8    57.1
    mirrored0      8.3    80.1    80.1
    mirrored90     6.0    87.5    87.9
    mirrored180    8.9    86.7    86.7
    mirrored270    4.0    84.9    85.2
    Seconds of training: at once 16.8, in turn 81.3

Both times are shorter on an idle CPU. A model this small spends its time on calls; benchmarks/many_adapters measures a
larger one. With --learning_rate 2e-2 --epochs 10 training is so unstable that rounding changes the result: in two tasks
the accuracies at once and in turn are 10 and 18, and 27 and 24.

`adapter_names` needs evaluation mode, so there is no dropout. Heads of different sizes give a list of logits, one entry
per image, and the loss of each task has to be computed separately.
"""

import copy
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from command_line import flag, parse
from peft import PeftModel, get_peft_model
from quickstart import Arguments as Quickstart
from quickstart import Task, accuracy, digits, load_backbone, pretrain
from torch import Tensor, nn
from transformers import PreTrainedModel, get_cosine_schedule_with_warmup, set_seed
from transformers.utils import logging

from fact_peft import FacTConfig

# For each task, how often its images are turned by 90 degrees, and whether they are mirrored afterwards.
TASKS = {
    f"{side}{90 * quarters}": (quarters, side == "mirrored") for side in ("turned", "mirrored") for quarters in range(4)
}


@dataclass
class Arguments:
    rank: int = flag(8, "Rank of every adapter.")
    learning_rate: float = flag(4e-3, "Of AdamW, with warm-up and cosine decay.")
    epochs: int = flag(8, "Epochs of every task.")
    images_per_task: int = flag(4, "Images of each task in a step.")
    pretraining_epochs: int = flag(25, "Epochs on upright digits.")
    seed: int = flag(0, "Of everything that is random.")
    output_dir: str = flag("outputs/many_tasks", "Where to save backbone and adapters.")


def seen_by(task: str, images: Tensor) -> Tensor:
    """Images (N, channels, height, width), turned and mirrored."""
    quarters, mirrored = TASKS[task]
    turned = images.rot90(quarters, dims=(2, 3))
    return turned.flip(3) if mirrored else turned


def with_tasks(backbone: PreTrainedModel, tasks: Sequence[str], rank: int) -> PeftModel:
    """The backbone with an adapter and a head for each task."""
    model = get_peft_model(backbone, FacTConfig(rank=rank), tasks[0])
    for task in tasks[1:]:
        model.add_adapter(task, FacTConfig(rank=rank))
    return model.eval()


def parameters(model: PeftModel, task: str) -> list[nn.Parameter]:
    """Factors and head of one task's adapter."""
    return [
        parameter
        for name, parameter in model.named_parameters()
        if name.endswith(f".{task}") or f".modules_to_save.{task}." in name
    ]


def sum_of_losses(model: PeftModel, tasks: Sequence[str], images: Tensor, labels: Tensor) -> Tensor:
    """The sum of the tasks' mean losses, from one pass.

    Args:
        model: The model, with an adapter for each task.
        tasks: Names of the tasks.
        images: (tasks, images of each, channels, height, width).
        labels: (tasks, images of each).
    """
    names = [task for task, own in zip(tasks, labels, strict=True) for _ in own]
    logits = model(pixel_values=images.flatten(0, 1), adapter_names=names).logits
    return len(tasks) * nn.functional.cross_entropy(logits, labels.flatten())


def train(model: PeftModel, tasks: Sequence[str], images: Tensor, labels: Tensor, args: Arguments) -> None:
    """Train the adapters of all `tasks` with AdamW. Images and labels have the shapes of `sum_of_losses`."""
    trained = [parameter for task in tasks for parameter in parameters(model, task)]
    for parameter in trained:
        parameter.requires_grad_(True)  # PEFT trains the active adapter only
    order = torch.Generator().manual_seed(args.seed)
    num_images = labels.shape[1]
    batches = [
        batch
        for _ in range(args.epochs)
        for batch in torch.randperm(num_images, generator=order).split(args.images_per_task)
    ]
    optimizer = torch.optim.AdamW(trained, args.learning_rate, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, len(batches) // 10, len(batches))
    for batch in batches:
        sum_of_losses(model, tasks, images[:, batch], labels[:, batch]).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def accuracies(model: PeftModel, task: Task) -> dict[str, float]:
    """Accuracy of every adapter on the test images of its task."""
    found = {}
    for name in TASKS:
        model.set_adapter(name)
        found[name] = accuracy(model, seen_by(name, task.test_images), task.test_labels)
    return found


def main() -> None:
    (args,) = parse(Arguments)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    set_seed(args.seed)
    torch.set_num_threads(1)  # more do not speed up a model this small, and slow it down on a busy machine
    folder = Path(args.output_dir)
    quickstart = Quickstart(model=str(folder / "backbone"), pretraining_epochs=args.pretraining_epochs)
    upright, digit, task = digits(quickstart.train_per_class)
    pretrain(upright, digit, task, quickstart, folder / "backbone")

    at_once = with_tasks(load_backbone(quickstart, task), list(TASKS), args.rank)
    in_turn = copy.deepcopy(at_once)
    images = torch.stack([seen_by(name, task.images) for name in TASKS])
    labels = task.labels.expand(len(TASKS), -1)
    seconds, columns = {}, {}
    columns["before"] = accuracies(at_once, task)
    start = time.perf_counter()
    train(at_once, list(TASKS), images, labels, args)
    seconds["at once"] = time.perf_counter() - start
    start = time.perf_counter()
    for place, name in enumerate(TASKS):
        train(in_turn, [name], images[place, None], labels[place, None], args)
    seconds["in turn"] = time.perf_counter() - start
    columns |= {"at once": accuracies(at_once, task), "in turn": accuracies(in_turn, task)}
    print(f"Accuracy on {len(task.test_labels)} test images of each task:")
    print(pd.DataFrame(columns).map("{:.1f}".format).to_string())
    print("Seconds of training: " + ", ".join(f"{how} {taken:.1f}" for how, taken in seconds.items()))
    at_once.save_pretrained(folder / "adapters")


if __name__ == "__main__":
    main()
