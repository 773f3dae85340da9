"""The classifier of a model, found by structure, and the class names in the order of its outputs."""

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from .blocks import find_blocks
from .linears import base_of, find_linears, linear_shape, walk


def find_classifiers(model: nn.Module) -> list[str]:
    """Names of the classification heads of `model`; empty if it is not a classification model.

    On a transformers ``...For...Classification`` model these are all top-level modules with linear layers beside the
    backbone, which is a model of its own: transformers initialises every one of them at random, so that an adapter
    saved without one could not be used again. On a timm model they are what ``get_classifier()`` returns.
    """
    owners: dict[str, Any] = {"": model, "timm_model.": getattr(model, "timm_model", None)}  # or inside TimmWrapper
    for prefix, owner in owners.items():
        if callable(getattr(owner, "get_classifier", None)):
            heads = owner.get_classifier()
            heads = heads if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
            named = [(name, module) for name, module in walk(owner) if any(module is head for head in heads)]
            return [f"{prefix}{name}" for name, module in named if has_linear(module)]
    if "Classification" not in type(model).__name__:
        return []
    others = {name: child for name, child in model.named_children() if not isinstance(child, PreTrainedModel)}
    if len(others) < len(list(model.children())):
        return [name for name, child in others.items() if has_linear(child)]
    # Without such a backbone, a head is what ends in one output per label.
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    return [name for name, child in others.items() if has_linear(child, num_labels) and not find_blocks(child)]


def has_linear(module: nn.Module, out_features: int | None = None) -> bool:
    """Whether `module` is or contains a linear layer, with `out_features` outputs if given."""
    shapes = [linear_shape(module), *find_linears(base_of(module)).values()]
    return any(shape is not None and out_features in (None, shape[1]) for shape in shapes)


def named_labels(model: nn.Module) -> list[str] | None:
    """The class names in the config of a transformers model, or None."""
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
    """`labels`, or the names in the config of `model` if `labels` are the placeholders of transformers."""
    names = named_labels(model)
    if labels and names and len(names) == len(labels) and labels == [f"LABEL_{i}" for i in range(len(labels))]:
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


def fitting_labels(labels: list[str] | None, model: nn.Module, heads: Mapping[str, nn.Module]) -> list[str] | None:
    """The labels of an adapter that trains `heads` of `model`: `labels`, or if None those in the model's config."""
    outputs = {name: count for name, head in heads.items() if (count := num_outputs(head)) is not None}
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
