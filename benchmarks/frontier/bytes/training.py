"""Trained once, stored in many ways: what a method has learned on a task, kept as float32."""

from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.frontier.backbones import Backbone
from benchmarks.frontier.methods import FIRST_RATE, Method
from benchmarks.frontier.search import Protocol, adapted, groups, train, trained_parameters
from benchmarks.frontier.tasks import Task
from fact_peft import StraightThrough

LATE = 0.25  # of the learning rates, for the epochs that follow


def trained(
    backbone: Backbone, task: Task, method: Method, seed: int, protocol: Protocol, file: Path
) -> tuple[nn.Module, list[str]]:
    """The trained model in evaluation mode and the names of its heads; from `file` if it was trained before.

    Args:
        backbone: What is adapted.
        task: To train on.
        method: How it is adapted; at its first learning rate.
        seed: Of head, adapter and order of the images.
        protocol: Epochs and batch size.
        file: Where the trained parameters are kept, by name.
    """

    def fit(model: nn.Module, heads: list[str]) -> None:
        parameters = groups(trained_parameters(model), heads, method, FIRST_RATE)
        train(backbone, model, parameters, task.train, protocol)

    return kept(backbone, task, method, seed, file, fit)


def continued(
    backbone: Backbone,
    task: Task,
    method: Method,
    seed: int,
    protocol: Protocol,
    start: Path,
    file: Path,
    storage: str,
    head_storage: str,
) -> tuple[nn.Module, list[str]]:
    """As `trained`, for a few more epochs from what `start` holds, with straight-through rounding to a storage.

    Args:
        backbone: What is adapted.
        task: To train on.
        method: How it is adapted.
        seed: Of the order of the images too.
        protocol: These epochs, and the batch size.
        start: What was trained before.
        file: Where the outcome is kept.
        storage: Of the factors, as in `FacTConfig`; float32 rounds nothing, to tell rounding from more training.
        head_storage: Of the head.
    """

    def fit(model: nn.Module, heads: list[str]) -> None:
        fill(model, start)
        parameters = groups(trained_parameters(model), heads, method, FIRST_RATE)
        late = [{**group, "lr": LATE * group["lr"]} for group in parameters]

        def begin(optimizer: torch.optim.Optimizer) -> None:
            StraightThrough(model, optimizer, storage, head_storage)

        train(backbone, model, late, task.train, protocol, begin=begin)

    return kept(backbone, task, method, seed, file, fit)


def kept(
    backbone: Backbone,
    task: Task,
    method: Method,
    seed: int,
    file: Path,
    fit: Callable[[nn.Module, list[str]], None],
) -> tuple[nn.Module, list[str]]:
    """The adapted model with the parameters in `file`, for which it is first fitted if there is none."""
    model, heads = adapted(backbone, task, method, seed)
    if not file.exists():
        fit(model, heads)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        parameters = {name: parameter.detach().cpu() for name, parameter in trained_parameters(model).items()}
        save_file(parameters, part)
        part.replace(file)
    fill(model, file)
    return model.eval(), heads


@torch.no_grad()
def fill(model: nn.Module, file: Path) -> None:
    saved = load_file(file)
    for name, parameter in trained_parameters(model).items():
        parameter.copy_(saved[name])
