"""What it costs to train several tasks on one frozen model: run after run, or all of them in every batch."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.many_adapters.batches import DEVICE, DTYPE, LABELS, RANK, Shape, fact, with_adapters
from benchmarks.reporting.timing import time_in_turns

TRAINED, TASKS, IMAGES = Shape(width=384, image=96), 8, (4, 8, 16)  # images of each task in a step
TINY_TASKS, TINY_IMAGES = 2, (2,)
IN_TURN = "a step of every run"


def trained(model: nn.Module) -> list[nn.Parameter]:
    """Factors and heads of all adapters."""
    return [
        parameter for name, parameter in model.named_parameters() if ".fact_" in name or ".modules_to_save." in name
    ]


def training_step(shape: Shape, tasks: int) -> Callable[..., None]:
    """A step of so many tasks on a model of their own, as a function of images and labels, task after task."""
    model = with_adapters(shape, [fact(RANK)] * tasks)
    for parameter in trained(model):
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(trained(model), lr=1e-4)

    def step(images: torch.Tensor, labels: torch.Tensor) -> None:
        names = [str(index * tasks // len(images)) for index in range(len(images))] if tasks > 1 else None
        logits = model(pixel_values=images, adapter_names=names).logits
        # The mean over all images has a task's own mean in it, divided by the number of tasks.
        (tasks * nn.functional.cross_entropy(logits.float(), labels)).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def optimizer_step(shape: Shape, tasks: int) -> Callable[[], Any]:
    """AdamW alone, on parameters of the same shapes."""
    parameters = [nn.Parameter(p.detach()) for p in trained(with_adapters(shape, [fact(RANK)] * tasks))]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    return torch.optim.AdamW(parameters, lr=1e-4).step


def rows_of(shape: Shape, tasks: int) -> dict[str, Callable[[], Any]]:
    """What is timed, by name; all train on the same images, `shape.batch` of each task."""
    images = torch.randn(tasks * shape.batch, 3, shape.image, shape.image, device=DEVICE, dtype=DTYPE)
    labels = torch.randint(LABELS, (len(images),), device=DEVICE)
    batches = list(zip(images.split(shape.batch), labels.split(shape.batch), strict=True))
    alone, together, large = training_step(shape, 1), training_step(shape, tasks), training_step(shape, 1)
    one, all_of_them = optimizer_step(shape, 1), optimizer_step(shape, tasks)
    return {
        IN_TURN: lambda: [alone(*batch) for batch in batches],
        "a step of all tasks": partial(together, images, labels),
        "a step of one task with as many images": partial(large, images, labels),
        "optimizers of every run": lambda: [one() for _ in batches],
        "optimizer of all tasks": all_of_them,
    }


def time_training(shape: Shape, tasks: int, rounds: int) -> dict[str, dict[str, Any]]:
    """What `time_in_turns` says of every row, after one round for nothing."""
    rows = rows_of(shape, tasks)
    for run in rows.values():
        run()
    return time_in_turns(rows, IN_TURN, rounds)
