"""What FacT trains beside the factors when the user names nothing: the classifier, found by structure."""

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
    for prefix in ("", "timm_model"):  # the second is the one inside transformers' TimmWrapper
        wrapped: Any = getattr(model, prefix, None) if prefix else model
        if callable(getattr(wrapped, "get_classifier", None)):
            heads = wrapped.get_classifier()
            heads = heads if isinstance(heads, (tuple, list, nn.ModuleList)) else [heads]
            return [
                f"{prefix}.{name}" if prefix else name
                for name, module in walk(wrapped)
                if any(module is head for head in heads) and has_linear(module)
            ]
    if "Classification" not in type(model).__name__:
        return []
    others = {name: child for name, child in model.named_children() if not isinstance(child, PreTrainedModel)}
    if len(others) < len(list(model.children())):
        return [name for name, child in others.items() if has_linear(child)]
    # Without such a backbone, a head is what ends in one output per label.
    num_labels = getattr(getattr(model, "config", None), "num_labels", None)
    return [name for name, child in others.items() if has_linear(child, num_labels) and not find_blocks(child)]


def has_linear(module: nn.Module, out_features: int | None = None) -> bool:
    """Whether `module` is or contains a linear layer, of so many outputs if given."""
    shapes = [linear_shape(module), *find_linears(base_of(module)).values()]
    return any(shape is not None and out_features in (None, shape[1]) for shape in shapes)
