"""Runs of methods on tasks: a few trials of the learning rate, and the one that is best on validation images again.

Two protocols. Searched: every task has trials of its own. Fixed: the trials are of three tasks together, and what is
best on their mean is run on all others.
"""

import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import get_cosine_schedule_with_warmup, set_seed

from benchmarks.frontier.backbones import DEVICE, Backbone
from benchmarks.frontier.losses import Loss
from benchmarks.frontier.methods import FIRST_RATE, Method
from benchmarks.frontier.tasks import Labelled, Task
from benchmarks.reporting.results import Results
from fact_peft.architecture.heads import find_classifiers

STEP = 4.0  # of the search
SEARCH_SEED = 0


class Protocol(NamedTuple):
    """How a method is run.

    Attributes:
        epochs: Passes over the training images.
        batch_size: Of a step.
        trials: Learning rates tried, with seed 0.
        num_seeds: Seeds that the best one is run with, seed 0 included.
        rates: The learning rates tried; if empty, a search picks `trials` of them.
    """

    epochs: int = 10
    batch_size: int = 50
    trials: int = 3
    num_seeds: int = 3
    rates: tuple[float, ...] = ()


def next_rate(accuracies: dict[float, float]) -> float:
    """The learning rate to try after those with these validation accuracies.

    A step beyond the best if that lies at the edge, upwards at first; else between it and its better neighbour.
    """
    rates = sorted(accuracies)
    best = max(rates, key=accuracies.__getitem__)
    if best == rates[-1]:
        return best * STEP
    if best == rates[0]:
        return best / STEP
    at = rates.index(best)
    return math.sqrt(best * max(rates[at - 1], rates[at + 1], key=accuracies.__getitem__))


def groups(trained: Mapping[str, nn.Parameter], heads: Iterable[str], method: Method, rate: float) -> list[dict]:
    """Parameters with their learning rates, for an optimizer."""

    def rate_of(name: str) -> float:
        if is_head(name, heads):
            return FIRST_RATE if method.own_head_rate else rate
        return rate * math.prod(factor for part, factor in method.multipliers.items() if part in name)

    return [{"params": [parameter], "lr": rate_of(name)} for name, parameter in trained.items()]


def is_head(name: str, heads: Iterable[str]) -> bool:
    """Whether a parameter of an adapted model is of one of the `heads` of the model before."""
    return any(f".{head}." in f".{name}" for head in heads)


@torch.no_grad()
def accuracy(backbone: Backbone, model: nn.Module, images: Labelled) -> float:
    """Per cent of `images` whose largest logit is that of their label."""
    predicted = torch.cat([backbone.logits(model, batch).argmax(-1).cpu() for batch in images.images.split(200)])
    return 100 * (predicted == images.labels).sum().item() / len(images.labels)


def adapted(backbone: Backbone, task: Task, method: Method, seed: int) -> tuple[nn.Module, list[str]]:
    """The backbone with a fresh head, adapted, and the names of its heads as they were before."""
    set_seed(seed)
    model = backbone.build(task.num_labels)
    heads = find_classifiers(model)
    model = method.adapt(model, task.train).to(DEVICE)
    if method.start is not None:
        model = method.start(model, random_batches(task.train), backbone.logits)
    return model, heads


def random_batches(images: Labelled) -> Iterator[Labelled]:
    for index in torch.randperm(len(images.labels)).split(Protocol().batch_size):
        yield images[index]


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def train(
    backbone: Backbone,
    model: nn.Module,
    parameters: list[dict],
    images: Labelled,
    protocol: Protocol,
    loss_of: Loss,
) -> float:
    """AdamW, a tenth of the steps warm-up, cosine decay.

    Args:
        backbone: What `model` was made from.
        model: Left in evaluation mode.
        parameters: With their learning rates, as `groups` gives them.
        images: To train on.
        protocol: Epochs and batch size.
        loss_of: What is minimised.

    Returns:
        The mean loss of the last epoch.
    """
    optimizer = torch.optim.AdamW(parameters, weight_decay=1e-4, fused=True)
    steps_per_epoch = math.ceil(len(images.labels) / protocol.batch_size)
    num_steps = protocol.epochs * steps_per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    losses = []
    model.train()
    for _ in range(protocol.epochs):
        for batch in torch.randperm(len(images.labels)).split(protocol.batch_size):
            loss = loss_of(model, images[batch], backbone.logits)
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    return sum(losses[-steps_per_epoch:]) / steps_per_epoch


def run(
    backbone: Backbone, task: Task, method: Method, learning_rate: float, seed: int, protocol: Protocol
) -> dict[str, Any]:
    """Adapt the backbone with a fresh head, train and test it."""
    start = time.perf_counter()
    model, heads = adapted(backbone, task, method, seed)
    trained = trained_parameters(model)
    loss = train(backbone, model, groups(trained, heads, method, learning_rate), task.train, protocol, method.loss)
    return {
        "parameters": sum(parameter.numel() for name, parameter in trained.items() if not is_head(name, heads)),
        "val_accuracy": accuracy(backbone, model, task.val),
        "test_accuracy": accuracy(backbone, model, task.test),
        "train_loss": loss,
        "seconds": round(time.perf_counter() - start, 1),
    }


@dataclass
class Measurements:
    """Runs of methods with one backbone and protocol; each is kept, and none is repeated.

    Attributes:
        backbone: What is adapted.
        protocol: How.
        load: The task of a name.
        image_size: Of all of them.
        file: Where the runs of a task and a method are kept.
        progress: Counts runs.
    """

    backbone: Backbone
    protocol: Protocol
    load: Callable[[str], Task]
    image_size: int
    file: Callable[[str, str], Path]
    progress: tqdm

    def outcome(self, task: str, name: str, method: Method, learning_rate: float, seed: int) -> dict[str, Any]:
        """What comes out of one run, from the file if it is there."""
        loaded = self.load(task)
        setting = {
            "method": name,
            "learning_rate": learning_rate,
            "seed": seed,
            "backbone": self.backbone.fingerprint,
            "sizes": [len(split.labels) for split in loaded[:3]],
            "epochs": self.protocol.epochs,
            "batch_size": self.protocol.batch_size,
            "image_size": self.image_size,
            "precision": self.backbone.precision,
        }
        file = self.file(task, name)
        found = Results(file).find(**setting)
        if found is None:
            found = run(self.backbone, loaded, method, learning_rate, seed, self.protocol)
            Results(file).add(setting, found)  # read again, since another process may have written meanwhile
            tqdm.write(f"{task}, {name}, rate {learning_rate:.2g}, seed {seed}: {found}")
            self.progress.update()
        else:
            self.progress.total -= 1  # so that the estimate is of what is left
            self.progress.refresh()
        return found

    def search(self, tasks: list[str], name: str, method: Method) -> float:
        """The learning rate that is best on the validation images of the tasks, on their mean."""
        accuracies: dict[float, float] = {}
        given = list(self.protocol.rates)
        while given or len(accuracies) < self.protocol.trials:
            rate = given.pop(0) if given else next_rate(accuracies) if accuracies else method.first_rate
            outcomes = [self.outcome(task, name, method, rate, SEARCH_SEED) for task in tasks]
            accuracies[rate] = fmean(outcome["val_accuracy"] for outcome in outcomes)
        return max(accuracies, key=accuracies.__getitem__)

    def searched(self, task: str, name: str, method: Method) -> None:
        """The searched protocol."""
        rate = self.search([task], name, method)
        for seed in range(SEARCH_SEED + 1, self.protocol.num_seeds):
            self.outcome(task, name, method, rate, seed)

    def fixed(self, choosing: list[str], tasks: list[str], name: str, method: Method) -> None:
        """The fixed protocol: `choosing` are searched together, the others run at what came out."""
        rate = self.search(choosing, name, method)
        for task in tasks:
            if task not in choosing:
                for seed in range(SEARCH_SEED, self.protocol.num_seeds):
                    self.outcome(task, name, method, rate, seed)
