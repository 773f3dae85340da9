"""What is refused, or warned of, before a model is touched."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTuner
from torch import nn
from torch.distributed.tensor import DTensor

from ..adapter.config import FacTConfig
from ..adapter.renaming import inner_model, names_in_others, parts_with
from ..adapter.validation import FACTORS
from ..architecture.blocks import find_block_linears, find_blocks
from ..architecture.heads import find_classifiers
from ..architecture.linears import base_of, is_fused, part_names, walk
from ..method.tensorization import PARTS, block_of, describe_layout, read_layout
from .factors import FacTLayer, SharedFactors
from .layer import FacTLinear, find_quantization
from .removal import own_stacks

# Attributes that PEFT's containers of factors and heads have: none can be the name of an adapter in them.
RESERVED = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
# What PEFT adds to `modules_to_save` for these tasks, whether the model has it or not.
HEADS_OF_TASKS = {
    TaskType.SEQ_CLS: {"classifier", "score"},
    TaskType.TOKEN_CLS: {"classifier", "score"},
    TaskType.QUESTION_ANS: {"qa_outputs"},
}


def check_model(model: nn.Module) -> None:
    """Refuse a model that is adapted already, is sharded, or has a module of its own in the place of the factors.

    Factors made for a sharded model (FSDP2, tensor parallelism) would be whole on every rank, and nothing would sum
    their gradients.

    Raises:
        ValueError: If it is one of these.
    """
    if isinstance(model, (PeftModel, BaseTuner)) and any(isinstance(module, FacTLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has a FacT adapter already. Use model.add_adapter(name, config) or "
            "model.load_adapter(folder, name) for another one, or model.unload() to get the base model back."
        )
    if not isinstance(getattr(model, FACTORS, SharedFactors()), SharedFactors):
        raise ValueError(
            f"{type(model).__name__} has an attribute {FACTORS!r} of its own, where FacT registers the shared factors; "
            "rename it, or adapt a submodule."
        )
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} of {type(model).__name__} is already sharded over processes ({parameter.device_mesh}), so "
                "every rank would train an adapter of its own. Make or load the adapter first and shard the whole "
                "then, with fully_shard, accelerate or Trainer; load the base without a distributed_config."
            )


def check_adapter_name(adapter_name: str) -> None:
    """Refuse names that cannot be keys of the containers of factors and heads.

    Raises:
        ValueError: If the name is empty, has a dot, or is an attribute of ``nn.ModuleDict`` or ``nn.ParameterDict``.
    """
    if not adapter_name or "." in adapter_name or adapter_name in RESERVED:
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be the name of a parameter: it is empty, has a dot in it, or is an "
            "attribute of nn.ParameterDict or nn.ModuleDict (such as 'copy' or 'training'); choose another name."
        )


def check_owner(model: nn.Module, adapter_name: str, layers: Iterable[str]) -> None:
    """Refuse to redirect layers that a second model shares from that model's factors to new ones.

    Raises:
        ValueError: If one of `layers` has an adapter of this name whose factors belong to another model.
    """
    own = own_stacks(model)
    modules = dict(walk(model))
    for name in layers:
        layer = modules.get(name)
        stack = layer.fact_stacks.get(adapter_name) if isinstance(layer, FacTLinear) else None
        if stack is not None and not any(stack is mine for mine in own):
            raise ValueError(
                f"adapter_name={adapter_name!r} is taken: {name} already has an adapter of this name, whose factors "
                f"belong to another model that shares this layer with {type(model).__name__}. Choose another name, and "
                "call set_adapter before either model is used."
            )


def check_trainable(heads: Iterable[str], model: nn.Module) -> None:
    """Refuse modules to train in full that were quantised with the rest of the model.

    Raises:
        ValueError: If one is quantised, or a layer in it is.
    """
    for name, module in walk(model):
        if name.endswith(tuple(heads)):
            for layer in base_of(module).modules():
                backend = find_quantization(base_of(layer))
                if backend is not None:
                    raise ValueError(
                        f"The module {name} is quantised ({backend.backend_name}) and cannot be trained. Leave it out "
                        f"when quantising (modules_to_not_convert or llm_int8_skip_modules=[{name!r}]), or pass "
                        "modules_to_save=[]."
                    )


def check_parts(config: FacTConfig, model: nn.Module, linears: Iterable[str]) -> None:
    """Refuse part names, such as ``fc1.q``, of a layer that has no such parts.

    Raises:
        ValueError: If `target_modules` or `exclude_modules` lists one.
    """
    for field in ("target_modules", "exclude_modules"):
        asked = getattr(config, field)
        for part in asked if isinstance(asked, set) else []:
            layer, _, letter = part.rpartition(".")
            for name in linears if layer and letter in list(PARTS) else []:
                if f".{name}".endswith(f".{layer}") and not is_fused(model, name):
                    raise ValueError(
                        f"{field} has {part!r}, but {name} does not make queries, keys and values in one; name the "
                        "layer itself, or a layer that does, such as 'qkv.q'."
                    )


def check_blocks(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse factors of each block where the names of the layers do not say in which block they lie.

    Raises:
        ValueError: If a layer of a transformer block lies, by its name, in another one.
    """
    blocks = find_blocks(model)
    for name in layers:
        for block in blocks:
            if name.startswith(f"{block}.") and block_of(name) != block:
                raise ValueError(
                    f"share='block' cannot be had on {type(model).__name__}: {name} lies in the block {block}, but by "
                    f"its name in {block_of(name) or 'none'}; leave it out with exclude_modules, or take "
                    "share='model'."
                )


def check_shared_weights(model: nn.Module, layers: Iterable[str]) -> None:
    """Refuse layers whose weight would get an increment at one place and be used at another, or get two when merged.

    A block that is used at several places is no such case: its layers have one place, in the block.

    Raises:
        ValueError: If a layer is a child of two modules, or two layers have one weight.
    """
    first = {model.get_submodule(name): name for name in layers if has_module(model, name)}
    weights: dict[int, str] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if module not in first or name == first[module]:
            continue
        parents = [model.get_submodule(place.rpartition(".")[0]) for place in (name, first[module])]
        if parents[0] is not parents[1]:
            raise ValueError(
                f"{first[module]} and {name} are one layer at two places, and only the first would be adapted. Give "
                f"each its own (copy.deepcopy), or pass exclude_modules=[{first[module]!r}, {name!r}]."
            )
    for module, name in first.items():
        weight = base_of(module)._parameters.get("weight")
        other = weights.setdefault(id(weight), name) if weight is not None else name
        if other != name:
            raise ValueError(
                f"{other} and {name} have one weight (tied), which merging would change by both increments. Untie "
                f"them, or adapt one: exclude_modules=[{name!r}]."
            )


def has_module(model: nn.Module, name: str) -> bool:
    """Whether `model` has a module of this name, which an in_proj is only later."""
    parent, _, child = name.rpartition(".")
    return child in model.get_submodule(parent)._modules


def check_readable(layout: list[str], targets: Mapping[str, tuple[int, int]], parts: Mapping[str, str]) -> None:
    """Refuse names that make a layout which cannot be read back, since the adapter would save and never load again.

    Raises:
        ValueError: If a layer has such a name.
    """
    try:
        readable = read_layout(layout) == (targets, parts)
    except ValueError:
        readable = False
    if not readable:
        raise ValueError(
            f"These layers cannot be written down, {some(targets)}: probably a name has a comma, a colon or a space in "
            "it; rename that module, or leave it out with exclude_modules."
        )


def warn_of_unmatched(asked: FacTConfig, model: nn.Module, linears: Iterable[str]) -> None:
    """Warn of names in `target_modules` and `modules_to_save` that match nothing, and name what would.

    Warns:
        UserWarning: If there is such a name.
    """
    layers = [part for name in linears for part in (name, *(part_names(name) if is_fused(model, name) else []))]
    suffixes = {layer.split(".", start)[-1] for layer in layers for start in range(layer.count(".") + 1)}
    targets = asked.target_modules if isinstance(asked.target_modules, set) else set()
    unmatched = sorted(targets - suffixes)
    if unmatched:
        last_names = dict.fromkeys(name.rpartition(".")[2] for name in linears)
        warnings.warn(
            f"target_modules has {some(map(repr, unmatched))}, which matches no linear layer of "
            f"{type(model).__name__}. Its linear layers are called {some(last_names, 12)}.",
            stacklevel=2,
        )
    names = [name for name, _ in walk(model)]
    by_peft: set[str] = HEADS_OF_TASKS.get(asked.task_type, set())  # type: ignore[call-overload]
    heads = [name for name in asked.modules_to_save or [] if name not in by_peft]
    unmatched = [head for head in heads if not any(name.endswith(head) for name in names)]
    if unmatched:
        found = find_classifiers(model) or [name for name, _ in model.named_children()]
        warnings.warn(
            f"modules_to_save has {', '.join(map(repr, unmatched))}, which matches no module of "
            f"{type(model).__name__}, so nothing of that name is trained or saved. It has {some(found)}.",
            stacklevel=2,
        )


def layout_mismatch(config: FacTConfig, layout: list[str], model: nn.Module) -> str:
    """Say how the layers an adapter was trained on differ from those it now meets."""
    assert config.layout is not None
    adapter_only = [line for line in config.layout if line not in layout] or config.layout
    model_only = [line for line in layout if line not in config.layout] or layout
    model_only = model_only or describe_layout(find_block_linears(model)) or ["no matching linear layer"]
    return (
        f"This FacT adapter belongs to other linear layers than {type(model).__name__} has:\n"
        + "".join(f"  adapter: {line}\n" for line in adapter_only)
        + "".join(f"  model:   {line}\n" for line in model_only)
        + where_it_fits(config, model)
        + f"Load it on the backbone it was trained on (base_model_name_or_path={config.base_model_name_or_path!r}); "
        "to start a new adapter with this config, set layout=None."
    )


def where_it_fits(config: FacTConfig, model: nn.Module) -> str:
    """A sentence on the part of `model` that has the layers of an adapter, or on the parts that only the adapter has;
    empty if it is neither."""
    assert config.layout is not None
    layers = read_layout(config.layout)[0]
    parts = parts_with(layers, model)
    if parts:
        calls = " or ".join(f"PeftModel.from_pretrained(model.{part}, ...)" for part in parts)
        return f"A part of the model has these layers; load it there: {calls}.\n"
    roots = {layer.partition(".")[0] for layer in layers}
    own = roots & {inner_model(model), *names_in_others(model)}
    others = sorted(roots - own)
    if not own or not others:
        return ""
    return (
        f"It has layers of {', '.join(others)} too: load it on the whole model and use {', '.join(own)} from there, or "
        f'train one without them, with exclude_modules=r"({"|".join(others)})\\..*".\n'
    )


def some(names: Iterable[Any], count: int = 6) -> str:
    """The first few names, for an error message."""
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "") or "none"
