"""One method on one task: a few trials of its learning rate, then the best one on validation images with more seeds."""

import copy
import math
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import ViTForImageClassification, get_cosine_schedule_with_warmup, set_seed

from benchmarks.frontier.backbone import normalise
from benchmarks.frontier.methods import METHODS, REMEDIES, Method
from benchmarks.frontier.tasks import Task
from benchmarks.reporting.results import Results

FIRST_RATE = 4e-3  # of the search, and of every head
STEP = 4.0  # of the search


class Protocol(NamedTuple):
    """How a method is run.

    Attributes:
        sizes: Images to train on, to choose the learning rate on, and to test on.
        epochs: Passes over the training images.
        trials: Learning rates tried.
        seeds: The first is that of the trials.
    """

    sizes: tuple[int, int, int] = (1000, 500, 2000)
    epochs: int = 10
    trials: int = 3
    seeds: tuple[int, ...] = (0, 1, 2)
    batch_size: int = 50


QUICK = Protocol(sizes=(20, 10, 10), epochs=1, trials=2, seeds=(0, 1), batch_size=10)


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


def groups(model: nn.Module, method: Method, learning_rate: float) -> list[dict[str, Any]]:
    """What is trainable, with its learning rate, for an optimizer."""

    def rate(name: str) -> float:
        if "classifier" in name:
            return FIRST_RATE if method.own_head_rate else learning_rate
        return learning_rate * math.prod(factor for part, factor in method.multipliers.items() if part in name)

    return [{"params": [p], "lr": rate(name)} for name, p in model.named_parameters() if p.requires_grad]


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Per cent of `images` whose largest logit is that of their label."""
    predicted = torch.cat([model(pixel_values=batch).logits.argmax(-1) for batch in images.split(200)])
    return 100 * (predicted == labels).sum().item() / len(labels)


def run(
    backbone: ViTForImageClassification, task: Task, method: Method, learning_rate: float, seed: int, protocol: Protocol
) -> dict[str, Any]:
    """Adapt a copy of the backbone with a fresh head: AdamW, a tenth of the steps warm-up, cosine decay."""
    start = time.perf_counter()
    set_seed(seed)
    model = copy.deepcopy(backbone)
    model.classifier = nn.Linear(backbone.classifier.in_features, task.num_labels)
    model.config.num_labels = model.num_labels = task.num_labels
    model = method.adapt(model, task.train)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(groups(model, method, learning_rate), weight_decay=1e-4, fused=True)
    images, labels = normalise(task.train.images), task.train.labels
    steps_per_epoch = math.ceil(len(labels) / protocol.batch_size)
    num_steps = protocol.epochs * steps_per_epoch
    schedule = get_cosine_schedule_with_warmup(optimizer, num_steps // 10, num_steps)
    losses = []
    model.train()
    for _ in range(protocol.epochs):
        for batch in torch.randperm(len(labels)).split(protocol.batch_size):
            loss = nn.functional.cross_entropy(model(pixel_values=images[batch]).logits, labels[batch])
            loss.backward()
            losses.append(loss.item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
    model.eval()
    return {
        "parameters": sum(p.numel() for name, p in trained.items() if "classifier" not in name),
        "val_accuracy": accuracy(model, normalise(task.val.images), task.val.labels),
        "test_accuracy": accuracy(model, normalise(task.test.images), task.test.labels),
        "train_loss": sum(losses[-steps_per_epoch:]) / steps_per_epoch,
        "seconds": round(time.perf_counter() - start, 1),
    }


def measure(
    backbone: ViTForImageClassification,
    task: Task,
    names: list[str],
    results: Results,
    protocol: Protocol,
    fingerprint: str,
) -> None:
    """Run what `results` lacks: for each method the trials, then the chosen learning rate with the other seeds."""
    for name in names:
        method = {**METHODS, **REMEDIES}[name]

        def outcome(learning_rate: float, seed: int, name: str = name, method: Method = method) -> dict[str, Any]:
            setting = {"method": name, "learning_rate": learning_rate, "seed": seed, "backbone": fingerprint}
            setting |= protocol._asdict()
            found = results.find(**setting)
            if found is None:
                found = run(backbone, task, method, learning_rate, seed, protocol)
                results.add(setting, found)
                print(f"{results.file.stem}, {name}, rate {learning_rate:.2g}, seed {seed}: {found}", flush=True)
            return found

        accuracies: dict[float, float] = {}
        while len(accuracies) < protocol.trials:
            rate = next_rate(accuracies) if accuracies else FIRST_RATE
            accuracies[rate] = outcome(rate, protocol.seeds[0])["val_accuracy"]
        chosen = max(accuracies, key=accuracies.__getitem__)
        for seed in protocol.seeds[1:]:
            outcome(chosen, seed)
