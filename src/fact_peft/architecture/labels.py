"""The class names that travel with an adapter, in the order of the logits."""

from __future__ import annotations

from typing import Any

from torch import nn

from .linears import base_of, linear_shape, walk


def placeholders(num_labels: int) -> list[str]:
    """What transformers calls classes that nobody has named."""
    return [f"LABEL_{index}" for index in range(num_labels)]


def named_labels(model: nn.Module) -> list[str] | None:
    """The class names that the config of a transformers model knows; None if it knows none."""
    id2label = getattr(getattr(model, "config", None), "id2label", None)
    if not id2label or set(id2label) != set(range(len(id2label))):
        return None
    return [str(id2label[index]) for index in range(len(id2label))]


def label_settings(labels: list[str]) -> dict[str, Any]:
    """`labels` as settings of a transformers config."""
    label2id = {label: index for index, label in enumerate(labels)}
    # num_labels follows from id2label in most configs, but not in those of PVT and timm.
    return {"num_labels": len(labels), "id2label": dict(enumerate(labels)), "label2id": label2id}


def current_labels(labels: list[str] | None, model: nn.Module) -> list[str] | None:
    """`labels`, or the names that the config of `model` has been given since, where they were placeholders."""
    names = named_labels(model)
    if labels and names and len(names) == len(labels) and labels == placeholders(len(labels)):
        return names
    return labels


def num_outputs(head: nn.Module) -> int | None:
    """Outputs of the last linear layer or convolution of a head; None if it has neither."""
    outputs = None
    for layer in (base_of(head), *(base_of(child) for _, child in walk(base_of(head)))):
        shape = linear_shape(layer)
        if shape is not None:
            outputs = shape[1]
        elif isinstance(layer, nn.Conv2d):
            outputs = layer.out_channels
    return outputs


def head_outputs(model: nn.Module, heads: list[str]) -> dict[str, int]:
    """Outputs, by name, of those modules of `model` that PEFT takes for `heads` (a ``modules_to_save``)."""
    outputs = {name: num_outputs(module) for name, module in walk(model) if name.endswith(tuple(heads))}
    return {name: count for name, count in outputs.items() if count is not None}


def fitting_labels(labels: list[str] | None, model: nn.Module, heads: list[str]) -> list[str] | None:
    """The labels of an adapter that trains `heads` of `model`: `labels`, or if None what the model's config names.

    Raises:
        ValueError: If `labels` are more or fewer than the outputs of every head.
    """
    outputs = head_outputs(model, heads)
    if labels is None:
        names = named_labels(model)
        return names if names and len(names) in outputs.values() else None
    if outputs and len(labels) not in outputs.values():
        found = ", ".join(f"{name} has {count}" for name, count in outputs.items())
        raise ValueError(
            f"The adapter has {len(labels)} labels, but {type(model).__name__} has other numbers of outputs ({found}). "
            f"To load the adapter, build the model with num_labels={len(labels)} (and ignore_mismatched_sizes=True if "
            "its own head has another size), or use fact_peft.load_image_classifier, which does so. For a new adapter, "
            "pass one label per output, or leave labels=None."
        )
    return labels
