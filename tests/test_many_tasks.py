"""examples/many_tasks.py: what one pass over all tasks gives each adapter is what it gets alone."""

import re

import pytest
import torch
from backbones import images, make_backbone
from transformers.utils import logging

pytest.importorskip("PIL")
pytest.importorskip("sklearn")

from many_tasks import Arguments, parameters, sum_of_losses, train, with_tasks

TASKS = ["one", "two", "three"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = with_tasks(make_backbone("vit"), TASKS, rank=3).double()
    for task in TASKS:
        for parameter in parameters(model, task):
            parameter.data.normal_(std=0.3)  # V would start at zero
    return model


@pytest.fixture
def batch():
    """Four images of each task, and their classes."""
    return images(torch.float64, 12).unflatten(0, (3, 4)), torch.arange(12).unflatten(0, (3, 4)) % 3


def gradients(model, tasks, images, labels):
    """Of PEFT's active adapter, or of all in one pass."""
    trained = [parameter for task in tasks for parameter in parameters(model, task)]
    for parameter in trained:
        parameter.requires_grad_(True)
    if len(tasks) == 1:
        model.set_adapter(tasks[0])
        loss = torch.nn.functional.cross_entropy(model(pixel_values=images[0]).logits, labels[0])
    else:
        loss = sum_of_losses(model, tasks, images, labels)
    return torch.autograd.grad(loss, trained)


def test_one_pass_gives_every_adapter_the_gradient_it_gets_alone(model, batch):
    together = gradients(model, TASKS, *batch)
    alone = [
        gradient
        for place, task in enumerate(TASKS)
        for gradient in gradients(model, [task], *(part[place, None] for part in batch))
    ]
    assert len(together) == len(alone) == 3 * (3 + 2)  # factors and head
    for one, other in zip(together, alone, strict=True):
        assert one.abs().max() > 1e-3
        torch.testing.assert_close(one, other)


def test_training_at_once_ends_where_training_in_turn_does(model, batch):
    args = Arguments(epochs=3, images_per_task=2)
    start = {name: parameter.clone() for name, parameter in model.named_parameters()}
    train(model, TASKS, *batch, args)
    at_once = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    model.load_state_dict(start)
    for place, task in enumerate(TASKS):
        train(model, [task], *(part[place, None] for part in batch), args)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), at_once[name], msg=name)
        adapted = ".fact_" in name or ".modules_to_save." in name
        assert adapted == ((parameter - start[name]).abs().max() > 1e-3).item(), name


def test_the_script_trains_eight_tasks_both_ways(run_module, monkeypatch, tmp_path):
    for setting in ("set_verbosity_error", "disable_progress_bar"):
        monkeypatch.setattr(logging, setting, lambda: None)  # for a process of its own
    options = ["--epochs", 1, "--pretraining_epochs", 1, "--images_per_task", 50, "--output_dir", tmp_path]
    output = run_module("many_tasks", *options)
    rows = re.findall(r"^(?:turned|mirrored)\d+ +[\d.]+ +([\d.]+) +([\d.]+)$", output, re.MULTILINE)
    assert len(rows) == 8 and all(abs(float(at_once) - float(in_turn)) < 1 for at_once, in_turn in rows)
    assert len(list((tmp_path / "adapters").glob("*/adapter_model.safetensors"))) == 8
