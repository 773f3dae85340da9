"""Trained once, stored in many ways: what a method has learned on a task, kept as float32."""

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from benchmarks.frontier.backbones import Backbone
from benchmarks.frontier.methods import FIRST_RATE, Method
from benchmarks.frontier.search import Protocol, adapted, groups, train, trained_parameters
from benchmarks.frontier.tasks import Task


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
    model, heads = adapted(backbone, task, method, seed)
    parameters = trained_parameters(model)
    if not file.exists():
        train(backbone, model, groups(parameters, heads, method, FIRST_RATE), task.train, protocol, method.loss)
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(".part")
        save_file({name: parameter.detach().cpu() for name, parameter in parameters.items()}, part)
        part.replace(file)
    saved = load_file(file)
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])
    return model.eval(), heads
