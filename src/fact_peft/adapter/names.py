"""Names: of tensors in an adapter file, of layers in a model, of repositories on the Hub, and names as printed text.

The same layer has two names in a head model and in its bare model, which differ by the base model's prefix.
``ViTForImageClassification`` has ``vit.layers.0.mlp.fc1`` where ``ViTModel`` has ``layers.0.mlp.fc1``; transformers
stores the prefix as ``base_model_prefix``. The tower in ``CLIPForImageClassification`` is called ``vision_model``; its
name follows from the key of its config, ``vision_config``. An adapter of one loads on the other if all its layers,
renamed, are exactly those that the other has.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from huggingface_hub.utils import HFValidationError, validate_repo_id
from torch import nn
from transformers import PreTrainedModel

from ..architecture.linears import find_linears

PREFIX = "base_model.model."  # of every name in an adapter file
# Name of the module that owns the factors. It does not contain PEFT's prefix "fact_", since PEFT skips modules with
# the prefix in their name when it deletes adapters.
FACTORS = "factors"
Value = TypeVar("Value")


def factor_key(stack: str, letter: str) -> str:
    """Name of a factor in the adapted model, without the adapter's name."""
    return f"{FACTORS}.{stack}.fact_{letter}"


def by_key(groups: Mapping[str, Mapping[str, Value]]) -> dict[str, Value]:
    """What there is by stack and paper letter, by `factor_key`."""
    return {factor_key(stack, letter): value for stack, group in groups.items() for letter, value in group.items()}


def is_of_inner_adapter(name: str) -> bool:
    """Whether a name without `PREFIX` is of a part that is itself a `PeftModel`.

    PEFT also saves the trained heads of such a part if its adapter has the same name as the adapter that is saved.
    """
    return f".{PREFIX}" in name


@dataclass(frozen=True)
class Renaming:
    """From the names that an adapter was saved with to those of a model."""

    removed: str = ""  # prefix of the saved names that the model's names do not have, with its dot
    added: str = ""  # prefix of the model's names that the saved names do not have, with its dot
    left_out: tuple[str, ...] = ()  # saved names of the modules trained in full that the model does not have

    @property
    def changes_names(self) -> bool:
        """Whether the names differ."""
        return bool(self.removed or self.added)

    def here(self, saved: str) -> str:
        """The name in the model of a saved name; a name of the model is returned as it is."""
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
        """The name in the model of a stack of factors, which contains the name of a block with ``share="block"``."""
        shape, _, block = saved.partition("@")  # see `Slices.stack`; the block has dashes for dots
        dashed = Renaming(self.removed.replace(".", "-"), self.added.replace(".", "-"))
        return f"{shape}@{dashed.here(block)}" if block else saved


UNCHANGED = Renaming()


def find_renaming(layers: Iterable[str], model: nn.Module) -> Renaming:
    """From the names `layers` of a saved adapter to those of `model`; `UNCHANGED` if `model` has one of them."""
    layers = set(layers)
    if not find_linears(model).keys().isdisjoint(layers):
        return UNCHANGED
    if inner := inner_model(model):
        return Renaming(added=f"{inner}.")
    for name in names_in_others(model):
        if all(layer.startswith(f"{name}.") for layer in layers):
            return Renaming(removed=f"{name}.")
    return UNCHANGED


def inner_model(model: nn.Module) -> str:
    """The name of the bare model in a head model: transformers' prefix, or the only tower inside; empty if none."""
    base = str(getattr(model, "base_model_prefix", ""))
    if base and hasattr(model, base):
        return base
    inside = bare_models(model)
    return inside[0] if len(inside) == 1 else ""


def names_in_others(model: nn.Module) -> list[str]:
    """The names of a bare model in head models: transformers' prefix, and for a tower the one by its config's key."""
    key = str(getattr(getattr(model, "config", None), "base_config_key", ""))
    tower = key.removesuffix("config") + "model"  # vision_config and vision_model
    return [name for name in (getattr(model, "base_model_prefix", ""), tower if key else "") if name]


def bare_models(model: nn.Module) -> list[str]:
    """Names of the children that are bare models. Encoders that are a ``PreTrainedModel`` are none."""
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


def is_hub_id(name: str | None) -> bool:
    """Whether `name` can be a repository on the Hub, and is not a local file or folder."""
    return bool(name) and not Path(str(name)).exists() and is_valid_hub_id(str(name))


def is_valid_hub_id(name: str) -> bool:
    """Whether the Hub allows the name."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def mark_local_folder(name: str | None) -> str | None:
    """`name`, with ``./`` in front if it is a relative folder whose name could be mistaken for one on the Hub."""
    if name and not Path(name).is_absolute() and Path(name).exists() and is_valid_hub_id(name):
        return f"./{name}"
    return name


def for_terminal(text: str) -> str:
    """`text` with line breaks, escape sequences and the like escaped as in a Python string."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_few(names: Iterable[str], count: int = 6, separator: str = ", ") -> str:
    """The first few names, for an error message."""
    names = list(names)
    more = f"{separator}... ({len(names)} in all)" if len(names) > count else ""
    return for_terminal(separator.join(names[:count])) + more or "none"


def for_markdown(text: str) -> str:
    """`text` with every character escaped that has a meaning in Markdown or HTML."""
    text = re.sub(r"[\\`*_{}\[\]()#+!|~$^=:@\"']", r"\\\g<0>", for_terminal(text))
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def as_code(text: str) -> str:
    """`text` as a code span of Markdown."""
    text = for_terminal(text)
    if not text.strip():
        text = f'"{text}"'  # Markdown has no empty code span
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    padding = " " if text[0] == "`" or text[-1] == "`" or text[0] == text[-1] == " " else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def for_python(text: str) -> str:
    """`text` as a Python string literal on one line."""
    return '"' + "".join(f"\\{c}" if c in '"\\' else for_terminal(c) for c in text) + '"'
