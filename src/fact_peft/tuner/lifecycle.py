"""The adapters of a model: which it has, whether they can be merged, how they are saved, loaded and removed."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from ..adapter.adapter import is_copied_bias
from ..adapter.config import FacTConfig
from ..adapter.names import FACTORS, PREFIX, by_key, for_terminal, inner_model, is_of_inner_adapter
from ..adapter.storage import from_storage, is_finite, to_storage
from ..adapter.validation import factor_shapes
from ..architecture.linears import close_attentions, replace_everywhere, unwrapped
from ..upstream import activate_heads, unset_loaded
from .factors import FacTLayer, FacTStack, SharedFactors, remove_factors
from .head import FacTHead
from .layer import FacTLinear


def own_factors(model: nn.Module) -> SharedFactors:
    """The factors registered on `model` itself, not those of adapted models inside it; empty if there are none."""
    base = unwrapped(model)
    factors = getattr(base, FACTORS, None)  # may be an attribute of the model that FacT did not make
    return factors if isinstance(factors, SharedFactors) else SharedFactors()


def own_stacks(model: nn.Module, adapter_name: str | None = None) -> list[FacTStack]:
    """The stacks in `own_factors`, or those of them that have factors of one adapter."""
    stacks = cast("list[FacTStack]", list(own_factors(model).values()))
    return [stack for stack in stacks if adapter_name is None or adapter_name in stack.fact_U]


def activate(model: nn.Module, adapter_names: list[str]) -> None:
    """Make these the active adapters of every layer and head."""
    for module in model.modules():
        if isinstance(module, FacTLayer):
            module.set_adapter(adapter_names)
    if adapter_names:
        activate_heads(model, adapter_names)


def is_merged(model: nn.Module, adapter_name: str) -> bool:
    """Whether the increment of an adapter is part of the base weights, so that the adapter must not be changed."""
    return any(adapter_name in stack.merged_adapters for stack in own_stacks(model))


def check_not_merged(model: nn.Module, adapter_name: str, change: str) -> None:
    """Raise a ValueError if an adapter is merged, before it is changed (``"scaled"``, ``"replaced"``...)."""
    if is_merged(model, adapter_name):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call unmerge_adapter() before it is {change}.")


def check_mergeable(model: nn.Module, adapter_names: list[str] | None, safe_merge: bool) -> None:
    """Check every layer before the first one is merged; the arguments are those of `FacTModel.merge_adapter`."""
    for path, layer in model.named_modules():
        if not isinstance(layer, FacTLinear):
            continue
        names, weight = layer.active_adapters if adapter_names is None else adapter_names, None
        for name in [name for name in names if name in layer.fact_slices]:
            if reason := why_not_mergeable(layer):
                raise ValueError(f"An increment cannot be merged into {path}: {reason}.")
            if safe_merge:
                weight = layer.merged_weight(name, check=True, weight=weight)


def why_not_mergeable(layer: FacTLinear) -> str | None:
    """Why an increment that is added to the base weight would be lost or fail; None if it would not."""
    base_layer: Any = layer.get_base_layer()
    if layer.quantization_backend is not None:
        return None
    if "weight" not in base_layer._parameters:
        return (
            "its weight is computed from other parameters (weight_norm, spectral_norm, prune, FSDP), and would be "
            "computed anew without the increment; make it a parameter first, for instance with "
            "torch.nn.utils.parametrize.remove_parametrizations"
        )
    if not layer.is_whole(base_layer.weight):
        return "its weight is sharded over processes; gather it, or merge in one process"
    return None


def forget(model: nn.Module, adapter_name: str) -> None:
    """Remove an adapter of `model` from its layers, heads and stacks, which stay where they are.

    Adapters of models inside this one, and of other PEFT methods, stay.
    """
    factors, stacks = own_factors(model), own_stacks(model)
    config = factors.configs.get(adapter_name)
    for module in list(model.modules()):
        if isinstance(module, FacTLinear) and module.fact_stacks.get(adapter_name) in stacks:
            module.forget(adapter_name)
        elif isinstance(module, FacTHead) and module.configs.get(adapter_name) is config is not None:
            others = [name for name in module.active_adapters if name != adapter_name]
            module.delete_adapter(adapter_name, new_active_adapters=others)
    for stack in stacks:
        stack.forget(adapter_name)
    for name in [name for name, stack in factors.items() if not stack.fact_U]:
        del factors[name]


def undo_injection(model: nn.Module, adapter_name: str, configs: dict[str, Any]) -> None:
    """Remove an adapter, its entry in PEFT's `configs`, and every wrapper that no other adapter needs."""
    base = unwrapped(model)
    forget(base, adapter_name)
    configs.pop(adapter_name, None)
    replacements: dict[nn.Module, nn.Module] = {}
    for module in base.modules():
        if isinstance(module, FacTLinear) and not module.fact_slices:
            replacements[module] = module.base_layer
        elif isinstance(module, FacTHead) and not module.modules_to_save:
            replacements[module] = module.original_module
    replace_everywhere(base, replacements)
    if not own_factors(base):
        remove_factors(base)
    if not any(isinstance(module, FacTLinear) for module in base.modules()):
        close_attentions(base)
    if getattr(base, "peft_config", None) == {}:
        del base.peft_config
    unset_loaded(base)


@contextmanager
def undone_on_failure(model: nn.Module, adapter_name: str, configs: dict[str, Any]) -> Iterator[set[nn.Module]]:
    """Undo the injection of an adapter if the block raises. Yields the heads that are wrapped when it begins."""
    heads: set[nn.Module] = {module for module in model.modules() if isinstance(module, ModulesToSaveWrapper)}
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield heads
    except Exception:
        new = [module for module in model.modules() if isinstance(module, ModulesToSaveWrapper) and module not in heads]
        replace_everywhere(model, {head: head.original_module for head in new})
        undo_injection(model, adapter_name, configs)
        for parameter, requires_grad in flags:
            parameter.requires_grad_(requires_grad)
        unset_loaded(model)
        raise


def undo_awaiting(model: nn.Module, adapter_name: str) -> None:
    """Undo the injection of a saved adapter whose numbers are refused; an adapter that has its numbers stays."""
    waiting = [stack for stack in own_stacks(model) if adapter_name in stack.unloaded]
    if waiting:
        trained = waiting[0].unloaded[adapter_name]
        undo_injection(model, adapter_name, getattr(model, "peft_config", {}))
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def kept_if_refused(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Within the context, an adapter stays if numbers for it are refused, also if its own were never loaded."""
    waiting = {stack: stack.unloaded.pop(adapter_name) for stack in own_stacks(model) if adapter_name in stack.unloaded}
    try:
        yield
    except ValueError:
        for stack, trained in waiting.items():
            stack.unloaded[adapter_name] = trained
        raise


def stored_state_dict(config: FacTConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors and biases of an adapter as they are saved, out of tensors by their names in the model.

    The factors of adapted models inside the model are left out.
    """
    own = {f"{key}.{adapter_name}" for key in by_key(factor_shapes(config))}
    return {
        name: to_storage(name, tensor, config.storage)
        for name, tensor in tensors.items()
        if name.removeprefix(PREFIX) in own or name.rpartition(".")[2] == "bias"
    }


def checked_state_dict(
    model: nn.Module,
    config: FacTConfig,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    biases: Iterable[str],
    remap: Callable[..., dict[str, Tensor]],
) -> dict[str, Tensor]:
    """The tensors that PEFT is to copy into the model, as floats under their names in the model.

    PEFT has already renamed the heads in `state_dict`; `remap` is its function for the other names. `biases` are the
    names of the biases that the adapter trains.
    """
    check_not_merged(model, adapter_name, "overwritten")
    renamed = config.renaming.tensors(state_dict)
    tensors = {name: from_storage(name, tensor) for name, tensor in renamed.items()}
    tensors, foreign = split_off_foreign(model, config, adapter_name, tensors, biases)
    problems = [f"{for_terminal(name)}: no part of the adapter" for name in foreign]
    remapped = remap(model, config, adapter_name, tensors)
    own = {f"{key}.{adapter_name}" for key in by_key(factor_shapes(config))}
    left_out = []
    for name, parameter in model.named_parameters():
        is_factor = name.removeprefix("_fsdp_wrapped_module.").removeprefix(PREFIX) in own
        if not is_factor and f".modules_to_save.{adapter_name}." not in name:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # under ZeRO-3, ds_shape is the whole shape
        if name not in remapped:
            problems.append(f"{name}: missing in the file, {shape} in the model")
        elif tuple(remapped[name].shape) != shape:
            mismatch = f"{name}: {tuple(remapped[name].shape)} in the file, {shape} in the model"
            if not is_factor and config.ignores_mismatched_head:
                left_out.append(mismatch)
                del remapped[name]
            else:
                problems.append(mismatch)
        elif is_factor and not remapped[name].is_floating_point():
            problems.append(f"{name}: {remapped[name].dtype} in the file, not floats")
        elif not is_finite(remapped[name]):
            problems.append(f"{name}: holds NaN or infinity")
    if problems:
        inner = inner_model(unwrapped(model)) if foreign else ""
        raise ValueError(
            f"The saved numbers do not fit adapter {adapter_name!r} (rank={config.rank}, "
            f"decomposition={config.decomposition!r}):\n  " + "\n  ".join(problems) + "\n"
            "Load them into an adapter made with the config they were saved with, on a model with as many labels "
            "(num_labels). To leave out a head of another size, pass ignore_mismatched_sizes=True to "
            "PeftModel.from_pretrained."
            + (f" To load the layers without a head, pass it model.{inner} instead of the model." if inner else "")
        )
    if left_out:
        warnings.warn(
            "The model keeps its own head, since ignore_mismatched_sizes=True: " + "; ".join(left_out), stacklevel=2
        )
        config.ignores_mismatched_head = False
    # Tensors of a memory-mapped file may have any alignment, which changes how products round. Copies have the same
    # alignment as the tensors that were saved, and so give the same bits.
    return {name: value.clone() for name, value in remapped.items()}


def split_off_foreign(
    model: nn.Module, config: FacTConfig, adapter_name: str, tensors: dict[str, Tensor], biases: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the adapter, and the names of those that belong to something else; see `checked_state_dict`.

    With ``bias="all"`` PEFT saves the biases of a wrapped head twice. The second copies are in neither, and neither are
    heads of an inner adapter that the model does not have; see `is_of_inner_adapter`.
    """
    own = by_key(factor_shapes(config)).keys() | {
        name.removeprefix(PREFIX) for name in biases if not is_copied_bias(name)
    }
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapper = name.removeprefix("_fsdp_wrapped_module.").removeprefix(PREFIX)  # as PEFT does
            own.update(f"{wrapper}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
    belonging = {name: tensor for name, tensor in tensors.items() if name.removeprefix(PREFIX) in own}
    others = [name for name in tensors.keys() - belonging.keys() if not is_of_inner_adapter(name.removeprefix(PREFIX))]
    return belonging, sorted(name for name in others if not (config.bias == "all" and is_copied_bias(name)))
