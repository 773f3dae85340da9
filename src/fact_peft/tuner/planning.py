"""Settles what a config means for a model, from names and shapes, before the model is changed."""

import copy
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..adapter.config import FacTConfig
from ..adapter.names import FACTORS, UNCHANGED, find_renaming, first_few, mark_local_folder
from ..architecture.blocks import find_block_linears
from ..architecture.heads import find_classifiers, fitting_labels
from ..architecture.linears import IN_PROJ, base_of, check_order, find_linears, is_fused, part_names, walk
from ..method.tensorization import PARTS, describe_layout
from ..upstream import ExcludedModule, find_minimal_target_modules, include_all_linear_layers
from . import refusals

logger = logging.getLogger(__name__)
Shape = tuple[int, int]  # (in_features, out_features)


def resolve(asked: FacTConfig, model: nn.Module, adapter_name: str = "default") -> FacTConfig:
    """A copy of a config with heads, labels, targets and layout settled for a model, in the model's names.

    `asked` is the user's config, or that of a saved adapter, which has a layout. Nothing is changed.
    """
    refusals.check_model(model)
    refusals.check_adapter_name(adapter_name, model)
    config = copy.copy(asked)
    config.base_model_name_or_path = mark_local_folder(config.base_model_name_or_path)
    config.renaming = find_renaming(config.slices, model) if config.layout else UNCHANGED
    linears, modules = find_linears(model), dict(walk(model))
    settle_heads(config, model, modules)
    settle_targets(config, model, linears, modules)
    targets, parts = settle_layout(config, model, linears, modules)
    refusals.check_complete(config, named(config.modules_to_save, modules))
    refusals.check_inner_heads(config, model, adapter_name)
    config.saved_others = None  # the adapters that are made of this config, such as weighted sums, have no file
    if parts:
        check_order(model, parts)
    layers = {name: modules[name] for name in targets if name in modules}  # an in_proj is not a module yet
    refusals.check_shared_weights(model, layers)
    refusals.check_owner(model, adapter_name, layers)
    if config.share == "block":
        refusals.check_blocks(model, targets)
    for name, owned in config.slices.items():
        width = min(owned.in_width, owned.out_width)
        if config.rank > width:
            raise ValueError(
                f"rank={config.rank} is larger than {width}, the width of {name} ({owned.in_features} to "
                f"{owned.out_features} features); use a rank of at most {width}, or exclude_modules to leave it out."
            )
    if asked.layout is None:
        refusals.warn_of_unmatched(asked, model, linears)
    return config


def settle_heads(config: FacTConfig, model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Settle `modules_to_save` and `labels`.

    Heads of a saved adapter are left out if the model does not have them: a bare model has no head, and a timm model
    without classes has ``nn.Identity`` in its place. Heads that are quantised or do not fit the labels are refused.
    """
    left_out = []
    if config.layout is None and config.modules_to_save is None:
        config.modules_to_save = find_classifiers(model) or None
        if config.modules_to_save:
            logger.info("FacT also trains and saves modules_to_save=%s; [] switches this off.", config.modules_to_save)
    elif config.layout is not None and config.modules_to_save:
        kept = []
        for saved in config.modules_to_save:
            name = saved.removeprefix(config.renaming.removed)
            found = [module for other, module in modules.items() if other.endswith(name)]
            missing = bool(config.renaming.removed) and not found
            if missing or (found and not any(module.state_dict() for module in found)):
                left_out.append(saved)
            else:
                kept.append(name)
        config.modules_to_save = kept
    heads = named(config.modules_to_save, modules)
    refusals.check_trainable(heads)
    if left_out:
        logger.info("%s has no %s: left out of the adapter.", type(model).__name__, ", ".join(left_out))
        config.renaming = replace(config.renaming, left_out=tuple(left_out))
        config.labels = config.labels if config.modules_to_save else None
    try:
        config.labels = fitting_labels(config.labels, model, heads)
    except ValueError:
        if not config.ignores_mismatched_head:
            raise
        config.labels = fitting_labels(None, model, heads)


def named(heads: list[str] | None, modules: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    """The modules whose names end with those of `heads`."""
    return {name: module for name, module in modules.items() if name.endswith(tuple(heads or []))}


def settle_targets(
    config: FacTConfig, model: nn.Module, linears: Mapping[str, Shape], modules: Mapping[str, nn.Module]
) -> None:
    """Settle `target_modules`: suffixes of linear layers, or the user's regex."""
    if config.target_modules is None:
        targets = default_targets(config, model)
    elif str(config.target_modules).lower() == "all-linear":
        include_all_linear_layers(config, model)
        # PEFT also finds the insides of heads that are wrapped already. It finds modules only, and an in_proj is a
        # parameter until it is adapted.
        targets = {name for name in linears if name in config.target_modules or name.rpartition(".")[2] == IN_PROJ}
    else:
        return
    # With suffixes, a deeper model matches more layers than the layout lists, and the adapter is refused there.
    config.target_modules = find_minimal_target_modules(targets, {*linears, *modules} - targets) if targets else targets


def default_targets(config: FacTConfig, model: nn.Module) -> set[str]:
    """The linear layers of the transformer blocks, without those that other fields of the config exclude."""
    layers = find_block_linears(model)
    if not layers:
        raise ValueError(
            "Please specify `target_modules` in `peft_config`: no repeated transformer blocks were found in "
            f"{type(model).__name__}. Its linear layers: {first_few(find_linears(model))}."
        )
    # PEFT applies layers_to_transform only to suffixes, so each layer is matched by its last name.
    query = copy.copy(config)
    targets = set()
    for name in layers:
        query.target_modules = {name.rpartition(".")[2]}
        if is_targeted(query, name):
            targets.add(name)
    return targets


def is_targeted(config: Any, name: str | None) -> Any:
    """Whether `config` targets the module `name`, as PEFT answers it. Factors are never targeted."""
    if name is None or name.partition(".")[0] == FACTORS:
        return False
    answer = check_target_module_exists(config, name)
    if config.layers_to_transform is None or not isinstance(answer, bool):  # an excluded module is no bool
        return answer
    # PEFT expects the index of a block after two names. With the additional dot it also finds blocks right below a timm
    # model ("blocks.0") and in stages there ("layers.0.blocks.0").
    return check_target_module_exists(config, f".{name}")


def targeted_parts(config: FacTConfig, name: str | None, fused: bool) -> str:
    """Which of q, k and v of the linear layer `name` are targeted. If the layer is not fused, all or none."""
    whole = is_targeted(config, name)
    if isinstance(whole, ExcludedModule) or not fused:
        return PARTS if whole else ""
    answers = {part: is_targeted(config, f"{name}.{part}") for part in PARTS}
    return "".join(
        part for part, answer in answers.items() if answer or (whole and not isinstance(answer, ExcludedModule))
    )


def settle_layout(
    config: FacTConfig, model: nn.Module, linears: Mapping[str, Shape], modules: Mapping[str, nn.Module]
) -> tuple[dict[str, Shape], dict[str, str]]:
    """Settle `layout` and `fan_in_fan_out`, and return the shapes and the parts of the targeted layers, by name.

    Targets are matched under the names that the layers have in a saved adapter.
    """
    saved = {name: config.renaming.saved(name) for name in {**linears, **modules}}
    for name, module in modules.items():
        if name not in linears and is_targeted(config, saved[name]):
            raise ValueError(
                f"target_modules={config.target_modules!r} matches {name}, a {type(module).__name__}; FacT adapts "
                "nn.Linear and Conv1D layers, and in_proj and out_proj of nn.MultiheadAttention. Name linear layers "
                "only, or leave target_modules=None to adapt all of them inside the transformer blocks."
            )
    refusals.check_parts(config, model, linears)
    wanted = {name: targeted_parts(config, saved[name], is_fused(model, name)) for name in linears}
    targets = {name: shape for name, shape in linears.items() if wanted[name]}
    parts = {name: wanted[name] for name in targets if wanted[name] != PARTS}
    for name in targets:
        if config.fan_in_fan_out and name in modules and isinstance(base_of(modules[name]), nn.Linear):
            warnings.warn(
                f"fan_in_fan_out=True, but {name} is an nn.Linear, which stores its weight as (out, in); "
                "setting fan_in_fan_out=False.",
                stacklevel=2,
            )
            config.fan_in_fan_out = False
    layout = describe_layout(targets, parts)
    as_saved = describe_layout(
        {str(saved[name]): shape for name, shape in targets.items()}, {str(saved[name]): parts[name] for name in parts}
    )
    if config.layout not in (None, as_saved):
        raise ValueError(refusals.layout_mismatch(config, layout, model))
    if not targets:
        raise NoMatchingPeftModuleError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} matches no linear layer of {type(model).__name__}. "
            f"It has, among others, {first_few(linears)}. Leave target_modules=None to adapt all linear layers inside "
            "the transformer blocks."
        )
    if config.layout is None:
        refusals.check_readable(layout, targets, parts)
    if config.renaming.changes_names:  # the fields that selected these layers contain the saved names
        names = {part for name in targets for part in part_names(name, parts.get(name, ""))}
        config.target_modules = find_minimal_target_modules(names, {*linears, *modules} - names)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.layout = layout
    return targets, parts
