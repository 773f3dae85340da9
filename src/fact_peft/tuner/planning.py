"""What an adapter will consist of, settled on names and shapes before the model is touched."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable
from typing import Any

from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.error import NoMatchingPeftModuleError
from torch import nn
from torch.distributed.tensor import DTensor

from ..adapter.config import FacTConfig
from ..adapter.names import mark_local_folder
from ..adapter.validation import FACTORS
from ..architecture.blocks import find_block_linears, find_blocks
from ..architecture.fused import check_order, is_fused
from ..architecture.heads import find_classifiers
from ..architecture.labels import fitting_labels
from ..architecture.linears import base_of, find_linears, walk
from ..architecture.multihead import IN_PROJ
from ..method.tensorization import PARTS, Slices, block_of, describe_layout, read_layout, tensorize
from ..upstream import ExcludedModule, find_minimal_target_modules, include_all_linear_layers
from .factors import SharedFactors
from .layer import find_quantization

logger = logging.getLogger(__name__)


def resolve(asked: FacTConfig, model: nn.Module, adapter_name: str) -> FacTConfig:
    """What a config means for a model, which is not changed.

    Args:
        asked: What the user asks for.
        model: The model to adapt.

    Returns:
        A copy of the config in which heads, labels, targets and layout are settled, and which slices each targeted
        layer will own, by its name.

    Raises:
        NoMatchingPeftModuleError: If nothing is targeted.
        ValueError: If labels or head do not fit, a target is not a linear layer, the rank exceeds a layer's width, the
            config carries the layout of other layers, the model has something else in the place of the factors, or
            it is already sharded.
    """
    check_adapter_name(adapter_name)
    check_not_sharded(model)
    config = copy.copy(asked)
    config.base_model_name_or_path = mark_local_folder(config.base_model_name_or_path)
    if config.modules_to_save is None:
        classifiers = find_classifiers(model)
        if classifiers:
            check_trainable(classifiers, model)
            config.modules_to_save = classifiers
            logger.info("FacT also trains and saves modules_to_save=%s; pass [] to switch this off.", classifiers)
    heads = config.modules_to_save or []
    try:
        config.labels = fitting_labels(config.labels, model, heads)
    except ValueError:
        if not asked.ignores_mismatched_head:
            raise
        config.labels = fitting_labels(None, model, heads)
    if config.target_modules is None:
        config.target_modules = default_targets(config, model)
    all_linear = str(config.target_modules).lower() == "all-linear"
    include_all_linear_layers(config, model)
    if all_linear:  # PEFT looks for modules, which an in_proj becomes only later
        assert isinstance(config.target_modules, set)
        config.target_modules |= {name for name in find_linears(model) if name.rpartition(".")[2] == IN_PROJ}
    targets = config.target_modules
    if isinstance(targets, set) and targets and targets is not asked.target_modules:
        # As suffixes, so that a deeper model matches more layers than the layout lists, and is noticed.
        others = {*(name for name, _ in walk(model)), *find_linears(model)} - targets
        config.target_modules = find_minimal_target_modules(targets, others)
    plan_slices(config, model)
    if not asked.inference_mode:
        return config
    # `PeftModel.from_pretrained(model, folder, config=config)` hands over the adapter's own config and keeps it.
    vars(asked).update(vars(config))
    return asked


def check_trainable(heads: list[str], model: nn.Module) -> None:
    """Refuse heads that were quantised with the rest of the model.

    Raises:
        ValueError: If a head is quantised.
    """
    for name in heads:
        backend = find_quantization(base_of(model.get_submodule(name)))
        if backend is not None:
            raise ValueError(
                f"The classifier {name} is quantised ({backend.backend_name}) and cannot be trained. Leave it out when "
                f"quantising (modules_to_not_convert or llm_int8_skip_modules=[{name!r}]), or pass modules_to_save=[]."
            )


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


def is_targeted(config: Any, name: str) -> Any:
    """PEFT's answer to whether `config` targets the module `name`; never the factors of another adapter."""
    if name.partition(".")[0] == FACTORS:
        return False
    answer = check_target_module_exists(config, name)
    if config.layers_to_transform is None or not isinstance(answer, bool):  # an excluded module is no bool
        return answer
    # PEFT looks for an index behind two names. With a dot more, blocks right under a timm model ("blocks.0") and stages
    # there ("layers.0.blocks.0") are counted as the deeper ones of transformers are.
    return check_target_module_exists(config, f".{name}")


def targeted_parts(config: FacTConfig, model: nn.Module, name: str) -> str:
    """Which of q, k and v of the linear layer `name` are targeted; of a layer that is not fused, all or none."""
    whole = is_targeted(config, name)
    if isinstance(whole, ExcludedModule) or not is_fused(model, name):
        return PARTS if whole else ""
    answers = {part: is_targeted(config, f"{name}.{part}") for part in PARTS}
    return "".join(
        part for part, answer in answers.items() if answer or (whole and not isinstance(answer, ExcludedModule))
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
    """Refuse to share factors in a block that the names of its layers do not tell.

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


def check_not_sharded(model: nn.Module) -> None:
    """Refuse a model that is already spread over processes by FSDP2 or tensor parallelism.

    Factors made now would lie whole on every rank, and nobody would sum their gradients: one adapter a rank.

    Raises:
        ValueError: If a parameter is a DTensor.
    """
    for name, parameter in model.named_parameters():
        if isinstance(parameter, DTensor):
            raise ValueError(
                f"{name} of {type(model).__name__} is already sharded over processes ({parameter.device_mesh}), so "
                "every rank would train an adapter of its own. Make or load the adapter first and shard the whole "
                "then, with fully_shard, accelerate or Trainer; load the base without a distributed_config."
            )


def check_adapter_name(adapter_name: str) -> None:
    """Refuse names that cannot be keys of the factors' dicts.

    Raises:
        ValueError: If the name is empty, has a dot, or is an attribute of ``nn.ParameterDict``.
    """
    if not adapter_name or "." in adapter_name or hasattr(nn.ParameterDict, adapter_name):
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be the name of a parameter: it is empty, has a dot in it, or is an "
            "attribute of nn.ParameterDict (such as 'copy' or 'values'); choose another name."
        )


def plan_slices(config: FacTConfig, model: nn.Module) -> dict[str, Slices]:
    """Which slices each targeted layer will own; notes the layout on the config.

    Warns:
        UserWarning: If the config says `fan_in_fan_out` of an ``nn.Linear``.

    Raises:
        NoMatchingPeftModuleError: If nothing is targeted.
        ValueError: If a target is not a linear layer, or a part of one whose outputs are not q, k and v; the rank
            exceeds a layer's width; the config carries the layout of other layers; its `share` needs blocks that are
            not to be told; or the model has something else in the place of the factors.
    """
    if not isinstance(getattr(model, FACTORS, SharedFactors()), SharedFactors):
        raise ValueError(
            f"{type(model).__name__} has an attribute {FACTORS!r} of its own, where FacT registers the shared factors; "
            "rename it, or adapt a submodule."
        )
    linears, modules = find_linears(model), dict(walk(model))
    for name, module in modules.items():
        if name not in linears and is_targeted(config, name):
            raise ValueError(
                f"target_modules={config.target_modules!r} matches {name}, a {type(module).__name__}; FacT adapts "
                "nn.Linear and Conv1D layers, and in_proj and out_proj of nn.MultiheadAttention. Name linear layers "
                "only, or leave target_modules=None to adapt all of them inside the transformer blocks."
            )
    check_parts(config, model, linears)
    wanted = {name: targeted_parts(config, model, name) for name in linears}
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
    if config.layout is not None and config.layout != layout:
        raise ValueError(layout_mismatch(config, layout, model))
    if not targets:
        raise NoMatchingPeftModuleError(
            f"target_modules={config.target_modules!r} with exclude_modules={config.exclude_modules!r} and "
            f"layers_to_transform={config.layers_to_transform!r} matches no linear layer of {type(model).__name__}. "
            f"It has, among others, {some(linears)}. Leave target_modules=None to adapt all linear layers inside the "
            "transformer blocks."
        )
    check_order(model, parts)
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
    if config.layout is None:
        check_readable(layout, targets, parts)
        config.layout = layout
    return slices


def check_readable(layout: list[str], targets: dict[str, tuple[int, int]], parts: dict[str, str]) -> None:
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
        + f"Load it on the backbone it was trained on (base_model_name_or_path={config.base_model_name_or_path!r}); "
        "to start a new adapter with this config, set layout=None."
    )


def some(names: Iterable[str], count: int = 6) -> str:
    """The first few names, for an error message."""
    names = list(names)
    return ", ".join(names[:count]) + (f", ... ({len(names)} in all)" if len(names) > count else "") or "none"
