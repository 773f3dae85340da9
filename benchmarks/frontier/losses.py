"""What training minimises on a batch."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.frontier.tasks import Labelled

CONSISTENCY = 0.1  # the weight of the term that compares two passes

Logits = Callable[[nn.Module, Tensor], Tensor]  # of a model and images
Loss = Callable[[nn.Module, Labelled, Logits], Tensor]


def cross_entropy(model: nn.Module, batch: Labelled, logits: Logits) -> Tensor:
    """The cross-entropy of a batch."""
    outputs = logits(model, batch.images)
    return nn.functional.cross_entropy(outputs, batch.labels.to(outputs.device))


def consistent(model: nn.Module, batch: Labelled, logits: Logits) -> Tensor:
    """The cross-entropy of one pass, and the squared distance of its logits from those of a second pass.

    The passes differ by the dropout of the adapter, where PACE (NeurIPS 2024) has Gaussian noise.
    """
    first, second = logits(model, torch.cat([batch.images, batch.images])).chunk(2)
    distance = (first - second).square().sum(-1).mean()
    return nn.functional.cross_entropy(first, batch.labels.to(first.device)) + CONSISTENCY * distance
