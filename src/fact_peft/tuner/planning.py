"""What an adapter will consist of, settled on names and shapes before the model is touched."""

from __future__ import annotations

import copy
import logging
import warnings
from dataclasses import replace
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn

from ..adapter.config import FacTConfig
from ..adapter.names import FACTORS, UNCHANGED, find_renaming, mark_local_folder
from ..architecture.blocks import find_block_linears
from ..architecture.heads import find_classifiers, fitting_labels
from ..architecture.linears import IN_PROJ, base_of, check_order, find_linears, is_fused, part_names, walk
from ..method.tensorization import PARTS, describe_layout, tensorize
from ..upstream import ExcludedModule, find_minimal_target_modules, include_all_linear_layers
from .refusals import (
    check_adapter_name,
    check_blocks,
    check_model,
    check_owner,
    check_parts,
    check_readable,
    check_shared_weights,
    check_trainable,
    layout_mismatch,
    some,
    warn_of_unmatched,
)

logger = logging.getLogger(__name__)


def resolve(asked: FacTConfig, model: nn.Module, adapter_name: str = "default") -> FacTConfig:
    """What a config means for a model; neither is changed.

    Args:
        asked: What the user asks for, or the config of a saved adapter, which has a layout.
        model: The model to adapt.
        adapter_name: Name of the adapter to make.

    Returns:
        A copy of the config with heads, labels, targets and layout settled, in the names of the model.

    Warns:
        UserWarning: If a name in the config matches nothing, or it says `fan_in_fan_out` of an ``nn.Linear``.

    Raises:
        NoMatchingPeftModuleError: If nothing is targeted.
        ValueError: If the config does not fit the model, or the model cannot be adapted; see `refusals`.
    """
    check_adapter_name(adapter_name)
    check_model(model)
    config = copy.copy(asked)
    config.base_model_name_or_path = mark_local_folder(config.base_model_name_or_path)
    config.renaming = find_renaming(config.slices, model) if config.layout else UNCHANGED
    settle_heads(config, model)
    settle_targets(config, model)
    targets, parts = settle_layout(config, model)
    check_order(model, parts)
    check_shared_weights(model, targets)
    check_owner(model, adapter_name, targets)
    if config.share == "block":
        check_blocks(model, targets)
    slices = tensorize(targets, parts, config.share)
    for name, owned in slices.items():
        width = min(owned.in_width, owned.out_width)
        if config.rank > width:
            raise ValueError(
                f"rank={config.rank} is larger than {width}, the width of {name} ({owned.in_features} to "
                f"{owned.out_features} features); use a rank of at most {width}, or exclude_modules to leave it out."
            )
    if asked.layout is None:
        warn_of_unmatched(asked, model, find_linears(model))
    return config


def settle_heads(config: FacTConfig, model: nn.Module) -> None:
    """Settle `modules_to_save` and `labels`.

    What a saved adapter has trained in full is left out where the model does not have it: a bare model has no head, and
    a timm model without classes has ``nn.Identity`` in its place.

    Raises:
        ValueError: If a head is quantised, or the labels do not fit it.
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
            found = [module for other, module in walk(model) if other.endswith(name)]
            missing = bool(config.renaming.removed) and not found
            if missing or (found and not any(module.state_dict() for module in found)):
                left_out.append(saved)
            else:
                kept.append(name)
        config.modules_to_save = kept
    heads = config.modules_to_save or []
    check_trainable(heads, model)
    if left_out:
        logger.info("%s has no %s: left out of the adapter.", type(model).__name__, ", ".join(left_out))
        config.renaming = replace(config.renaming, left_out=tuple(left_out))
        config.labels = config.labels if heads else None
    try:
        config.labels = fitting_labels(config.labels, model, heads)
    except ValueError:
        if not config.ignores_mismatched_head:
            raise
        config.labels = fitting_labels(None, model, heads)


def settle_targets(config: FacTConfig, model: nn.Module) -> None:
    """Settle `target_modules`: names or suffixes of linear layers, or the user's regex.

    Raises:
        ValueError: If the model has no transformer blocks and nothing is named.
    """
    asked = config.target_modules
    if config.target_modules is None:
        config.target_modules = default_targets(config, model)
    all_linear = str(config.target_modules).lower() == "all-linear"
    include_all_linear_layers(config, model)
    if all_linear:  # PEFT looks for modules, which an in_proj becomes only later
        assert isinstance(config.target_modules, set)
        config.target_modules |= {name for name in find_linears(model) if name.rpartition(".")[2] == IN_PROJ}
    if isinstance(config.target_modules, set) and config.target_modules and config.target_modules is not asked:
        # As suffixes, so that a deeper model matches more layers than the layout lists, and is noticed.
        config.target_modules = shortest(config.target_modules, model)


def shortest(targets: set[str], model: nn.Module) -> set[str]:
    """The shortest suffixes that tell `targets` from all other modules of the model."""
    return find_minimal_target_modules(targets, {*(name for name, _ in walk(model)), *find_linears(model)} - targets)


def default_targets(config: FacTConfig, model: nn.Module) -> set[str]:
    """The linear layers of the transformer blocks, less those that the config's other fields leave out.

    Raises:
        ValueError: If the model has no transformer blocks.
    """
    layers = find_block_linears(model)
    if not layers:
        raise ValueError(
            "Please specify `target_modules` in `peft_config`: no repeated transformer blocks were found in "
            f"{type(model).__name__}. Its linear layers: {some(find_linears(model))}."
        )
    # PEFT applies layers_to_transform to suffixes only, so each layer is asked for by its last name.
    query = copy.copy(config)
    targets = set()
    for name in layers:
        query.target_modules = {name.rpartition(".")[2]}
        if is_targeted(query, name):
            targets.add(name)
    return targets


def is_targeted(config: Any, name: str | None) -> Any:
    """PEFT's answer to whether `config` targets the module `name`; never the factors of another adapter."""
    if name is None or name.partition(".")[0] == FACTORS:
        return False
    answer = check_target_module_exists(config, name)
    if config.layers_to_transform is None or not isinstance(answer, bool):  # an excluded module is no bool
        return answer
    # PEFT looks for an index behind two names. With a dot more, blocks right under a timm model ("blocks.0") and stages
    # there ("layers.0.blocks.0") are counted as the deeper ones of transformers are.
    return check_target_module_exists(config, f".{name}")


def targeted_parts(config: FacTConfig, name: str | None, fused: bool) -> str:
    """Which of q, k and v of the linear layer `name` are targeted; of a layer that is not fused, all or none."""
    whole = is_targeted(config, name)
    if isinstance(whole, ExcludedModule) or not fused:
        return PARTS if whole else ""
    answers = {part: is_targeted(config, f"{name}.{part}") for part in PARTS}
    return "".join(
        part for part, answer in answers.items() if answer or (whole and not isinstance(answer, ExcludedModule))
    )


def settle_layout(config: FacTConfig, model: nn.Module) -> tuple[dict[str, tuple[int, int]], dict[str, str]]:
    """Settle `layout` and `fan_in_fan_out`; return the shapes of the targeted layers and their parts, by name.

    Targets are matched under the names that a saved adapter has for the layers.

    Raises:
        NoMatchingPeftModuleError: If nothing is targeted.
        ValueError: If a target is not a linear layer or a part that a layer does not have, or the config has the layout
            of other layers.
    """
    linears, modules = find_linears(model), dict(walk(model))
    saved = {name: config.renaming.saved(name) for name in {**linears, **modules}}
    for name, module in modules.items():
        if name not in linears and is_targeted(config, saved[name]):
            raise ValueError(
                f"target_modules={config.target_modules!r} matches {name}, a {type(module).__name__}; FacT adapts "
                "nn.Linear and Conv1D layers, and in_proj and out_proj of nn.MultiheadAttention. Name linear layers "
                "only, or leave target_modules=None to adapt all of them inside the transformer blocks."
            )
    check_parts(config, model, linears)
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
        raise ValueError(layout_mismatch(config, layout, model))
    if not targets:
        raise NoMatchingPeftModuleError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} matches no linear layer of {type(model).__name__}. "
            f"It has, among others, {some(linears)}. Leave target_modules=None to adapt all linear layers inside the "
            "transformer blocks."
        )
    if config.layout is None:
        check_readable(layout, targets, parts)
    if config.renaming.changes_names:  # what selected these layers was said in other names
        names = {part for name in targets for part in part_names(name, parts.get(name, ""))}
        config.target_modules = shortest(names, model)
        config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.layout = layout
    return targets, parts
