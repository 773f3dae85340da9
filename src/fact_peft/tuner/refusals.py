"""Errors and warnings about configs and models that do not fit, raised before the model is changed."""

import warnings
from collections.abc import Iterable, Mapping

from peft import PeftModel, TaskType
from peft.tuners.tuners_utils import BaseTuner
from peft.utils import ModulesToSaveWrapper
from torch import nn
from torch.distributed.tensor import DTensor

from ..adapter.config import FacTConfig
from ..adapter.names import FACTORS, PREFIX, first_few, inner_model, is_of_inner_adapter, names_in_others, parts_with
from ..adapter.validation import WRAPPED, is_trained
from ..architecture.blocks import find_block_linears, find_blocks
from ..architecture.heads import find_classifiers
from ..architecture.linears import base_of, find_linears, is_fused, part_names, uncompiled, walk
from ..method.tensorization import PARTS, block_of, describe_layout, read_layout
from .factors import FacTLayer, FacTStack, SharedFactors
from .layer import FacTLinear, find_quantization
from .lifecycle import own_factors, own_stacks

# Attributes of the containers in which factors and heads are kept by adapter name; no adapter can have such a name.
RESERVED = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}
# Parts of the names of factors, heads and biases in an adapted model.
NAMES_AROUND = (FACTORS, *FacTStack.adapter_layer_names, f"{PREFIX}base_layer.weight", "bias", *WRAPPED)
# The names that PEFT adds to `modules_to_save` for these tasks, whether the model has such modules or not.
HEADS_OF_TASKS = {
    TaskType.SEQ_CLS: {"classifier", "score"},
    TaskType.TOKEN_CLS: {"classifier", "score"},
    TaskType.QUESTION_ANS: {"qa_outputs"},
}


def check_unwrapped(model: nn.Module) -> None:
    """Refuse a model that PEFT or ``torch.compile`` has wrapped, before PEFT writes into its configs.

    The factors would lie on the wrapper, where they are not found, or have other names than in the file.
    """
    if isinstance(model, (PeftModel, BaseTuner)) and any(isinstance(module, FacTLayer) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has a FacT adapter already. Use model.add_adapter(name, config) or "
            "model.load_adapter(folder, name) for another one, or model.unload() to get the base model back."
        )
    if isinstance(model, PeftModel):
        raise ValueError(
            f"The model is a {type(model).__name__} already; pass model.get_base_model(), which keeps its adapter."
        )
    if model is not uncompiled(model):
        raise ValueError("The model is compiled already; adapt it first: torch.compile(get_peft_model(model, config)).")


def check_model(model: nn.Module) -> None:
    """Refuse a model that is sharded, or has an attribute with the name of the factors.

    On a sharded model (FSDP2, tensor parallelism) every rank would have whole factors, whose gradients nothing sums.
    """
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


def check_adapter_name(adapter_name: str, model: nn.Module) -> None:
    """Refuse names that cannot be keys of ``nn.ModuleDict`` and ``nn.ParameterDict``, or would spoil other files.

    PEFT leaves a tensor out of the file of an adapter if another adapter is called like a part of the tensor's name.
    """
    if not adapter_name or "." in adapter_name or adapter_name in RESERVED:
        raise ValueError(
            f"adapter_name={adapter_name!r} cannot be the name of a parameter: it is empty, has a dot in it, or is an "
            "attribute of nn.ParameterDict or nn.ModuleDict (such as 'copy' or 'training'); choose another name."
        )
    adapters = own_factors(model).configs.keys() | {adapter_name}
    names = [*NAMES_AROUND, *own_factors(model), *find_linears(model), *(name for name, _ in walk(model))]
    taken = adapters & {part for name in names for part in name.split(".") if not part.isdigit()}
    if taken and len(adapters) > 1:
        raise ValueError(
            f"The adapter name {min(taken)!r} is also a part of the name of a parameter of {type(model).__name__}. "
            "PEFT would leave that parameter out of the files of the other adapters; choose another name."
        )


def check_owner(model: nn.Module, adapter_name: str, layers: Mapping[str, nn.Module]) -> None:
    """Refuse layers that have an adapter of this name whose factors belong to another model with the same layers."""
    own = own_stacks(model)
    for name, layer in layers.items():
        stack = layer.fact_stacks.get(adapter_name) if isinstance(layer, FacTLinear) else None
        if stack is not None and stack not in own:
            raise ValueError(
                f"adapter_name={adapter_name!r} is taken: {name} already has an adapter of this name, whose factors "
                f"belong to another model that shares this layer with {type(model).__name__}. Choose another name, and "
                "call set_adapter before either model is used."
            )


def check_trainable(heads: Mapping[str, nn.Module]) -> None:
    """Refuse modules to train in full that are quantised or have a quantised layer."""
    for name, module in heads.items():
        for layer in base_of(module).modules():
            backend = find_quantization(base_of(layer))
            if backend is not None:
                raise ValueError(
                    f"The module {name} is quantised ({backend.backend_name}) and cannot be trained. Leave it out when "
                    f"quantising (modules_to_not_convert or llm_int8_skip_modules=[{name!r}]), or pass "
                    "modules_to_save=[]."
                )


def check_complete(config: FacTConfig, heads: Mapping[str, nn.Module]) -> None:
    """Refuse a saved adapter that lacks a parameter of one of `heads`, the modules that it is to be copied into."""
    if config.saved_others is None:
        return
    needed = {f"{name}.{key}" for name, head in heads.items() for key, _ in base_of(head).named_parameters()}
    missing = sorted(needed - config.renaming.tensors(dict.fromkeys(config.saved_others)).keys())
    if missing:
        raise ValueError(
            f"The adapter trains modules_to_save={config.modules_to_save} but has no {first_few(missing)}: probably it "
            "was saved without its head. Save it again where it was trained, or keep the head of the model with "
            "Adapter.read(folder).replace(modules_to_save=[]).attach(model)."
        )


def check_inner_heads(config: FacTConfig, model: nn.Module, adapter_name: str) -> None:
    """Refuse an adapter whose file would have, or lacks, heads of another adapter of its name inside the model.

    PEFT saves and loads the heads of a model by the name of the adapter. A file that has heads of others is refused
    when it is read, unless their names show that they are of a `PeftModel` inside the model.
    """
    configs, saved = own_factors(model).configs, config.saved_others
    for name, head in model.named_modules():
        if not isinstance(head, ModulesToSaveWrapper) or getattr(head, "configs", None) is configs:
            continue
        keys = {f"{name}.{key}" for key in head.adapter_state_dict_load_map(adapter_name)}
        would_have = {key for key in keys if not is_of_inner_adapter(key) and not is_trained(config, key)}
        lacks = keys - would_have - config.renaming.tensors(dict.fromkeys(saved)).keys() if saved is not None else set()
        if would_have or lacks:
            raise ValueError(
                f"adapter_name={adapter_name!r} is also the name of an adapter inside the model, and PEFT "
                f"{'would save' if would_have else 'expects'} its head {name} in the same file; choose another name."
            )


def check_parts(config: FacTConfig, model: nn.Module, linears: Iterable[str]) -> None:
    """Refuse `target_modules` and `exclude_modules` that name a part, such as ``fc1.q``, of a layer without parts."""
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
    """Refuse ``share="block"`` if a layer of a transformer block has a name that looks like one of another block."""
    blocks = find_blocks(model)
    for name in layers:
        for block in blocks:
            if name.startswith(f"{block}.") and block_of(name) != block:
                raise ValueError(
                    f"share='block' cannot be had on {type(model).__name__}: {name} lies in the block {block}, but by "
                    f"its name in {block_of(name) or 'none'}; leave it out with exclude_modules, or take "
                    "share='model'."
                )


def check_shared_weights(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Refuse a layer that is a child of two modules, and two layers that have the same weight.

    A layer with two parents would be adapted in one of them only, and a weight of two layers would be merged twice. A
    block that is used at several places is no problem, since its layers have one parent.
    """
    first = {layer: name for name, layer in layers.items()}
    weights: dict[int, str] = {}
    for parent_name, parent in model.named_modules():
        for child_name, child in parent.named_children():
            name = f"{parent_name}.{child_name}".removeprefix(".")
            if first.get(child, name) != name:
                raise ValueError(
                    f"{first[child]} and {name} are one layer at two places, and only the first would be adapted. Give "
                    f"each its own (copy.deepcopy), or pass exclude_modules=[{first[child]!r}, {name!r}]."
                )
    for module, name in first.items():
        weight = base_of(module)._parameters.get("weight")
        other = weights.setdefault(id(weight), name) if weight is not None else name
        if other != name:
            raise ValueError(
                f"{other} and {name} have one weight (tied), which merging would change by both increments. Untie "
                f"them, or adapt one: exclude_modules=[{name!r}]."
            )


def check_readable(layout: list[str], targets: Mapping[str, tuple[int, int]], parts: Mapping[str, str]) -> None:
    """Refuse names of layers with which the layout could be saved but not read again."""
    try:
        readable = read_layout(layout) == (targets, parts)
    except ValueError:
        readable = False
    if not readable:
        raise ValueError(
            f"These layers cannot be written down, {first_few(targets)}: probably a name has a comma, a colon or a "
            "space in it; rename that module, or leave it out with exclude_modules."
        )


def warn_of_unmatched(asked: FacTConfig, model: nn.Module, linears: Iterable[str]) -> None:
    """Warn of names in `target_modules` and `modules_to_save` that match nothing, and name modules that do."""
    layers = [part for name in linears for part in (name, *(part_names(name) if is_fused(model, name) else []))]
    suffixes = {layer.split(".", start)[-1] for layer in layers for start in range(layer.count(".") + 1)}
    targets = asked.target_modules if isinstance(asked.target_modules, set) else set()
    unmatched = sorted(targets - suffixes)
    if unmatched:
        last_names = dict.fromkeys(name.rpartition(".")[2] for name in linears)
        warnings.warn(
            f"target_modules has {first_few(map(repr, unmatched))}, which matches no linear layer of "
            f"{type(model).__name__}. Its linear layers are called {first_few(last_names, 12)}.",
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
            f"{type(model).__name__}, so nothing of that name is trained or saved. It has {first_few(found)}.",
            stacklevel=2,
        )


def layout_mismatch(config: FacTConfig, layout: list[str], model: nn.Module) -> str:
    """The error message for an adapter that was trained on other layers than the model has."""
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
    """Advice on where to load an adapter whose layers are those of a part of `model`, or include them; else empty."""
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
