"""Between the tensors of a model and those of an adapter file, on PEFT's own route."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping

from peft import PeftModel
from torch import Tensor, nn

from ..adapter.adapter import is_copied_bias
from ..adapter.config import FacTConfig
from ..adapter.names import for_terminal
from ..adapter.renaming import inner_model
from ..adapter.storage import from_storage, is_finite, to_storage
from ..adapter.validation import PREFIX, factor_key, factor_shapes
from ..upstream import AuxiliaryTrainingWrapper
from .merging import is_merged


def factor_keys(config: FacTConfig) -> set[str]:
    """Names of the factors of an adapter, less the adapter's name."""
    return {factor_key(stack, letter) for stack, shapes in factor_shapes(config).items() for letter in shapes}


def stored_state_dict(config: FacTConfig, adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors and biases of an adapter in the data types they are saved in.

    Args:
        config: Of the adapter.
        adapter_name: With which the names of its factors end.
        tensors: By name in the model; the factors of adapted models inside the model are left out.
    """
    own = {f"{key}.{adapter_name}" for key in factor_keys(config)}
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
    remap: Callable[[nn.Module, FacTConfig, str, dict[str, Tensor]], dict[str, Tensor]],
) -> dict[str, Tensor]:
    """What PEFT is to copy into the model, as floats under the names of the model.

    Args:
        model: The model, with the adapter.
        config: The adapter's config there.
        adapter_name: Its name.
        state_dict: What is to be loaded, where PEFT has already renamed what belongs to heads.
        biases: Names of the biases of the model that the adapter trains.
        remap: PEFT's function from names in a file to names in the model.

    Raises:
        ValueError: If the adapter is merged; a factor is missing, not of floats or not finite; a factor or head has
            another shape than in the model; or there are tensors that belong to neither.
    """
    if is_merged(model, adapter_name):
        raise ValueError(f"Adapter {adapter_name!r} is merged; call unmerge_adapter() before it is overwritten.")
    renamed = config.renaming.tensors(state_dict)
    tensors = {name: from_storage(name, tensor) for name, tensor in renamed.items()}
    tensors, foreign = split_off_foreign(model, config, adapter_name, tensors, biases)
    problems = [f"{for_terminal(name)}: no part of the adapter" for name in foreign]
    remapped = remap(model, config, adapter_name, tensors)
    own = {f"{key}.{adapter_name}" for key in factor_keys(config)}
    left_out = []
    for name, parameter in model.named_parameters():
        is_factor = name.removeprefix("_fsdp_wrapped_module.").removeprefix(PREFIX) in own
        if not is_factor and f".modules_to_save.{adapter_name}." not in name:
            continue
        shape = tuple(getattr(parameter, "ds_shape", parameter.shape))  # ZeRO-3 keeps the whole shape there
        if name not in remapped:
            problems.append(f"{name}: missing in the file, {shape} in the model")
        elif tuple(remapped[name].shape) != shape:
            if not is_factor and config.ignores_mismatched_head:
                left_out.append(f"{name}: {tuple(remapped.pop(name).shape)} in the file, {shape} in the model")
            else:
                problems.append(f"{name}: {tuple(remapped[name].shape)} in the file, {shape} in the model")
        elif is_factor and not remapped[name].is_floating_point():
            problems.append(f"{name}: {remapped[name].dtype} in the file, not floats")
        elif not is_finite(remapped[name]):
            problems.append(f"{name}: holds NaN or infinity")
    if problems:
        inner = inner_model(model.get_base_model() if isinstance(model, PeftModel) else model) if foreign else ""
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
    # Numbers in a mapped file lie at any address, and products round by the alignment of what they multiply. In
    # memory of their own they give the same bits as those that were saved.
    return {name: value.clone() for name, value in remapped.items()}


def split_off_foreign(
    model: nn.Module, config: FacTConfig, adapter_name: str, tensors: dict[str, Tensor], biases: Iterable[str]
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors of the adapter, and the names of those that belong to something else.

    Arguments as of `checked_state_dict`. Left out of both is what PEFT saves a second time with ``bias="all"``: the
    biases of a head inside its wrapper, and those of the original head.
    """
    own = factor_keys(config) | {name.removeprefix(PREFIX) for name in biases if not is_copied_bias(name)}
    for name, module in model.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper):
            wrapper = name.removeprefix("_fsdp_wrapped_module.").removeprefix(PREFIX)  # as PEFT does
            own.update(f"{wrapper}.{key}" for key in module.adapter_state_dict_load_map(adapter_name).values())
    belonging = {name: tensor for name, tensor in tensors.items() if name.removeprefix(PREFIX) in own}
    others = tensors.keys() - belonging.keys()
    return belonging, sorted(name for name in others if not (config.bias == "all" and is_copied_bias(name)))
