"""The same layers in a head model and in its bare model: their names differ by the base model's prefix.

``ViTForImageClassification`` has ``vit.layers.0.mlp.fc1`` where ``ViTModel`` has ``layers.0.mlp.fc1``; transformers
knows the prefix as ``base_model_prefix``. The tower in ``CLIPForImageClassification`` is called ``vision_model``, which
follows from the key of its config, ``vision_config``. An adapter of one loads on the other if all its layers, renamed,
are exactly those that the other has.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from torch import nn
from transformers import PreTrainedModel

from ..architecture.linears import find_linears
from ..method.tensorization import split_stack
from .validation import FACTORS, PREFIX

Value = TypeVar("Value")


@dataclass(frozen=True)
class Renaming:
    """From the names that an adapter was saved with to those of a model.

    Attributes:
        removed: Prefix of the saved names that the model's names do not have, with its dot.
        added: Prefix of the model's names that the saved names do not have, with its dot.
        left_out: Saved names of the modules trained in full that the model does not have.
    """

    removed: str = ""
    added: str = ""
    left_out: tuple[str, ...] = ()

    @property
    def changes_names(self) -> bool:
        """Whether the names differ."""
        return bool(self.removed or self.added)

    def here(self, saved: str) -> str:
        """The name in the model; a name of the model stays as it is."""
        return self.added + saved.removeprefix(self.removed).removeprefix(self.added)

    def saved(self, name: str) -> str | None:
        """The saved name of a module of the model; None if the adapter's model cannot have had it."""
        return self.removed + name.removeprefix(self.added) if name.startswith(self.added) else None

    def tensors(self, tensors: Mapping[str, Value]) -> dict[str, Value]:
        """The tensors of a saved adapter under the names of the model, without those of the modules in `left_out`."""
        renamed = {}
        for key, tensor in tensors.items():
            name = key.removeprefix(PREFIX)
            prefix = key.removesuffix(name)
            first, _, rest = name.partition(".")
            if first == FACTORS:
                stack, _, factor = rest.partition(".")
                renamed[f"{prefix}{FACTORS}.{self.stack(stack)}.{factor}"] = tensor
            elif not any(name.startswith(f"{module}.") for module in self.left_out):
                renamed[prefix + self.here(name)] = tensor
        return renamed

    def stack(self, saved: str) -> str:
        """The name in the model of a stack of factors. It contains that of a block if every block has its own."""
        shape, block = split_stack(saved)
        dashed = Renaming(self.removed.replace(".", "-"), self.added.replace(".", "-"))
        return f"{shape}@{dashed.here(block)}" if block else saved


UNCHANGED = Renaming()


def find_renaming(layers: Iterable[str], model: nn.Module) -> Renaming:
    """How `layers` of a saved adapter have to be renamed to be layers of `model`; not at all if it has one of them."""
    layers = set(layers)
    if not find_linears(model).keys().isdisjoint(layers):
        return UNCHANGED
    inner = inner_model(model)
    if inner:
        return Renaming(added=f"{inner}.")
    for name in names_in_others(model):
        if all(layer.startswith(f"{name}.") for layer in layers):
            return Renaming(removed=f"{name}.")
    return UNCHANGED


def inner_model(model: nn.Module) -> str:
    """The name of the bare model in a head model: transformers' prefix, or the only tower inside; else empty."""
    base = str(getattr(model, "base_model_prefix", ""))
    if base and hasattr(model, base):
        return base
    inside = bare_models(model)
    return inside[0] if len(inside) == 1 else ""


def names_in_others(model: nn.Module) -> list[str]:
    """What a bare model is called in a head model: transformers' prefix, or a tower by the key of its config."""
    key = str(getattr(getattr(model, "config", None), "base_config_key", ""))
    tower = key.removesuffix("config") + "model"  # vision_config and vision_model
    return [name for name in (getattr(model, "base_model_prefix", ""), tower if key else "") if name]


def bare_models(model: nn.Module) -> list[str]:
    """Names of the children that are bare models, which an encoder that is a ``PreTrainedModel`` is not."""
    children = model.named_children()
    return [name for name, child in children if isinstance(child, PreTrainedModel) and name in names_in_others(child)]


def parts_with(layers: Mapping[str, tuple[int, int]], model: nn.Module) -> list[str]:
    """Names of the bare models in `model` that have `layers`, of these shapes, under the same names or renamed."""
    found = []
    for name in bare_models(model):
        part = model.get_submodule(name)
        linears, renaming = find_linears(part), find_renaming(layers, part)
        if all(linears.get(renaming.here(layer)) == shape for layer, shape in layers.items()):
            found.append(name)
    return found
